"""A forward pass of a model of transformers, with what is kept of each mixture's choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from moestro.errors import DataError, MoestroError
from moestro.foreign.taps import RawChoice, Tap, tapped
from moestro.probe.recording.choices import Choice, Kept


def look(
    model: nn.Module,
    found: Sequence[Tap],
    tokens_BS: Tensor,
    valid_BS: Tensor | None,
    keep: Callable[[Choice], Kept],
) -> tuple[Tensor, list[Kept]]:
    """One forward pass: logits [B, S, V], and what is kept of each mixture's choice.

    Experts of a token come heaviest first: many routers return them in no order.

    Raises:
        MoestroError: a mixture did not run, or not once over all tokens; names its class.
    """
    kept: dict[int, Kept] = {}

    def see(place: int, raw: RawChoice) -> None:
        tap = found[place]
        if place in kept or len(raw.experts_TK) != tokens_BS.numel():
            raise MoestroError(
                f"{tap.name} ({type(tap.experts).__name__}) does not route all tokens of a forward "
                f"pass at once: it was given {len(raw.experts_TK)} of {tokens_BS.numel()}; "
                "this way of routing cannot be recorded"
            )
        weights_TK, order_TK = (
            raw.weights_TK.detach().float().sort(dim=1, descending=True, stable=True)
        )
        experts_TK = raw.experts_TK.gather(1, order_TK)
        probs_TE, top_k = tap.probabilities(raw.logits_TE), experts_TK.shape[1]
        kept[place] = keep(Choice(experts_TK, weights_TK, probs_TE, tap.num_experts, top_k))

    with tapped(found, see):
        logits_BSV = run(model, tokens_BS, valid_BS)
    missed = [tap for place, tap in enumerate(found) if place not in kept]
    if missed:
        raise MoestroError(
            f"{missed[0].name} ({type(missed[0].experts).__name__}) was not reached by text, "
            f"like {len(missed)} of {len(found)} mixtures: other code may stand in for its block. "
            "Load the model without use_kernels, and give the one that reads text"
        )
    return logits_BSV, [kept[place] for place in range(len(found))]


def run(model: nn.Module, tokens_BS: Tensor, valid_BS: Tensor | None) -> Tensor:
    """Logits [B, S, V] of a forward pass without a cache; hidden states of a headless model."""
    mask_BS = None if valid_BS is None else valid_BS.long()
    output = model(input_ids=tokens_BS, attention_mask=mask_BS, use_cache=False)
    logits = getattr(output, "logits", None)
    found: Tensor = output.last_hidden_state if logits is None else logits
    return found


def vocabulary(model: nn.Module) -> int:
    """The number of token ids that a model knows.

    Raises:
        DataError: it does not say.
    """
    size = getattr(_settings(model), "vocab_size", None)
    if not isinstance(size, int):
        raise DataError(f"{type(model).__name__} does not say how many tokens it knows")
    return size


def context(model: nn.Module) -> int | None:
    """Most tokens of a text; None where the model does not say."""
    found: int | None = getattr(_settings(model), "max_position_embeddings", None)
    return found


def _settings(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
