"""The fast paths in plain torch: one GEMM per run of hit experts, or torch's own grouped_mm.

Own autograd, so that: weights stay in their dtype while rows decide the dtype computed in, weight
gradients are written once (a zero-token expert gets zeros), the gated hidden rows are the only
large tensor kept, and gradients of any stride are accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moestro.kernels import activations

# Each takes contiguous rows grouped by expert; `Forward` casts the weights to the rows' dtype.
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
WeightGrad = Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]


# Experts of one batched product: powers of two, so that few distinct shapes come up.
LENGTHS = (8, 4, 2, 1)


class Run(NamedTuple):
    """Neighbouring experts with equally many rows: one batched product serves them all."""

    experts: slice
    rows: slice
    num_experts: int


def runs(offsets_E: Tensor) -> list[Run]:
    """Cut the experts that have rows into runs of equal groups, each as long as `LENGTHS` has."""
    ends = offsets_E.tolist()
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    found: list[Run] = []
    expert = row = 0
    while expert < len(sizes):
        size = sizes[expert]
        length = next(n for n in LENGTHS if sizes[expert : expert + n] == [size] * n)
        if size:
            experts, rows = slice(expert, expert + length), slice(row, row + length * size)
            found.append(Run(experts, rows, length))
        expert, row = expert + length, row + length * size
    return found


def segments_mm(x_RI: Tensor, w_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    """`reference.grouped_mm` without autograd: one GEMM per run. Leaves tail rows unset.

    A batched GEMM gives each thread matrices of its own, where a single one makes all threads
    pack the same weights; in bf16 on two cores that is twice as fast.
    """
    y_RO = x_RI.new_empty(x_RI.shape[0], w_EOI.shape[1])
    for run in runs(offsets_E):
        w_NIO = w_EOI[run.experts].to(x_RI.dtype).transpose(1, 2)
        x_NRI = x_RI[run.rows].view(run.num_experts, -1, x_RI.shape[1])
        torch.bmm(x_NRI, w_NIO, out=y_RO[run.rows].view(run.num_experts, -1, y_RO.shape[1]))
    return y_RO


def segments_weight_grad(
    grad_RO: Tensor, x_RI: Tensor, offsets_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """`grad_w[e] = grad[rows of e].T @ x[rows of e]`, [E, O, I] in `dtype`; zeros where no rows."""
    grad_EOI = torch.empty(
        len(offsets_E), grad_RO.shape[1], x_RI.shape[1], dtype=dtype, device=x_RI.device
    )
    done = 0
    for run in runs(offsets_E):
        grad_EOI[done : run.experts.start].zero_()
        done = run.experts.stop
        grad_NOR = grad_RO[run.rows].view(run.num_experts, -1, grad_RO.shape[1]).transpose(1, 2)
        x_NRI = x_RI[run.rows].view(run.num_experts, -1, x_RI.shape[1])
        if dtype == x_RI.dtype:
            torch.bmm(grad_NOR, x_NRI, out=grad_EOI[run.experts])
        else:
            grad_EOI[run.experts].copy_(torch.bmm(grad_NOR, x_NRI))
    grad_EOI[done:].zero_()
    return grad_EOI


def torch_mm(x_RI: Tensor, w_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    """`reference.grouped_mm` by torch's own op, without autograd. Leaves tail rows unset."""
    w_EIO = w_EOI.to(x_RI.dtype).transpose(1, 2)
    return F.grouped_mm(x_RI, w_EIO, offs=offsets_E.to(torch.int32))


