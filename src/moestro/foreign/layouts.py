"""How transformers stores the experts of a mixture, and which modules of a model are such experts.

An experts class of transformers is reachable where `use_experts_implementation` decorates it; the
decorator sets flags that say how the weights lie. Everything here reads them from the module.

Letters as in docs/shapes.md; H = 2F (gated) or F (plain), O/I out and in of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import (
    GELUActivation,
    GELUTanh,
    NewGELUActivation,
    ReLUSquaredActivation,
    SiLUActivation,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from moestro.errors import BackendError, ShapeError
from moestro.foreign import undecorated
from moestro.foreign.classes import EXPERTS, PLAIN, unaccounted
from moestro.foreign.undecorated import Undecorated
from moestro.kernels.formats import UNGATED

# Activations: their names, and those of the gates that they make.
_FUNCTIONS = ((F.silu, "silu"), (F.gelu, "gelu"), (F.relu, "relu"))
_MODULES: dict[type, str] = {
    nn.SiLU: "silu", SiLUActivation: "silu", GELUActivation: "gelu", GELUTanh: "gelu_tanh",
    NewGELUActivation: "gelu_tanh", nn.ReLU: "relu", ReLUSquaredActivation: "relu2",
}  # fmt: skip
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}


class ForeignWeights(NamedTuple):
    """The weights of an experts module, as stored or as views of them.

    Attributes:
        up_EHD: what multiplies the tokens, `gate_up` or `up`.
        down_EDF: what multiplies the hidden rows.
        up_EH: bias of the first product; None: none.
        down_ED: bias of the second.
        gated: H is 2F.
        interleaved: gate and up alternate along H; else all of the gate comes first.
        transposed: stored as [E, I, O].
        activation: see `reference.activate`; None: one that no kernel has.
        post_norm: a norm follows each expert.
        other_EFD: where the gates alone are in `up_EHD`, what they multiply.
    """

    up_EHD: Tensor
    down_EDF: Tensor
    up_EH: Tensor | None
    down_ED: Tensor | None
    gated: bool
    interleaved: bool
    transposed: bool
    activation: str | None
    post_norm: bool
    other_EFD: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Those that there are."""
        return [each for each in (*self[:4], self.other_EFD) if isinstance(each, Tensor)]

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """The same without biases, as they are stored."""
        pair = (self.up_EHD, self.down_EDF, self.other_EFD)
        found = [each for each in pair if each is not None]
        return tuple(each if each.is_contiguous() else each.transpose(1, 2) for each in found)

    def halves(self) -> tuple[Tensor, Tensor]:
        """[E, F, D], the gates and what they multiply, as views."""
        if self.other_EFD is not None:
            return self.up_EHD, self.other_EFD
        if self.interleaved:
            return self.up_EHD[:, ::2], self.up_EHD[:, 1::2]
        gates_EFD, other_EFD = self.up_EHD.chunk(2, dim=1)
        return gates_EFD, other_EFD

    def odd(self) -> str | None:
        """What the native kernels have no form for, packed or not; None: nothing."""
        if self.activation is None:
            return "an activation or gate of their own"
        return "a norm after each expert" if self.post_norm else None


def read(experts: Any) -> ForeignWeights:
    """The weights of a decorated experts module.

    Raises:
        ShapeError: they are not laid out as the module's flags say.
    """
    found = undecorated.layout(experts)
    if found is not None:
        return _undecorated(experts, found)
    gated, transposed = bool(experts.has_gate), bool(experts.is_transposed)
    name = "gate_up_proj" if gated else "up_proj"
    try:
        up, down = getattr(experts, name), experts.down_proj
        up_EH = getattr(experts, f"{name}_bias") if experts.has_bias else None
        down_ED = experts.down_proj_bias if experts.has_bias else None
    except AttributeError as error:
        raise _unknown(experts, str(error)) from error
    if up.dim() != 3 or down.dim() != 3:
        raise _unknown(experts, f"weights {list(up.shape)} and {list(down.shape)}")
    if transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    num_experts, dim, hidden = down.shape
    if up.shape != (num_experts, 2 * hidden if gated else hidden, dim):
        raise _unknown(experts, f"weights {list(up.shape)} and {list(down.shape)}")
    if not up.is_floating_point() or not down.is_floating_point():
        raise _unknown(experts, f"weights of {up.dtype}")
    interleaved = gated and not getattr(experts, "is_concatenated", True)
    post_norm = bool(getattr(experts, "has_post_expert_norm", False))
    return ForeignWeights(
        up, down, up_EH, down_ED, gated, interleaved, transposed, _activation(experts), post_norm
    )


