"""Experts of transformers that do not use its interface: how they lie, and which cannot run here.

Their classes are known by name, one by one; a subclass with a forward of its own is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

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
    """

    up: str = "gate_up_proj"
    down: str = "down_proj"
    transposed: bool = False
    act: str = "act_fn"
    other: str | None = None

    @property
    def weights(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(name for name in (self.up, self.down, self.other) if name is not None)


READABLE: Mapping[str, Undecorated] = {
    "DbrxExperts": Undecorated("mlp.w1", "mlp.w2", act="mlp.activation_fn", other="mlp.v1"),
    "JetMoeMoE": Undecorated("input_linear.weight", "output_linear.weight", act="activation"),
    "Llama4TextExperts": Undecorated(transposed=True),
    "LongcatFlashExperts": Undecorated(),
    "Step3p7Experts": Undecorated(),
}
_OF_THEIR_OWN = (
    "each expert is a module with matrices of its own, and the kernels take those of all experts "
    "in one tensor"
)
# Class → why its experts cannot run here.
UNREADABLE: Mapping[str, str] = {
    "NllbMoeExperts": _OF_THEIR_OWN,
    "SwitchTransformersExperts": _OF_THEIR_OWN,
}


def layout(module: nn.Module) -> Undecorated | None:
    """How the weights of such experts lie; None: the module is not one of them."""
    own = type(module).__module__.startswith("transformers.models.")
    return READABLE.get(kind(module)) if own else None


def tensor(module: nn.Module, dotted: str) -> Any:
    """The weight or module of that name."""
    *way, name = dotted.split(".")
    return getattr(module.get_submodule(".".join(way)), name)
