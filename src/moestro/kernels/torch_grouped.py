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

# Experts of one batched product: few lengths, since each is a shape to compile a kernel for.
LENGTHS = (4, 1)


class Groups(NamedTuple):
    """The end of each group of rows, and whose it is (None: group e is expert e's)."""

    offsets_E: Tensor
    experts_E: Tensor | None


class Run(NamedTuple):
    """Groups of equal size, side by side: one batched product serves all their experts."""

    experts: list[int]
    rows: slice


class Products(NamedTuple):
    """The two products that everything here is made of, neither with autograd.

    Attributes:
        mm: (rows [R, I], weights [E, O, I], groups, back) → [R, O], or with `back` from [R, O] to
            [R, I]. Casts the weights to the rows' dtype. Rows past the last group are left unset.
        weight_grad: (grad [R, O], rows [R, I], groups, dtype) → [E, O, I] in `dtype`.
    """

    mm: Callable[[Tensor, Tensor, Groups, bool], Tensor]
    weight_grad: Callable[[Tensor, Tensor, Groups, torch.dtype], Tensor]

    def grouped_mm(
        self, x_RI: Tensor, w_EOI: Tensor, offsets_E: Tensor, experts_E: Tensor | None = None
    ) -> Tensor:
        """`reference.grouped_mm` by these products."""
        y_RO: Tensor = _GroupedMM.apply(x_RI, w_EOI, Groups(offsets_E, experts_E), self)
        return y_RO

    def expert_ffn(
        self,
        x_RD: Tensor,
        up_EHD: Tensor,
        down_EDF: Tensor,
        offsets_E: Tensor,
        activation: str,
        experts_E: Tensor | None = None,
    ) -> Tensor:
        """`reference.expert_ffn` by these products."""
        groups = Groups(offsets_E, experts_E)
        y_RD: Tensor = _ExpertFFN.apply(x_RD, up_EHD, down_EDF, activation, groups, self)
        return y_RD


def runs(groups: Groups) -> list[Run]:
    """Cut the groups that have rows into runs of equal size, each as long as `LENGTHS` has."""
    ends = groups.offsets_E.tolist()
    order = range(len(ends)) if groups.experts_E is None else groups.experts_E.tolist()
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    found: list[Run] = []
    at = row = 0
    while at < len(sizes):
        size = sizes[at]
        length = next(n for n in LENGTHS if sizes[at : at + n] == [size] * n)
        if size:
            found.append(Run(list(order[at : at + length]), slice(row, row + length * size)))
        at, row = at + length, row + length * size
    return found


def _take(w_EOI: Tensor, experts: list[int], dtype: torch.dtype) -> Tensor:
    """The weights of some experts in `dtype`, without a copy where they lie as they are needed."""
    first = experts[0]
    if experts == list(range(first, first + len(experts))):
        return w_EOI[first : first + len(experts)].to(dtype)
    w_NOI = w_EOI.new_empty(len(experts), *w_EOI.shape[1:], dtype=dtype)
    for place, expert in enumerate(experts):
        w_NOI[place].copy_(w_EOI[expert])
    return w_NOI


def segments_mm(x_RI: Tensor, w_EOI: Tensor, groups: Groups, back: bool) -> Tensor:
    """One product per run; see `Products.mm`.

    A batched product gives each thread matrices of its own, where a single one makes all threads
    pack the same weights; in 16 bits on two cores that is twice as fast. Alone, a plain product
    beats a batch of one.
    """
    y_RO = x_RI.new_empty(x_RI.shape[0], w_EOI.shape[2 if back else 1])
    for run in runs(groups):
        w_NIO = _take(w_EOI, run.experts, x_RI.dtype)
        if not back:
            w_NIO = w_NIO.transpose(1, 2)
        x_PI, y_PO, count = x_RI[run.rows], y_RO[run.rows], len(run.experts)
        if count == 1:
            torch.mm(x_PI, w_NIO[0], out=y_PO)
        else:
            x_NPI, y_NPO = (z.view(count, -1, z.shape[1]) for z in (x_PI, y_PO))
            torch.bmm(x_NPI, w_NIO, out=y_NPO)
    return y_RO


def segments_weight_grad(
    grad_RO: Tensor, x_RI: Tensor, groups: Groups, dtype: torch.dtype
) -> Tensor:
    """`grad_w[e] = grad[rows of e].T @ x[rows of e]`; zeros where an expert has no rows."""
    num_experts = len(groups.offsets_E)
    grad_EOI = x_RI.new_empty(num_experts, grad_RO.shape[1], x_RI.shape[1], dtype=dtype)
    idle = set(range(num_experts))
    for run in runs(groups):
        idle -= set(run.experts)
        count = len(run.experts)
        grad_NPO, x_NPI = (z[run.rows].view(count, -1, z.shape[1]) for z in (grad_RO, x_RI))
        if count == 1:
            grad_NOI = torch.mm(grad_NPO[0].t(), x_NPI[0])[None]
        else:
            grad_NOI = torch.bmm(grad_NPO.transpose(1, 2), x_NPI)
        for place, expert in enumerate(run.experts):
            grad_EOI[expert].copy_(grad_NOI[place])
    for expert in idle:
        grad_EOI[expert].zero_()
    return grad_EOI