def _undecorated(experts: Any, found: Undecorated) -> ForeignWeights:
    name = _activation_name(undecorated.tensor(experts, found.within(found.act)))
    if found.each is not None:
        up, down = (undecorated.weight(experts, found, each) for each in found.weights)
        plain = name in UNGATED and undecorated.dropout(experts, found) is None
        act = name if plain else None
        return ForeignWeights(up, down, None, None, False, False, False, act, False)
    if found.other is not None:
        flat = (undecorated.tensor(experts, each) for each in found.weights)
        gates, down, other = (each.unflatten(0, (experts.num_experts, -1)) for each in flat)
        act = _GATED.get(name)
        down = down.transpose(1, 2)
        return ForeignWeights(gates, down, None, None, True, False, False, act, False, other)
    up, down = (undecorated.tensor(experts, name) for name in found[:2])
    up, down = (x.transpose(1, 2) for x in (up, down)) if found.transposed else (up, down)
    clamped = math.isfinite(getattr(experts, "limit", math.inf))
    activation = _own_gate(experts) if clamped else _GATED.get(name)
    return ForeignWeights(
        up[: len(down)], down, None, None, True, False, found.transposed, activation, False
    )


def find(model: nn.Module) -> dict[str, nn.Module]:
    """The experts modules of a model, by name.

    Raises:
        BackendError: there are none, or some that cannot be reached; names their class.
    """
    refuse_unreachable(model)
    found = dict(reachable(model))
    if not found:
        raise BackendError(f"{type(model).__name__} has no mixture of experts: nothing to speed up")
    return found


def reachable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Experts modules that are decorated, or known without, and their names."""
    for name, module in model.named_modules():
        known = undecorated.layout(module) is not None
        if known or _interface(module) is ALL_EXPERTS_FUNCTIONS:
            yield name, module


def refuse_unreachable(model: nn.Module) -> None:
    """Refuse a model with a mixture that would run other code.

    Raises:
        BackendError: names the class and what to do.
    """
    modules = dict(model.named_modules())
    interfaces = {name: _interface(module) for name, module in modules.items()}
    decorated = [name for name, each in interfaces.items() if each is not None]
    for name in decorated:
        if interfaces[name] is not ALL_EXPERTS_FUNCTIONS:
            raise BackendError(
                f"{type(modules[name]).__name__} takes its kernels from a registry of its own (FP8 "
                "weights), which moestro does not reach; load the model with dequantised weights"
            )
    known = [name for name, each in modules.items() if undecorated.layout(each) is not None]
    others = unaccounted(modules, [*decorated, *known], beside=False)
    for other in others:
        if other in undecorated.UNREADABLE:
            raise BackendError(
                f"{other} cannot run on moestro: {undecorated.UNREADABLE[other]}. Use "
                'experts_implementation="eager" for this model'
            )
    if others:
        raise BackendError(
            f"{', '.join(others)} do not use transformers' experts interface: their experts would "
            "run their own code whatever the name asked for. Use "
            'experts_implementation="eager" for this model'
        )


def _interface(module: nn.Module) -> object | None:
    """The registry that a decorated class looks its function up in; None: not decorated."""
    function: Any = type(module).forward
    while function is not None:
        cells = getattr(function, "__closure__", None) or ()
        names = function.__code__.co_freevars if cells else ()
        for name, cell in zip(names, cells, strict=True):
            if name == "experts_interface":
                found: object = cell.cell_contents
                return found
        function = getattr(function, "__wrapped__", None)
    return None


def _activation(experts: Any) -> str | None:
    if not experts.has_gate:
        name = _activation_name(experts.act_fn)
        return name if name in UNGATED else None
    if "_apply_gate" in vars(experts):
        return None
    if type(experts)._apply_gate is _default_apply_gate:
        return _GATED.get(_activation_name(experts.act_fn))
    return _own_gate(experts)


def _own_gate(experts: Any) -> str | None:
    """The name of the gate that a class brings; None: it has none."""
    gate: str | None
    gate, needs = _traits_of_gate(type(experts))
    for name, wanted in needs:
        value = getattr(experts, name, None)
        if (_activation_name(value) if name == "act_fn" else value) != wanted:
            return None
    return gate


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch gives it no types
def _traits_of_gate(kind: Any) -> tuple[str | None, tuple[tuple[str, object], ...]]:
    """A class's gate and what it needs; the compiler asks once."""
    gate = kind._apply_gate
    if not gate.__module__.startswith("transformers.models."):
        return None, ()
    traits = EXPERTS.get(gate.__qualname__.split(".")[0], PLAIN)
    return traits.gate, traits.needs


def _activation_name(act_fn: object) -> str:
    """silu, gelu (the exact one), gelu_tanh, relu, relu2, or nothing for any other."""
    for function, name in _FUNCTIONS:
        if act_fn is function:
            return name
    if type(act_fn) is nn.GELU:
        return "gelu" if act_fn.approximate == "none" else "gelu_tanh"
    return _MODULES.get(type(act_fn), "")


def _unknown(experts: nn.Module, what: str) -> ShapeError:
    return ShapeError(
        f"{type(experts).__name__} stores its experts in a form that is not known ({what}); "
        'use experts_implementation="eager" for this model'
    )
