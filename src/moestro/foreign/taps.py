"""Find the routers of any model of transformers, see what they decide, and change it.

Most families hand their experts module the tokens with the index and the weight of each choice: a
hook there sees what is really used. For a few the router's output is looked at instead.
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

from moestro.errors import MoestroError
from moestro.foreign import hooks, routers
from moestro.foreign.classes import (
    EXPERTS,
    NOT_FEED_FORWARD,
    PLAIN,
    core,
    kind,
    outermost,
    unaccounted,
)

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
        scoring: how its logits become probabilities, see `routers.RouterTraits`; None: unknown.
    """

    layer: int
    name: str
    num_experts: int
    experts: nn.Module
    router: nn.Module | None
    scoring: str | None

    def probabilities(self, logits_TE: Tensor | None) -> Tensor | None:
        """[T, E], the router's probabilities, with gradients; None where they are not known."""
        if logits_TE is None or self.scoring is None:
            return None
        return routers.probabilities(self.scoring, self.router, logits_TE)


class RawChoice(NamedTuple):
    """What a mixture is about to use, as the model made it: dtypes, order and gradients its own.

    Attributes:
        experts_TK: int64.
        weights_TK: the weight of each expert's output (in Llama 4, of its input).
        logits_TE: what the router computed; None: not found.
    """

    experts_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor | None


See = Callable[[int, RawChoice], tuple[Tensor, Tensor] | None]


def taps(model: nn.Module) -> list[Tap]:
    """Every mixture that text passes, in the order of the layers.

    Raises:
        MoestroError: there is none, or one that cannot be looked into; names the classes.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise MoestroError(
            f"{type(model).__name__} is an encoder-decoder; give a decoder, which reads one text "
            "from left to right"
        )
    modules = {name: module for name, module in model.named_modules() if not _ASIDE.search(name)}
    found: list[Tap] = []
    for inner, module in modules.items():
        by_router = _output(module) is not None
        if not by_router and not _takes_choices(inner, module):
            continue
        name = outermost(modules, inner)
        if any(tap.name == name for tap in found):  # a wrapper may hold two and run one
            continue
        block = name.rpartition(".")[0]
        if by_router and kind(modules.get(block)) in NOT_FEED_FORWARD:
            continue
        beside = [f"{block}.{own}".strip(".") for own in ("gate", "router")]
        routed = [name] if by_router else [each for each in beside if each in modules]
        found.append(_tap(name, modules[name], modules[routed[0]] if routed else None))
    unseen = unaccounted(modules, [tap.name for tap in found], beside=True)
    if unseen:
        raise MoestroError(
            f"the routing of {', '.join(unseen)} in {type(model).__name__} cannot be seen: its "
            "experts are not handed the index and weight of each choice. Models of transformers "
            "with an experts interface can be recorded"
        )
    if not found:
        raise MoestroError(f"{type(model).__name__} has no mixture of experts; give a mixture")
    if len({tap.layer for tap in found}) < len(found):
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

    def shown(place: int, choice: RawChoice) -> tuple[Tensor, Tensor] | None:
        # Number of the running backward pass; -1 outside of one.
        if torch._C._current_graph_task_id() != -1 and not again:
            return None
        return see(place, choice)

    with ExitStack() as stack:
        for place, tap in enumerate(found):
            for handle in _listen(place, tap, shown):
                stack.callback(handle.remove)
        yield


def _tap(name: str, experts: nn.Module, router: nn.Module | None) -> Tap:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    inner = core(experts)
    about = EXPERTS.get(kind(inner), PLAIN)
    count: Any = getattr(inner, about.counted_by, getattr(inner, "out_features", None))
    if count is None:
        raise MoestroError(f"{name} ({kind(inner)}) does not say how many experts it has")
    layer = numbers[-1] if numbers else 0
    return Tap(layer, name, int(count) + about.skips, experts, router, routers.scoring(router))


def _output(module: nn.Module) -> tuple[routers.Read, routers.Write] | None:
    """How to read and write what a module returns, if it is a router where that is needed."""
    row = routers.ROUTERS.get(kind(module))
    return None if row is None else row.output


def _takes_choices(name: str, module: nn.Module) -> bool:
    """Whether a module is experts that are handed tokens, indices and weights."""
    if name.split(".")[-1] != "experts" and "Experts" not in type(module).__name__:
        return False
    names = _names(module)
    return len(names) == 2 and "ind" in names[0] and "weights" in names[1]


def _names(experts: nn.Module) -> list[str]:
    """What an experts module calls the indices and the weights that it is handed."""
    return list(inspect.signature(type(experts).forward).parameters)[2:4]


def _listen(place: int, tap: Tap, see: See) -> Iterator[Any]:
    """Put the hooks of one mixture on; their handles."""
    inner = core(tap.experts)
    output = _output(inner)
    if output is not None:
        yield hooks.add(tap.experts.register_forward_hook, _after(place, *output, see))
        return
    logits: list[Tensor] = []

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.shape[-1] == tap.num_experts:
            logits[:] = [first.reshape(-1, tap.num_experts)]

    if tap.router is not None:
        yield hooks.add(tap.router.register_forward_hook, remember)
    before = _before(place, tap, inner, logits, see)
    yield hooks.add(tap.experts.register_forward_pre_hook, before, with_kwargs=True)


def _before(place: int, tap: Tap, inner: nn.Module, logits: list[Tensor], see: See) -> Any:
    skips, names = EXPERTS.get(kind(inner), PLAIN).skips, _names(inner)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # The tokens come first by position; all families do so.
        values = [*args, *(kwargs[name] for name in names[len(args) - 1 :])]
        states, experts_TK, weights_TK = values[:3]
        if skips:
            experts_TK = experts_TK.masked_fill(weights_TK == 0, tap.num_experts - 1)
        changed = see(place, RawChoice(experts_TK, weights_TK, logits.pop() if logits else None))
        if changed is None:
            return None
        experts_TK, weights_TK = _in_range(changed, weights_TK, tap.num_experts - skips)
        rest = {name: value for name, value in kwargs.items() if name not in names}
        return (states, experts_TK, weights_TK, *values[3:]), rest

    return hook


def _after(place: int, read: routers.Read, write: routers.Write, see: See) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        router = core(module)
        experts_TK, weights_TK, logits_TE = read(router, output)
        changed = see(place, RawChoice(experts_TK, weights_TK, logits_TE))
        if changed is None:
            return None
        return write(router, output, *_in_range(changed, weights_TK, logits_TE.shape[1]))

    return hook


def _in_range(
    changed: tuple[Tensor, Tensor], like_TK: Tensor, num_experts: int
) -> tuple[Tensor, Tensor]:
    """The model's dtype; an empty place becomes an expert that counts for nothing."""
    experts_TK, weights_TK = changed
    empty_TK = experts_TK >= num_experts
    weights_TK = weights_TK.to(like_TK.dtype).masked_fill(empty_TK, 0)
    return experts_TK.masked_fill(empty_TK, 0), weights_TK
