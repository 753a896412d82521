"""Expert non-linearities with hand-written derivatives, for kernels that own their backward.

The definition is `reference.activate`. The forward keeps the activated gate, whose exponentials are
what costs time; the backward returns the activated rows again, which the gradient of `down` needs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.errors import ShapeError
from moestro.kernels.formats import ACTIVATIONS, GATED, UNGATED
from moestro.kernels.reference import LIMITS, STEEPNESS, activate

_aten = torch.ops.aten
# How GELU is computed.
_GELUS = {"geglu": "none", "geglu_tanh": "tanh"}


def forward(hidden_RH: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """`reference.activate` without autograd.

    Returns:
        (activated [R, F], what `backward` wants kept [R, F]: the activated gate, or for the plain
        kinds the activated rows themselves).
    """
    if activation in UNGATED:
        act_RF = activate(hidden_RH, activation)
        return act_RF, act_RF
    gate_RF, up_RF = _halves(hidden_RH, activation)
    if activation == "clamped_swiglu":
        # gate · sigmoid(s · gate) is SiLU(s · gate) / s.
        gated_RF = F.silu(gate_RF * STEEPNESS).div_(STEEPNESS)
    elif activation in _GELUS:
        gated_RF = F.gelu(gate_RF, approximate=_GELUS[activation])
    else:
        gated_RF = F.silu(gate_RF)
    if activation == "capped_swiglu":
        gated_RF.clamp_(max=LIMITS[activation])
    return gated_RF * up_RF, gated_RF


def _halves(hidden_RH: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """What is activated, and what multiplies it."""
    if activation not in GATED:
        raise ShapeError(f"activations are {', '.join(ACTIVATIONS)}; given {activation!r}")
    half = hidden_RH.shape[1] // 2
    gate_RF, up_RF = hidden_RH[:, :half], hidden_RH[:, half:]
    if activation not in LIMITS:
        return gate_RF, up_RF
    limit = LIMITS[activation]
    if activation != "capped_swiglu":
        gate_RF = gate_RF.clamp(max=limit)
    up_RF = up_RF.clamp(-limit, limit)
    return gate_RF, up_RF.add_(1) if activation == "clamped_swiglu" else up_RF


def backward(
    grad_RF: Tensor, hidden_RH: Tensor, kept_RF: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Gradient through the non-linearity, and the activated rows again.

    Args:
        grad_RF: gradient of the activated rows.
        hidden_RH: what `forward` was given.
        kept_RF: what it returned second.
        activation: see `reference.activate`.
    """
    if activation == "gelu":
        return _aten.gelu_backward(grad_RF, hidden_RH), kept_RF
    if activation in UNGATED:
        slope_RF = hidden_RH > 0 if activation == "relu" else 2 * F.relu(hidden_RH)
        return grad_RF * slope_RF, kept_RF
    half = hidden_RH.shape[1] // 2
    gate_RF, up_RF = _halves(hidden_RH, activation)
    grad_RH = torch.empty_like(hidden_RH)
    grad_gate_RF, grad_up_RF = grad_RH[:, :half], grad_RH[:, half:]
    torch.mul(grad_RF, kept_RF, out=grad_up_RF)
    through_RF = grad_RF * up_RF
    if activation in _GELUS:
        _aten.gelu_backward.grad_input(
            through_RF, gate_RF, approximate=_GELUS[activation], grad_input=grad_gate_RF
        )
    else:
        steep_RF = gate_RF * STEEPNESS if activation == "clamped_swiglu" else gate_RF
        _aten.silu_backward.grad_input(through_RF, steep_RF, grad_input=grad_gate_RF)
    if activation in LIMITS:  # nothing flows back through what was cut
        limit = LIMITS[activation]
        cut_RF = F.silu(gate_RF) if activation == "capped_swiglu" else hidden_RH[:, :half]
        grad_gate_RF.masked_fill_(cut_RF > limit, 0)
        grad_up_RF.masked_fill_(hidden_RH[:, half:].abs() > limit, 0)
    # The product's memory is free again, and saves asking for more.
    return grad_RH, torch.mul(kept_RF, up_RF, out=through_RF)
