"""Choosing the next token: penalties, temperature, top-k, top-p, min-p, one random draw per token.

The order is that of transformers: repetition penalty; presence and frequency penalties; divide by
the temperature, softmax; keep the top_k likeliest, then the smallest likeliest set whose share of
what is left reaches top_p, then what is at least min_p times as likely as the likeliest;
renormalise, draw. Between equal probabilities the lower token id counts as likelier. All of it
runs on the CPU in float64, so that a seed gives the same tokens on every device for the same
logits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator
from torch import Generator, Tensor

from moestro.errors import ConfigError, DataError, MoestroError, ShapeError
from moestro.settings import Settings
from moestro.text import optional_json

GENERATION_FILE = "generation_config.json"
# What a checkpoint may state of how to choose its tokens.
STATED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]


class SamplingConfig(Settings):
    """How to choose tokens, and when to stop."""

    temperature: Annotated[float, Field(ge=0.0)] = Field(
        0.8,
        description="0: always the most likely token; 1: the model's own distribution.",
    )
    top_k: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Only the K most likely tokens; unset: all."
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="Only the most likely tokens whose probabilities sum to this."
    )
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.0, description="Only tokens at least this many times as likely as the most likely one."
    )
    repetition_penalty: Annotated[float, Field(gt=0.0)] = Field(
        1.0, description="Above 1, tokens of the prompt and the text so far become less likely."
    )
    presence_penalty: Penalty = Field(
        0.0, description="Subtracted from the logit of each token chosen before."
    )
    frequency_penalty: Penalty = Field(
        0.0, description="Subtracted from a token's logit each time it was chosen before."
    )
    logit_bias: tuple[tuple[Annotated[int, Field(ge=0)], Bias], ...] = Field(
        (), description="(token, what is added to its logit); -100 as good as forbids a token."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    max_tokens: Annotated[int, Field(ge=1)] = 256
    stop: tuple[str, ...] = Field((), description="Strings that end the text; never part of it.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if "" in self.stop:
            raise ValueError("stop holds an empty string, which every text contains; leave it out")
        return self


class Past:
    """The tokens of one text so far, as penalties see them.

    Attributes:
        prompt: What the model read before the first token that was chosen.
        chosen: How often each token was chosen.
    """

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        self.prompt = frozenset(prompt)
        self.chosen: Counter[int] = Counter()


def stated_sampling(folder: Path) -> dict[str, Any]:
    """The settings that a checkpoint's generation_config.json states; none without the file.

    `do_sample: false` states a temperature of 0 and nothing else.

    Raises:
        DataError: the file cannot be read, or a value is not allowed.
    """
    path = folder / GENERATION_FILE
    values = optional_json(path)
    stated = {name: values[name] for name in STATED if values.get(name) is not None}
    if values.get("do_sample") is False:
        stated = {"temperature": 0.0} | {
            name: value for name, value in stated.items() if name == "repetition_penalty"
        }
    # Older files write "all" as 0 or -1.
    if stated.get("top_k") in (0, -1):
        del stated["top_k"]
    try:
        checked = SamplingConfig(**stated)
    except ConfigError as error:
        raise DataError(f"{path}: {error}") from None
    return {name: getattr(checked, name) for name in stated}


def new_generator(sampling: SamplingConfig) -> Generator:
    """The source of randomness of one request, on the CPU, at the start of its seed."""
    return torch.Generator().manual_seed(sampling.seed)


def penalised(logits_BV: Tensor, sampling: SamplingConfig, pasts: Sequence[Past]) -> Tensor:
    """The logits after the penalties and biases, to be given to `next_tokens`.

    The repetition penalty divides the logits above 0 of every token of the prompt or the text so
    far, and multiplies those below (Keskar et al. 2019, arXiv:1909.05858). The presence penalty is
    taken once, the frequency penalty as often as a token was chosen, from what was chosen alone
    (OpenAI's definition). Biases come last.

    Args:
        logits_BV: any float dtype, any device; -inf masks a token.
        sampling: the three penalties and the biases are used.
        pasts: one per row.

    Returns:
        float64 [B, V] on the CPU; the logits as they are where nothing is set.

    Raises:
        ShapeError: a bias is of a token that there is not.
    """
    repetition, presence = sampling.repetition_penalty, sampling.presence_penalty
    frequency, biases = sampling.frequency_penalty, dict(sampling.logit_bias)
    if (repetition, presence, frequency) == (1.0, 0.0, 0.0) and not biases:
        return logits_BV
    if biases and max(biases) >= logits_BV.shape[1]:
        raise ShapeError(
            f"logit_bias names token {max(biases)}; tokens are 0 to {logits_BV.shape[1] - 1}"
        )
    logits_BV = logits_BV.detach().to("cpu", torch.float64, copy=True)
    for logits_V, past in zip(logits_BV, pasts, strict=True):
        seen_N = logits_V.new_tensor(sorted(past.prompt.union(past.chosen)), dtype=torch.int64)
        old_N = logits_V[seen_N]
        logits_V[seen_N] = torch.where(old_N > 0, old_N / repetition, old_N * repetition)
        chosen_N = logits_V.new_tensor(list(past.chosen.keys()), dtype=torch.int64)
        times_N = logits_V.new_tensor(list(past.chosen.values()))
        logits_V[chosen_N] -= presence + frequency * times_N
    if biases:
        logits_BV[:, list(biases)] += logits_BV.new_tensor(list(biases.values()))
    return logits_BV


def probabilities(logits_BV: Tensor, sampling: SamplingConfig) -> Tensor:
    """The distribution that `next_tokens` draws from.

    Args:
        logits_BV: any float dtype, any device; -inf masks a token.
        sampling: temperature, top_k, top_p and min_p are used.

    Returns:
        float64 [B, V] on the CPU: rows sum to 1, 0 for every token that is not kept.

    Raises:
        ShapeError: the logits are not [B, V] floats.
        MoestroError: a row holds NaN or +inf, or every token of it is masked.
    """
    logits_BV = _checked(logits_BV)
    if sampling.temperature == 0.0:
        return torch.nn.functional.one_hot(logits_BV.argmax(-1), logits_BV.shape[1]).double()
    # The maximum goes first: a tiny temperature would otherwise overflow.
    shifted_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
    p_BV = torch.softmax(shifted_BV / sampling.temperature, -1)
    if sampling.top_k is None and sampling.top_p == 1.0 and sampling.min_p == 0.0:
        return p_BV
    # Sorted by logit, where what the softmax rounds to equal still has its order.
    order_BV = logits_BV.argsort(dim=-1, descending=True, stable=True)
    p_BV = p_BV.gather(-1, order_BV)
    if sampling.top_k is not None:
        p_BV[:, sampling.top_k :] = 0.0
    if sampling.top_p < 1.0:
        share_BV = p_BV / p_BV.sum(-1, keepdim=True)
        reached_BV = share_BV.cumsum(-1) >= sampling.top_p
        p_BV[:, 1:][reached_BV[:, :-1]] = 0.0
    p_BV[p_BV < sampling.min_p * p_BV[:, :1]] = 0.0
    p_BV = p_BV / p_BV.sum(-1, keepdim=True)
    return torch.zeros_like(p_BV).scatter(-1, order_BV, p_BV)


def next_tokens(
    logits_BV: Tensor, sampling: SamplingConfig, generators: Sequence[Generator]
) -> Tensor:
    """Choose one token for each row.

    Each row takes exactly one number from its own generator (none at temperature 0), so a
    request's tokens do not depend on what else is in the batch.

    Args:
        logits_BV: any float dtype, any device; -inf masks a token.
        sampling: how to choose.
        generators: one per row, from `new_generator`.

    Returns:
        int64 [B] on the CPU.

    Raises:
        ShapeError: the logits are not [B, V] floats, or the generators are not B.
        MoestroError: a row holds NaN or +inf, or every token of it is masked.
    """
    if logits_BV.ndim and len(generators) != logits_BV.shape[0]:
        raise ShapeError(
            f"{logits_BV.shape[0]} rows of logits need one generator each, "
            f"but {len(generators)} were given"
        )
    if sampling.temperature == 0.0:
        return _checked(logits_BV).argmax(-1)
    p_BV = probabilities(logits_BV, sampling)
    draws = [
        torch.rand(1, generator=each, dtype=torch.float64, device=each.device)
        for each in generators
    ]
    draw_B1 = torch.stack(draws) if draws else p_BV.new_zeros(0, 1)
    ends_BV = p_BV.cumsum(-1)
    # Rounding can lift a draw to the very end, past the last token that is kept.
    total_B1 = ends_BV[:, -1:]
    draw_B1 = torch.minimum(draw_B1 * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    return torch.searchsorted(ends_BV, draw_B1, right=True).squeeze(-1)


def _checked(logits_BV: Tensor) -> Tensor:
    """The logits in float64 on the CPU, once they are known to allow a choice."""
    if logits_BV.ndim != 2 or not logits_BV.is_floating_point() or logits_BV.shape[1] == 0:
        raise ShapeError(
            f"logits are {list(logits_BV.shape)} {logits_BV.dtype}; "
            "give floats of shape [batch, vocabulary]"
        )
    logits_BV = logits_BV.detach().to("cpu", torch.float64)
    usable_B = logits_BV.amax(-1).isfinite()  # NaN and +inf rise to the maximum
    if not usable_B.all():
        row = int((~usable_B).nonzero()[0])
        raise MoestroError(
            f"no token can be chosen: row {row} of the logits holds NaN or +inf, or masks every "
            "token; check the model's weights and the mask"
        )
    return logits_BV
