"""Find the routers of any model of transformers, see what they decide, and change it.

Most families hand their experts module the tokens with the index and the weight of each choice: a
hook there sees what is really used. A few are built otherwise and have an entry in `routers`.
transformers itself is never imported.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moestro.errors import DataError, MoestroError
from moestro.probe.recording import hooks, routers
from moestro.probe.recording.choices import Choice, Kept

# What blocks are called that hold a mixture, in transformers and in code that came with a model.
_BLOCK = re.compile(r"(MoE|Moe|MoeBlock|MoEBlock|MoELayer|MoeLayer|SparseMLP|MoA)$")
# Parts of a model that text alone does not pass.
_ASIDE = re.compile(r"(^|[._])(vision|visual|image|audio|talker|code2wav|mtp)(?=$|[._])")


class Tap(NamedTuple):
    """A mixture of a model, and where its routing can be seen.

    Attributes:
        layer: number of its layer.
        name: of the experts module.
        num_experts: E.
        experts: the module of the experts, or the outermost that only passes calls on to it (an
            adapter); the router itself where they get no choices.
        router: the module beside it whose output holds the logits, found alike; None: not found.
        scoring: how its logits become probabilities, see `routers.probabilities`; None: unknown.
    """

    layer: int
    name: str
    num_experts: int
    experts: nn.Module
    router: nn.Module | None
    scoring: str | None


class Chosen(NamedTuple):
    """What a mixture is about to use, as the model made it: dtypes, order and gradients its own.

    Attributes:
        experts_TK: int64.
        weights_TK: the weight of each expert's output (in Llama 4, of its input).
        logits_TE: what the router computed; None: not found.
    """

    experts_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor | None


See = Callable[[int, Chosen], tuple[Tensor, Tensor] | None]


def taps(model: nn.Module) -> list[Tap]:
    """Every mixture that text passes, in the order of the layers.

    Raises:
        MoestroError: there is none, or one that cannot be looked into; names the classes.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise MoestroError(
            f"{type(model).__name__} is an encoder-decoder; traces are of decoders, which read one "
            "text from left to right. Give a decoder"
        )
    modules = {name: module for name, module in model.named_modules() if not _ASIDE.search(name)}
    found: list[Tap] = []
    for inner, module in modules.items():
        other = routers.kind(module) in routers.OTHERS
        if not other and not _takes_choices(inner, module):
            continue
        name = routers.outermost(modules, inner)
        if any(tap.name == name for tap in found):  # one wrapper may hold two, of which one runs
            continue
        parent = modules.get(name.rpartition(".")[0])
        if other and routers.kind(parent) in routers.NOT_FEED_FORWARD:
            continue
        router = modules[name] if other else _beside(modules, name)
        found.append(_tap(name, modules[name], router))
    _refuse_unseen(model, modules, found)
    if not found:
        raise MoestroError(
            f"{type(model).__name__} has no mixture of experts that could be found, so there is no "
            "routing to look at; give a mixture"
        )
    numbers = [tap.layer for tap in found]
    if len(set(numbers)) < len(numbers):
        found = [tap._replace(layer=number) for number, tap in enumerate(found)]
    return found


@contextmanager
def tapped(found: Sequence[Tap], see: See, *, again: bool = False) -> Iterator[None]:
    """Show every choice to `see`, which may change it.

    Args:
        found: from `taps`.
        see: called with (place in `found`, what is about to be used), once for each mixture of a
            forward pass; returns None to leave it, or (experts_TK, weights_TK) to be used
            instead. Logits keep their gradients.
        again: call it also where activations are computed once more in a backward pass. A change
            needs that, a count must not have it.
    """
    logits: dict[int, Tensor] = {}
    with ExitStack() as stack:

        def add(register: Any, hook: Any, **options: Any) -> None:
            stack.callback(hooks.add(register, hook, **options).remove)

        def shown(place: int, chosen: Chosen) -> tuple[Tensor, Tensor] | None:
            # Number of the running backward pass; -1 outside of one.
            if torch._C._current_graph_task_id() != -1 and not again:
                return None
            return see(place, chosen)

        for place, tap in enumerate(found):
            other = routers.OTHERS.get(routers.kind(routers.core(tap.experts)))
            if other is not None:
                add(tap.experts.register_forward_hook, _after(place, other, shown))
                continue
            if tap.router is not None:
                remember = _remember(place, tap.num_experts, logits)
                add(tap.router.register_forward_hook, remember)
            before = _before(place, tap, logits, shown)
            add(tap.experts.register_forward_pre_hook, before, with_kwargs=True)
        yield


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

    def see(place: int, chosen: Chosen) -> None:
        tap = found[place]
        if place in kept or len(chosen.experts_TK) != tokens_BS.numel():
            raise MoestroError(
                f"{tap.name} ({type(tap.experts).__name__}) does not route all tokens of a forward "
                f"pass at once: it was given {len(chosen.experts_TK)} of {tokens_BS.numel()}; "
                "this way of routing cannot be recorded"
            )
        weights_TK, order_TK = (
            chosen.weights_TK.detach().float().sort(dim=1, descending=True, stable=True)
        )
        experts_TK = chosen.experts_TK.gather(1, order_TK)
        kept[place] = keep(
            Choice(
                experts_TK, weights_TK, probabilities(tap, chosen.logits_TE), tap.num_experts,
                experts_TK.shape[1],
            )
        )  # fmt: skip

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


