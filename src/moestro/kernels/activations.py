"""Expert non-linearities with hand-written derivatives, for kernels that own their backward.

The definition is `reference.activate`. The forward keeps the activated gate, whose exponentials are
what costs time; the backward returns the activated rows again, which the gradient of `down` needs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.kernels.reference import CLAMP, STEEPNESS

_aten = torch.ops.aten


def forward(hidden_RH: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """`reference.activate` without autograd.

    Returns:
        (activated [R, F], what `backward` wants kept [R, F]: the activated gate, or for the plain
        kinds the activated rows themselves).
    """
    if activation in ("relu", "gelu"):
        act_RF = F.relu(hidden_RH) if activation == "relu" else F.gelu(hidden_RH)
        return act_RF, act_RF
    gate_RF, up_RF = _halves(hidden_RH, activation)
    if activation == "clamped_swiglu":
        # gate · sigmoid(s · gate) is SiLU(s · gate) / s.
        gated_RF = F.silu(gate_RF * STEEPNESS).div_(STEEPNESS)
    else:
        gated_RF = F.silu(gate_RF) if activation == "swiglu" else F.gelu(gate_RF)
    return gated_RF * up_RF, gated_RF


def _halves(hidden_RH: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """What is activated, and what multiplies it."""
    half = hidden_RH.shape[1] // 2
    gate_RF, up_RF = hidden_RH[:, :half], hidden_RH[:, half:]
    if activation == "clamped_swiglu":
        return gate_RF.clamp(max=CLAMP), up_RF.clamp(-CLAMP, CLAMP).add_(1)
    return gate_RF, up_RF


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
    if activation == "relu":
        return grad_RF * (hidden_RH > 0), kept_RF
    if activation == "gelu":
        return _aten.gelu_backward(grad_RF, hidden_RH), kept_RF
    half = hidden_RH.shape[1] // 2
    gate_RF, up_RF = _halves(hidden_RH, activation)
    grad_RH = torch.empty_like(hidden_RH)
    grad_gate_RF, grad_up_RF = grad_RH[:, :half], grad_RH[:, half:]
    torch.mul(grad_RF, kept_RF, out=grad_up_RF)
    through_RF = grad_RF * up_RF
    if activation == "geglu":
        _aten.gelu_backward.grad_input(through_RF, gate_RF, grad_input=grad_gate_RF)
    else:
        steep_RF = gate_RF if activation == "swiglu" else gate_RF * STEEPNESS
        _aten.silu_backward.grad_input(through_RF, steep_RF, grad_input=grad_gate_RF)
    if activation == "clamped_swiglu":  # nothing flows back through what was cut
        grad_gate_RF.masked_fill_(hidden_RH[:, :half] > CLAMP, 0)
        grad_up_RF.masked_fill_(hidden_RH[:, half:].abs() > CLAMP, 0)
    # The product's memory is free again, and saves asking for more.
    return grad_RH, torch.mul(kept_RF, up_RF, out=through_RF)