def torch_weight_grad(
    grad_RO: Tensor, x_RI: Tensor, offsets_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """`segments_weight_grad` by torch's own op.

    The result of a group without rows is written over with zeros: some builds leave it unset.
    """
    offs = offsets_E.to(torch.int32)
    grad_EOI = F.grouped_mm(grad_RO.t(), x_RI, offs=offs)
    counts_E = torch.diff(offs, prepend=offs.new_zeros(1))
    return grad_EOI.masked_fill_((counts_E == 0)[:, None, None], 0).to(dtype)


def _clear_tail(y_RO: Tensor, offsets_E: Tensor) -> Tensor:
    """Zero the rows past the last offset; on a GPU without reading the offset back."""
    if y_RO.device.type == "cpu":
        y_RO[int(offsets_E[-1]) :].zero_()
        return y_RO
    rows_R = torch.arange(y_RO.shape[0], device=y_RO.device)
    return y_RO.masked_fill_((rows_R >= offsets_E[-1])[:, None], 0)


class _GroupedMM(torch.autograd.Function):
    """One grouped matrix product with its gradients."""

    @staticmethod
    def forward(
        ctx: Any, x_RI: Tensor, w_EOI: Tensor, offsets_E: Tensor, mm: Forward, wgrad: WeightGrad
    ) -> Tensor:
        ctx.save_for_backward(x_RI, w_EOI, offsets_E)
        ctx.mm, ctx.wgrad = mm, wgrad
        return _clear_tail(mm(x_RI.contiguous(), w_EOI, offsets_E), offsets_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, ...]:
        x_RI, w_EOI, offsets_E = ctx.saved_tensors
        grad_RO = grad_RO.contiguous()
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = _clear_tail(ctx.mm(grad_RO, w_EOI.transpose(1, 2), offsets_E), offsets_E)
        if ctx.needs_input_grad[1]:
            grad_w = ctx.wgrad(grad_RO, x_RI.contiguous(), offsets_E, w_EOI.dtype)
        return grad_x, grad_w, None, None, None


class _ExpertFFN(torch.autograd.Function):
    """up → activation → down, keeping only the rows and the hidden rows for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        up_EHD: Tensor,
        down_EDF: Tensor,
        offsets_E: Tensor,
        activation: str,
        mm: Forward,
        wgrad: WeightGrad,
    ) -> Tensor:
        x_RD = x_RD.contiguous()
        hidden_RH = mm(x_RD, up_EHD, offsets_E)
        act_RF = activations.forward(hidden_RH, activation)
        ctx.save_for_backward(x_RD, up_EHD, down_EDF, offsets_E, hidden_RH)
        ctx.activation, ctx.mm, ctx.wgrad = activation, mm, wgrad
        return _clear_tail(mm(act_RF, down_EDF, offsets_E), offsets_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, up_EHD, down_EDF, offsets_E, hidden_RH = ctx.saved_tensors
        mm, wgrad = ctx.mm, ctx.wgrad
        grad_RD = grad_RD.contiguous()
        grad_act_RF = mm(grad_RD, down_EDF.transpose(1, 2), offsets_E)
        grad_hidden_RH, act_RF = activations.backward(grad_act_RF, hidden_RH, ctx.activation)
        grad_x = grad_up = grad_down = None
        if ctx.needs_input_grad[2]:
            grad_down = wgrad(grad_RD, act_RF, offsets_E, down_EDF.dtype)
        if ctx.needs_input_grad[1]:
            grad_up = wgrad(grad_hidden_RH, x_RD, offsets_E, up_EHD.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = mm(grad_hidden_RH, up_EHD.transpose(1, 2), offsets_E)
            _clear_tail(grad_x, offsets_E)
        return grad_x, grad_up, grad_down, None, None, None, None


def segments_grouped_mm(x_RI: Tensor, w_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    """`reference.grouped_mm`, one GEMM per run of hit experts."""
    y_RO: Tensor = _GroupedMM.apply(x_RI, w_EOI, offsets_E, segments_mm, segments_weight_grad)
    return y_RO


def segments_expert_ffn(
    x_RD: Tensor, up_EHD: Tensor, down_EDF: Tensor, offsets_E: Tensor, activation: str
) -> Tensor:
    """`reference.expert_ffn`, one GEMM per run of hit experts."""
    y_RD: Tensor = _ExpertFFN.apply(
        x_RD, up_EHD, down_EDF, offsets_E, activation, segments_mm, segments_weight_grad
    )
    return y_RD


def torch_grouped_mm(x_RI: Tensor, w_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    """`reference.grouped_mm` by `torch.nn.functional.grouped_mm`."""
    y_RO: Tensor = _GroupedMM.apply(x_RI, w_EOI, offsets_E, torch_mm, torch_weight_grad)
    return y_RO


def torch_expert_ffn(
    x_RD: Tensor, up_EHD: Tensor, down_EDF: Tensor, offsets_E: Tensor, activation: str
) -> Tensor:
    """`reference.expert_ffn` by `torch.nn.functional.grouped_mm`."""
    y_RD: Tensor = _ExpertFFN.apply(
        x_RD, up_EHD, down_EDF, offsets_E, activation, torch_mm, torch_weight_grad
    )
    return y_RD
