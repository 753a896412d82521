"""Expert non-linearities with hand-written derivatives, for kernels that own their backward.

The definition is `reference.activate`; here the forward writes as few tensors as it can, and the
backward returns the activated rows again, since the weight gradient of `down` needs them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_aten = torch.ops.aten


def forward(hidden_RH: Tensor, activation: str) -> Tensor:
    """`reference.activate` without autograd. Returns [R, F]."""
    if activation == "swiglu":
        gate_RF, up_RF = hidden_RH.chunk(2, dim=-1)
        return F.silu(gate_RF).mul_(up_RF)
    if activation == "geglu":
        gate_RF, up_RF = hidden_RH.chunk(2, dim=-1)
        return F.gelu(gate_RF).mul_(up_RF)
    return F.relu(hidden_RH) if activation == "relu" else F.gelu(hidden_RH)


def backward(grad_RF: Tensor, hidden_RH: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradient through the non-linearity, and the activated rows recomputed.

    Args:
        grad_RF: gradient of the activated rows.
        hidden_RH: what `forward` was given.
        activation: see `reference.activate`.

    Returns:
        (grad of hidden_RH, activated [R, F]).
    """
    if activation == "relu":
        return grad_RF * (hidden_RH > 0), F.relu(hidden_RH)
    if activation == "gelu":
        return _aten.gelu_backward(grad_RF, hidden_RH), F.gelu(hidden_RH)
    half = hidden_RH.shape[1] // 2
    gate_RF, up_RF = hidden_RH[:, :half], hidden_RH[:, half:]
    grad_RH = torch.empty_like(hidden_RH)
    grad_gate_RF, grad_up_RF = grad_RH[:, :half], grad_RH[:, half:]
    act_RF = F.silu(gate_RF) if activation == "swiglu" else F.gelu(gate_RF)
    torch.mul(grad_RF, act_RF, out=grad_up_RF)
    act_RF.mul_(up_RF)
    through_RF = grad_RF * up_RF
    if activation == "swiglu":
        _aten.silu_backward.grad_input(through_RF, gate_RF, grad_input=grad_gate_RF)
    else:
        _aten.gelu_backward.grad_input(through_RF, gate_RF, grad_input=grad_gate_RF)
    return grad_RH, act_RF
