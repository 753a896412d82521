"""The definition of every op, in the most obvious PyTorch; every fast path is tested against it.

Letters: R rows grouped by expert, E experts, D width, F hidden width, H = 2F (gated) or F (plain),
O/I out and in of a matrix, T tokens, B batch, S sequence, A width of one attention head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.errors import ShapeError
from moestro.kernels.formats import ACTIVATIONS, UNGATED
from moestro.kernels.formats import GATED as GATED

# Where gates and what they multiply are cut, and how steep the sigmoid of clamped_swiglu is.
LIMITS = {"clamped_swiglu": 7.0, "limited_swiglu": 10.0, "capped_swiglu": 7.0}
STEEPNESS = 1.702


# The name of a non-linearity, or a function in its place: hidden rows → activated rows.
Activation = str | Callable[[Tensor], Tensor]


class Biases(NamedTuple):
    """What each expert adds after its two products; cast to the rows' dtype."""

    up_EH: Tensor
    down_ED: Tensor


def activate(hidden_RH: Tensor, activation: Activation) -> Tensor:
    """Apply an expert's non-linearity.

    Args:
        hidden_RH: [R, 2F] for the gated kinds, gate columns first, then up; [R, F] for the plain.
        activation: swiglu (SiLU(gate) · up), geglu (GELU(gate) · up), relu, gelu.
            Gated: Shazeer 2020, "GLU Variants Improve Transformer". GELU is the exact one, and
            that of geglu_tanh its approximation by tanh; relu2 is the square of relu.
            clamped_swiglu: gate · sigmoid(1.702 · gate) · (up + 1) of a gate cut above 7 and an
            up cut at ±7 (gpt-oss 2025, its reference code). limited_swiglu: swiglu of a gate cut
            above 10 and an up cut at ±10 (DeepSeek-V4). capped_swiglu: with SiLU(gate) cut above 7
            and up at ±7 (Step 3.5). A function stands for itself.

    Returns:
        [R, F].
    """
    if callable(activation):
        return activation(hidden_RH)
    if activation in GATED:
        gate_RF, up_RF = hidden_RH.chunk(2, dim=-1)
        if activation in LIMITS:
            return _cut(gate_RF, up_RF, activation, LIMITS[activation])
        if activation == "swiglu":
            return F.silu(gate_RF) * up_RF
        return F.gelu(gate_RF, approximate="none" if activation == "geglu" else "tanh") * up_RF
    if activation == "gelu":
        return F.gelu(hidden_RH)
    if activation not in UNGATED:
        raise ShapeError(f"activations are {', '.join(ACTIVATIONS)}; given {activation!r}")
    return F.relu(hidden_RH) if activation == "relu" else F.relu(hidden_RH).square()


def _cut(gate_RF: Tensor, up_RF: Tensor, activation: str, limit: float) -> Tensor:
    # Not clamp, whose gradient at the cut itself differs between releases of torch.
    up_RF = torch.where(up_RF.abs() > limit, up_RF.sign() * limit, up_RF)
    if activation == "capped_swiglu":
        act_RF = F.silu(gate_RF)
        return torch.where(act_RF > limit, limit, act_RF) * up_RF
    gate_RF = torch.where(gate_RF > limit, limit, gate_RF)
    if activation == "limited_swiglu":
        return F.silu(gate_RF) * up_RF
    return gate_RF * torch.sigmoid(STEEPNESS * gate_RF) * (up_RF + 1)


def grouped_mm(
    x_RI: Tensor,
    w_EOI: Tensor,
    offsets_E: Tensor,
    experts_E: Tensor | None = None,
    bias_EO: Tensor | None = None,
) -> Tensor:
    """Multiply each row by its expert's matrix: `y[r] = w[e] @ x[r] + b[e]`, r in the group of e.

    Args:
        x_RI: rows, grouped by expert; their dtype is the one computed in.
        w_EOI: one matrix per expert; cast to the rows' dtype.
        offsets_E: int64, end of each group (group g is offsets[g-1] to offsets[g]).
        experts_E: int64, expert of each group; None: group e is expert e's.
        bias_EO: what each expert adds; cast to the rows' dtype. None: nothing.

    Returns:
        y_RO in the rows' dtype; rows past the last offset are zero and never read.
    """
    y_RO = []
    start = 0
    order = range(len(offsets_E)) if experts_E is None else experts_E.tolist()
    for expert, end in zip(order, offsets_E.tolist(), strict=True):
        w_OI = w_EOI[expert].to(x_RI.dtype)
        b_O = 0 if bias_EO is None else bias_EO[expert].to(x_RI.dtype)
        y_RO += [w_OI @ x_RI[row] + b_O for row in range(start, end)]
        start = end
    # Sums of nothing: without a row the gradients are zero instead of missing.
    zero = x_RI[:0].sum() + w_EOI[:0].sum().to(x_RI.dtype)
    if bias_EO is not None:
        zero = zero + bias_EO[:0].sum().to(x_RI.dtype)
    tail_RO = x_RI.new_zeros(x_RI.shape[0] - start, w_EOI.shape[1]) + zero
    return torch.cat([torch.stack(y_RO), tail_RO]) if y_RO else tail_RO


