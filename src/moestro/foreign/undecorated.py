"""Experts of transformers that do not use its interface: how they lie, and which cannot run here.

Their classes are known by name, one by one; a subclass with a forward of its own is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moestro.errors import BackendError
from moestro.foreign.classes import kind


class Undecorated(NamedTuple):
    """Where a class has its weights, by dotted names.

    Attributes:
        up: gates first, then what they multiply.
        down: of the experts that compute; there may be more of `up`, which nothing reads.
        transposed: stored as [E, I, O].
        act: its activation.
        other: what the gates multiply, where `up` is the gates alone. All three are then stored as
            [E · F, D].
        each: the name of expert {e}, where each is a module of linear maps; `up`, `down`, `act` and
            `dropout` are then names within it, and there are no gates.
        dropout: what follows the activation.
    """

    up: str = "gate_up_proj"
    down: str = "down_proj"
    transposed: bool = False
    act: str = "act_fn"
    other: str | None = None
    each: str | None = None
    dropout: str | None = None

    @property
    def weights(self) -> tuple[str, ...]:
        """Their names; those within an expert, where each is a module."""
        return tuple(name for name in (self.up, self.down, self.other) if name is not None)

    def within(self, name: str, expert: int = 0) -> str:
        """The name of an expert's own part, seen from the module of all."""
        return name if self.each is None else f"{self.each.format(e=expert)}.{name}"


READABLE: Mapping[str, Undecorated] = {
    "DbrxExperts": Undecorated("mlp.w1", "mlp.w2", act="mlp.activation_fn", other="mlp.v1"),
    "JetMoeMoE": Undecorated("input_linear.weight", "output_linear.weight", act="activation"),
    "Llama4TextExperts": Undecorated(transposed=True),
    "LongcatFlashExperts": Undecorated(),
    "Step3p7Experts": Undecorated(),
    "SwitchTransformersExperts": Undecorated(
        "wi.weight", "wo.weight", act="act", each="expert_{e}", dropout="dropout"
    ),
}
# Class → why its experts cannot run here.
UNREADABLE: Mapping[str, str] = {
    "DogeCDMoE": "each expert is two vectors of a table, found by a product of keys",
    "NllbMoeExperts": (
        "transformers takes the router's mask of zeros and ones for numbers of experts, so that "
        "its experts 0 and 1 compute every token and the others none (seen in 5.24)"
    ),
    "VitPoseNaiveMoe": "its experts are single linear maps, which the caller chooses for a batch",
}


def layout(module: nn.Module) -> Undecorated | None:
    """How the weights of such experts lie; None: the module is not one of them."""
    own = type(module).__module__.startswith("transformers.models.")
    return READABLE.get(kind(module)) if own else None


def names(module: Any) -> set[str]:
    """Those of the weights of such experts; of other modules none."""
    found = layout(module)
    if found is None:
        return set()
    count = 1 if found.each is None else module.num_experts
    return {found.within(name, expert) for name in found.weights for expert in range(count)}


def tensor(module: nn.Module, dotted: str) -> Any:
    """The weight or module of that name."""
    *way, name = dotted.split(".")
    return getattr(module.get_submodule(".".join(way)), name)


def dropout(experts: Any, found: Undecorated) -> Any:
    """What drops activated numbers now; None: nothing does."""
    if found.dropout is None:
        return None
    module = tensor(experts, found.within(found.dropout))
    return module if module.training and module.p > 0 else None


def weight(experts: Any, found: Undecorated, name: str) -> Tensor:
    """The weights of that name, of all experts in one tensor.

    Where each expert is a module this is a view once `gather` put them side by side and no gradient
    is wanted; else a copy.

    Raises:
        BackendError: see `_apart`.
    """
    if found.each is None:
        whole: Tensor = tensor(experts, name)
        return whole
    parts = _apart(experts, found, name)
    if torch.compiler.is_compiling() or _wanted(parts) or not _side_by_side(parts):
        return torch.stack(parts)
    first = parts[0].detach()
    return first.as_strided((len(parts), *first.shape), (first.numel(), *first.stride()))


def gather(experts: Any) -> None:
    """Move the weights of experts that are modules side by side, one matrix of all at a time.

    The parameters stay, with their names and values. Nothing is moved where gradients are wanted,
    under a compiler, or among several processes, whose sharding has its own idea of where they lie.
    """
    found = layout(experts)
    if found is None or found.each is None or torch.compiler.is_compiling():
        return
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return
    for name in found.weights:
        parts = _apart(experts, found, name)
        if _wanted(parts) or not _plain(parts) or _side_by_side(parts):
            continue
        with torch.inference_mode(False), torch.no_grad():
            for part, row in zip(parts, torch.stack(parts), strict=True):
                part.data = row


def _apart(experts: Any, found: Undecorated, name: str) -> list[Tensor]:
    """The weights of each expert.

    Raises:
        BackendError: one is in a module that is not a plain linear map, which may do more.
    """
    inner, _, own = name.rpartition(".")
    parts: list[Any] = []
    for expert in range(experts.num_experts):
        linear = experts
        for step in found.within(inner, expert).split("."):
            linear = linear._modules[step]  # a tenth of the time of an attribute's
        if type(linear) is not nn.Linear:
            raise BackendError(
                f"{found.within(inner, expert)} of {type(experts).__name__} is a "
                f"{type(linear).__name__}, and moestro reads the weights of nn.Linear alone: merge "
                "adapters first (model.merge_and_unload()), load the model with dequantised weights"
            )
        parts.append(linear._parameters[own])
    return parts


def _wanted(parts: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in parts)


def _plain(parts: Sequence[Tensor]) -> bool:
    """Whether they can lie in one tensor."""
    kinds = {(each.dtype, each.device, each.shape) for each in parts}
    one = len(kinds) == 1 and not parts[0].is_meta and type(parts[0]) is nn.Parameter
    return one and not any(each.is_inference() for each in parts)


def _side_by_side(parts: Sequence[Tensor]) -> bool:
    """Whether they lie in the first's memory, one after another; asked at every call."""
    first, step = parts[0], parts[0].nbytes
    memory = type(first) is nn.Parameter and not first.is_meta and step > 0
    if not memory or not first.is_contiguous():
        return False
    left = first.untyped_storage().nbytes() - first.storage_offset() * first.element_size()
    at = range(first.data_ptr(), first.data_ptr() + len(parts) * step, step)
    return left >= len(at) * step and all(
        each.data_ptr() == place for each, place in zip(parts, at, strict=True)
    )