def probabilities(tap: Tap, logits_TE: Tensor | None) -> Tensor | None:
    """[T, E], the router's probabilities, with gradients; None where they are not known."""
    if logits_TE is None or tap.scoring is None:
        return None
    return routers.probabilities(tap.scoring, tap.router, logits_TE)


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


def _tap(name: str, experts: nn.Module, router: nn.Module | None) -> Tap:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    inner = routers.core(experts)
    kind = routers.kind(inner)
    count: Any = getattr(inner, routers.COUNTS.get(kind, "num_experts"), None)
    if count is None:
        count = getattr(inner, "out_features", None)
    if count is None:
        raise MoestroError(f"{name} ({kind}) does not say how many experts it has")
    count = int(count) + (kind in routers.SKIPPING)
    scoring = routers.scoring(router)
    return Tap(numbers[-1] if numbers else 0, name, count, experts, router, scoring)


def _takes_choices(name: str, module: nn.Module) -> bool:
    """Whether a module is experts that are handed tokens, indices and weights."""
    if name.split(".")[-1] != "experts" and "Experts" not in type(module).__name__:
        return False
    names = _names(module)
    return len(names) == 2 and "ind" in names[0] and "weights" in names[1]


def _names(experts: nn.Module) -> list[str]:
    """What an experts module calls the indices and the weights that it is handed."""
    return list(inspect.signature(type(experts).forward).parameters)[2:4]


def _beside(modules: dict[str, nn.Module], name: str) -> nn.Module | None:
    """The router that lives in the same block as the experts of that name."""
    block = name.rpartition(".")[0]
    for own in ("gate", "router"):
        router = modules.get(f"{block}.{own}" if block else own)
        if router is not None:
            return router
    return None


def _refuse_unseen(model: nn.Module, modules: dict[str, nn.Module], found: list[Tap]) -> None:
    """Refuse a model of which some mixture would stay out of sight."""
    seen = [tap.name for tap in found]
    unseen = set()
    for name, module in modules.items():
        kind = type(module).__name__
        last = name.split(".")[-1]
        # "Shared" experts take every token: nothing is chosen there.
        experts = last == "experts" or (kind.endswith("Experts") and "Shared" not in kind)
        block = _BLOCK.search(kind) is not None
        skipped = module is model or routers.kind(module) in routers.NOT_FEED_FORWARD
        if skipped or not (experts or block):
            continue
        parent = name.rpartition(".")[0]
        inside = any(tap == name or tap.startswith(f"{name}.") for tap in seen)
        # Experts are seen where their router is: in the same block.
        beside = experts and any(tap.rpartition(".")[0] == parent for tap in seen)
        aside = experts and routers.kind(modules.get(parent)) in routers.NOT_FEED_FORWARD
        within = any(name.startswith(f"{tap}.") for tap in seen)
        if not (inside or beside or aside or within):
            unseen.add(kind)
    if unseen:
        raise MoestroError(
            f"the routing of {', '.join(sorted(unseen))} in {type(model).__name__} cannot be seen: "
            "its experts are not handed the index and weight of each choice, and moestro has no "
            "other way to look into it. Models of transformers with an experts interface can be "
            "recorded"
        )


def _remember(place: int, num_experts: int, logits: dict[int, Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.shape[-1] == num_experts:
            logits[place] = first.reshape(-1, num_experts)

    return hook


def _before(place: int, tap: Tap, logits: dict[int, Tensor], see: See) -> Any:
    inner = routers.core(tap.experts)
    skip, names = routers.kind(inner) in routers.SKIPPING, _names(inner)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # The tokens come first by position; all families do so.
        values = [*args, *(kwargs[name] for name in names[len(args) - 1 :])]
        states, experts_TK, weights_TK = values[:3]
        chosen = Chosen(experts_TK, weights_TK, logits.pop(place, None))
        if skip:
            none_TK = weights_TK == 0
            chosen = chosen._replace(
                experts_TK=experts_TK.masked_fill(none_TK, tap.num_experts - 1)
            )
        changed = see(place, chosen)
        if changed is None:
            return None
        experts_TK, weights_TK = _in_range(changed, weights_TK, tap.num_experts - skip)
        rest = {name: value for name, value in kwargs.items() if name not in names}
        return (states, experts_TK, weights_TK, *values[3:]), rest

    return hook


def _after(place: int, other: routers.Other, see: See) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        router = routers.core(module)
        experts_TK, weights_TK, logits_TE = other.read(router, output)
        changed = see(place, Chosen(experts_TK, weights_TK, logits_TE))
        if changed is None:
            return None
        num_experts = logits_TE.shape[1]
        return other.write(router, output, *_in_range(changed, weights_TK, num_experts))

    return hook


def _in_range(
    changed: tuple[Tensor, Tensor], like_TK: Tensor, num_experts: int
) -> tuple[Tensor, Tensor]:
    """The model's dtype; an empty place becomes an expert that counts for nothing."""
    experts_TK, weights_TK = changed
    empty_TK = experts_TK >= num_experts
    weights_TK = weights_TK.to(like_TK.dtype).masked_fill(empty_TK, 0)
    return experts_TK.masked_fill(empty_TK, 0), weights_TK