def expert_ffn(
    x_RD: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    offsets_E: Tensor,
    activation: str,
    experts_E: Tensor | None = None,
    biases: Biases | None = None,
) -> Tensor:
    """The feed-forward network of each row's expert: `down[e] @ act(up[e] @ x)`, with its biases.

    Args:
        x_RD: rows, grouped by expert.
        up_EHD: `gate_up [E, 2F, D]` of gated experts (gate rows first), `up [E, F, D]` of plain.
        down_EDF: down projections.
        offsets_E: int64, end of each group.
        activation: see `activate`.
        experts_E: int64, expert of each group; None: group e is expert e's.
        biases: of the experts that have them.

    Returns:
        y_RD in the rows' dtype; rows past the last offset are zero and never read.
    """
    up_EH, down_ED = biases or (None, None)
    hidden_RH = grouped_mm(x_RD, up_EHD, offsets_E, experts_E, up_EH)
    return grouped_mm(activate(hidden_RH, activation), down_EDF, offsets_E, experts_E, down_ED)


def mixture(
    x_TD: Tensor,
    tokens_R: Tensor,
    experts_R: Tensor,
    weights_R: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    activation: Activation,
    biases: Biases | None = None,
    kept_R: Tensor | None = None,
) -> Tensor:
    """The whole mixture, one assignment at a time: what dispatch, experts and combine must equal.

    No step asks for a value, so that gradients of any order and `torch.func` pass through.

    Args:
        x_TD: tokens.
        tokens_R: int64, token of each assignment.
        experts_R: int64, its expert.
        weights_R: fp32, its weight.
        up_EHD: see `expert_ffn`.
        down_EDF: see there.
        activation: see there.
        biases: the down bias is part of an expert's output, so the weight multiplies it too.
        kept_R: bool, False for an assignment that takes no part; None: all do.

    Returns:
        y_TD in the tokens' dtype, summed in at least fp32.
    """
    sum_dtype = torch.promote_types(x_TD.dtype, torch.float32)
    x_RD = x_TD.to(sum_dtype)[tokens_R].to(x_TD.dtype)
    if kept_R is not None:
        x_RD = x_RD.masked_fill(~kept_R[:, None], 0)

    def linear(x_1I: Tensor, expert_1: Tensor, w_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
        # A sum of one matrix, or of no matrix without an assignment: then gradients are zero.
        y_1O = F.linear(x_1I, w_EOI[expert_1].to(x_1I.dtype).sum(0))
        return y_1O if bias_EO is None else y_1O + bias_EO[expert_1].to(x_1I.dtype)

    up_EH, down_ED = biases or (None, None)
    out_RD = []
    for x_1D, expert_1 in zip(x_RD.split(1), experts_R.split(1), strict=True):
        act_1F = activate(linear(x_1D, expert_1, up_EHD, up_EH), activation)
        out_RD.append(linear(act_1F, expert_1, down_EDF, down_ED).to(sum_dtype))
    weighted_RD = weights_R[:, None] * torch.cat(out_RD)
    if kept_R is not None:
        weighted_RD = weighted_RD.masked_fill(~kept_R[:, None], 0)
    zeros_TD = torch.zeros_like(x_TD, dtype=sum_dtype)
    return zeros_TD.index_add(0, tokens_R, weighted_RD).to(x_TD.dtype)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Divide by the root mean square of the last dimension (Zhang and Sennrich 2019, eq. 4).

    x / sqrt(mean(x²) + eps) · weight, in at least fp32, then cast to `dtype`.
    """
    x32_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    mean_square_T1 = x32_TD.square().mean(-1, keepdim=True)
    return (x32_TD / torch.sqrt(mean_square_T1 + eps) * weight_D).to(dtype)


def rotate(x_BSHA: Tensor, cos_SA: Tensor, sin_SA: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, §3.2): each pair (i, i + A/2) of a head by its angle.

    x is queries or keys, computed in its dtype; cosines and sines are [S, A/2], of each position,
    or [B, S, A/2] where each sequence has positions of its own.
    """
    cos_S1A, sin_S1A = (each.unsqueeze(-2).to(x_BSHA.dtype) for each in (cos_SA, sin_SA))
    first, second = x_BSHA.chunk(2, dim=-1)
    return torch.cat(
        [first * cos_S1A - second * sin_S1A, second * cos_S1A + first * sin_S1A], dim=-1
    )


def fp32_linear(x_TI: Tensor, w_OI: Tensor) -> Tensor:
    """Multiply x · wᵀ in fp32 (fp64 where x is), whatever the dtypes: a router's product."""
    dtype = torch.promote_types(x_TI.dtype, torch.float32)
    return F.linear(x_TI.to(dtype), w_OI.to(dtype))