def torch_mm(x_RI: Tensor, w_EOI: Tensor, groups: Groups, back: bool) -> Tensor:
    """`torch.nn.functional.grouped_mm`; see `Products.mm`."""
    if groups.experts_E is not None:
        w_EOI = w_EOI[groups.experts_E]
    w_EIO = w_EOI.to(x_RI.dtype)
    offs = groups.offsets_E.to(torch.int32)
    return F.grouped_mm(x_RI, w_EIO if back else w_EIO.transpose(1, 2), offs=offs)


def torch_weight_grad(grad_RO: Tensor, x_RI: Tensor, groups: Groups, dtype: torch.dtype) -> Tensor:
    """`segments_weight_grad` by torch's own op.

    The result of a group without rows is written over with zeros: some builds leave it unset.
    """
    offs = groups.offsets_E.to(torch.int32)
    grad_EOI = F.grouped_mm(grad_RO.t(), x_RI, offs=offs)
    counts_E = torch.diff(offs, prepend=offs.new_zeros(1))
    grad_EOI = grad_EOI.masked_fill_((counts_E == 0)[:, None, None], 0).to(dtype)
    if groups.experts_E is None:
        return grad_EOI
    return torch.empty_like(grad_EOI).index_copy_(0, groups.experts_E, grad_EOI)


# One product per run of hit experts; `torch.nn.functional.grouped_mm`.
SEGMENTS = Products(segments_mm, segments_weight_grad)
TORCH = Products(torch_mm, torch_weight_grad)


def _clear_tail(y_RO: Tensor, groups: Groups) -> Tensor:
    """Zero the rows past the last offset; on a GPU without reading the offset back."""
    if y_RO.device.type == "cpu":
        y_RO[int(groups.offsets_E[-1]) :].zero_()
        return y_RO
    rows_R = torch.arange(y_RO.shape[0], device=y_RO.device)
    return y_RO.masked_fill_((rows_R >= groups.offsets_E[-1])[:, None], 0)


class _GroupedMM(torch.autograd.Function):
    """One grouped matrix product with its gradients."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, w_EOI: Tensor, groups: Groups, by: Products) -> Tensor:
        x_RI = x_RI.contiguous()
        ctx.save_for_backward(x_RI, w_EOI)
        ctx.groups, ctx.by = groups, by
        return _clear_tail(by.mm(x_RI, w_EOI, groups, False), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, ...]:
        x_RI, w_EOI = ctx.saved_tensors
        groups, by = ctx.groups, ctx.by
        grad_RO = grad_RO.contiguous()
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = _clear_tail(by.mm(grad_RO, w_EOI, groups, True), groups)
        if ctx.needs_input_grad[1]:
            grad_w = by.weight_grad(grad_RO, x_RI, groups, w_EOI.dtype)
        return grad_x, grad_w, None, None


class _ExpertFFN(torch.autograd.Function):
    """up → activation → down, keeping the rows, the hidden rows and the bent gate."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        up_EHD: Tensor,
        down_EDF: Tensor,
        activation: str,
        groups: Groups,
        by: Products,
    ) -> Tensor:
        x_RD = x_RD.contiguous()
        hidden_RH = by.mm(x_RD, up_EHD, groups, False)
        act_RF, kept_RF = activations.forward(hidden_RH, activation)
        ctx.save_for_backward(x_RD, up_EHD, down_EDF, hidden_RH, kept_RF)
        ctx.activation, ctx.groups, ctx.by = activation, groups, by
        return _clear_tail(by.mm(act_RF, down_EDF, groups, False), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, up_EHD, down_EDF, hidden_RH, kept_RF = ctx.saved_tensors
        groups, by = ctx.groups, ctx.by
        grad_RD = grad_RD.contiguous()
        grad_act_RF = by.mm(grad_RD, down_EDF, groups, True)
        grad_hidden_RH, act_RF = activations.backward(
            grad_act_RF, hidden_RH, kept_RF, ctx.activation
        )
        grad_x = grad_up = grad_down = None
        if ctx.needs_input_grad[2]:
            grad_down = by.weight_grad(grad_RD, act_RF, groups, down_EDF.dtype)
        if ctx.needs_input_grad[1]:
            grad_up = by.weight_grad(grad_hidden_RH, x_RD, groups, up_EHD.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = _clear_tail(by.mm(grad_hidden_RH, up_EHD, groups, True), groups)
        return grad_x, grad_up, grad_down, None, None, None
