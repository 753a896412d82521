"""The fast paths in plain torch: one GEMM per run of hit experts, or torch's own grouped_mm.

Own autograd, so that: weights stay in their dtype while rows decide the dtype computed in, weight
gradients are written once (a zero-token expert gets zeros), the gated hidden rows are the only
large tensor kept, and gradients of any stride are accepted. `single_ffn` is for
generating text, where grouping a handful of rows costs more than multiplying them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moestro.kernels import activations
from moestro.kernels.reference import Biases

# Experts of one batched product: few lengths, since each is a shape to compile a kernel for.
LENGTHS = (4, 1)
# Weights of a 16-bit product that are multiplied in fp32 sooner than oneDNN begins (20 µs).
SMALL = 2**16


class EqualGroups(NamedTuple):
    """Groups of equal size, side by side: one batched product serves all their experts."""

    experts: list[int]
    rows: slice


@dataclass(frozen=True, eq=False)
class Groups:
    """The end of each group of rows, and whose it is (None: group e is expert e's)."""

    offsets_E: Tensor
    experts_E: Tensor | None

    @cached_property
    def runs(self) -> list[EqualGroups]:
        """The groups that have rows, cut into runs of equal size, each as long as `LENGTHS` has.

        Cut once for the six products of a layer and step; on a GPU this waits for the offsets.
        """
        ends = self.offsets_E.tolist()
        order = range(len(ends)) if self.experts_E is None else self.experts_E.tolist()
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        found: list[EqualGroups] = []
        at = row = 0
        while at < len(sizes):
            size = sizes[at]
            length = next(n for n in LENGTHS if sizes[at : at + n] == [size] * n)
            if size:
                found.append(
                    EqualGroups(list(order[at : at + length]), slice(row, row + length * size))
                )
            at, row = at + length, row + length * size
        return found

    def experts_R(self, num_rows: int) -> Tensor:
        """The expert of each row; any expert for rows past the last group."""
        rows_R = torch.arange(num_rows, device=self.offsets_E.device)
        groups_R = torch.bucketize(rows_R, self.offsets_E, right=True)
        groups_R.clamp_(max=len(self.offsets_E) - 1)
        return groups_R if self.experts_E is None else self.experts_E[groups_R]


class Products(NamedTuple):
    """The three primitives of everything here, without autograd.

    Attributes:
        mm: (rows [R, I], weights [E, O, I], groups, back) → [R, O], or with `back` from [R, O] to
            [R, I]. Casts the weights to the rows' dtype. Rows past the last group are left unset.
        weight_grad: (grad [R, O], rows [R, I], groups, dtype) → [E, O, I] in `dtype`.
        add_bias: (rows [R, O], bias [E, O], groups): adds each row its expert's, in place.
    """

    mm: Callable[[Tensor, Tensor, Groups, bool], Tensor]
    weight_grad: Callable[[Tensor, Tensor, Groups, torch.dtype], Tensor]
    add_bias: Callable[[Tensor, Tensor, Groups], None]

    def linear(self, x_RI: Tensor, w_EOI: Tensor, bias_EO: Tensor | None, groups: Groups) -> Tensor:
        """Product and bias; rows past the last group are left unset."""
        y_RO = self.mm(x_RI, w_EOI, groups, False)
        if bias_EO is not None:
            self.add_bias(y_RO, bias_EO, groups)
        return y_RO

    def bias_grad(self, grad_RO: Tensor, groups: Groups, dtype: torch.dtype) -> Tensor:
        """[E, O] in `dtype`: a bias is a weight whose input is always 1.

        Of equal columns, since `torch.nn.functional.grouped_mm` wants rows of 16 bytes and AMX
        tiles are 32 wide.
        """
        ones_RN = grad_RO.new_ones(len(grad_RO), 32)
        return self.weight_grad(grad_RO, ones_RN, groups, dtype)[:, :, 0].contiguous()

    def grouped_mm(
        self,
        x_RI: Tensor,
        w_EOI: Tensor,
        offsets_E: Tensor,
        experts_E: Tensor | None = None,
        bias_EO: Tensor | None = None,
    ) -> Tensor:
        """`reference.grouped_mm` by these products."""
        groups = Groups(offsets_E, experts_E)
        y_RO: Tensor = _GroupedMM.apply(x_RI, w_EOI, bias_EO, groups, self)
        return y_RO

    def expert_ffn(
        self,
        x_RD: Tensor,
        up_EHD: Tensor,
        down_EDF: Tensor,
        offsets_E: Tensor,
        activation: str,
        experts_E: Tensor | None = None,
        biases: Biases | None = None,
    ) -> Tensor:
        """`reference.expert_ffn` by these products."""
        inputs, groups = (x_RD, up_EHD, down_EDF), Groups(offsets_E, experts_E)
        y_RD: Tensor = _ExpertFFN.apply(
            *inputs, *(biases or (None, None)), activation, groups, self
        )
        return y_RD


def _take(w_EOI: Tensor, experts: list[int], dtype: torch.dtype) -> Tensor:
    """The weights of some experts in `dtype`, without a copy where they lie as they are needed."""
    first, count = experts[0], len(experts)
    if experts == list(range(first, first + count)):
        return w_EOI[first : first + count].to(dtype)
    w_NOI = w_EOI.new_empty(count, *w_EOI.shape[1:], dtype=dtype)
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
    for run in groups.runs:
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
    for run in groups.runs:
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


def segments_add_bias(y_RO: Tensor, bias_EO: Tensor, groups: Groups) -> None:
    """Run by run; see `Products.add_bias`."""
    for run in groups.runs:
        bias_N1O = _take(bias_EO[:, None], run.experts, y_RO.dtype)
        y_RO[run.rows].view(len(run.experts), -1, y_RO.shape[1]).add_(bias_N1O)


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


def torch_add_bias(y_RO: Tensor, bias_EO: Tensor, groups: Groups) -> None:
    """By one gather, without waiting for the offsets; see `Products.add_bias`."""
    y_RO.add_(bias_EO.to(y_RO.dtype)[groups.experts_R(len(y_RO))])


SEGMENTS = Products(segments_mm, segments_weight_grad, segments_add_bias)
TORCH = Products(torch_mm, torch_weight_grad, torch_add_bias)


def clear_tail(y_RO: Tensor, groups: Groups) -> Tensor:
    """Zero the rows past the last offset; on a GPU without reading the offset back."""
    if y_RO.device.type == "cpu":
        y_RO[int(groups.offsets_E[-1]) :].zero_()
        return y_RO
    rows_R = torch.arange(y_RO.shape[0], device=y_RO.device)
    return y_RO.masked_fill_((rows_R >= groups.offsets_E[-1])[:, None], 0)


class _GroupedMM(torch.autograd.Function):
    """One grouped matrix product with its gradients."""

    @staticmethod
    def forward(
        ctx: Any, x_RI: Tensor, w_EOI: Tensor, bias_EO: Tensor | None, groups: Groups, by: Products
    ) -> Tensor:
        x_RI = x_RI.contiguous()
        ctx.save_for_backward(x_RI, w_EOI, bias_EO)
        ctx.groups, ctx.by = groups, by
        return clear_tail(by.linear(x_RI, w_EOI, bias_EO, groups), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, ...]:
        x_RI, w_EOI, bias_EO = ctx.saved_tensors
        groups, by = ctx.groups, ctx.by
        grad_RO = grad_RO.contiguous()
        grad_x = grad_w = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = clear_tail(by.mm(grad_RO, w_EOI, groups, True), groups)
        if ctx.needs_input_grad[1]:
            grad_w = by.weight_grad(grad_RO, x_RI, groups, w_EOI.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = by.bias_grad(grad_RO, groups, bias_EO.dtype)
        return grad_x, grad_w, grad_bias, None, None


class _ExpertFFN(torch.autograd.Function):
    """up → activation → down, keeping the rows, the hidden rows and the activated gate."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        up_EHD: Tensor,
        down_EDF: Tensor,
        up_EH: Tensor | None,
        down_ED: Tensor | None,
        activation: str,
        groups: Groups,
        by: Products,
    ) -> Tensor:
        x_RD = x_RD.contiguous()
        hidden_RH = by.linear(x_RD, up_EHD, up_EH, groups)
        act_RF, kept_RF = activations.forward(hidden_RH, activation)
        ctx.save_for_backward(x_RD, up_EHD, down_EDF, up_EH, down_ED, hidden_RH, kept_RF)
        ctx.activation, ctx.groups, ctx.by = activation, groups, by
        return clear_tail(by.linear(act_RF, down_EDF, down_ED, groups), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, up_EHD, down_EDF, up_EH, down_ED, hidden_RH, kept_RF = ctx.saved_tensors
        groups, by, wanted = ctx.groups, ctx.by, ctx.needs_input_grad
        grad_RD = grad_RD.contiguous()
        grad_act_RF = by.mm(grad_RD, down_EDF, groups, True)
        grad_hidden_RH, act_RF = activations.backward(
            grad_act_RF, hidden_RH, kept_RF, ctx.activation
        )
        grads: list[Tensor | None] = [None] * len(wanted)
        if wanted[4]:
            grads[4] = by.bias_grad(grad_RD, groups, down_ED.dtype)
        if wanted[3]:
            grads[3] = by.bias_grad(grad_hidden_RH, groups, up_EH.dtype)
        if wanted[2]:
            grads[2] = by.weight_grad(grad_RD, act_RF, groups, down_EDF.dtype)
        if wanted[1]:
            grads[1] = by.weight_grad(grad_hidden_RH, x_RD, groups, up_EHD.dtype)
        if wanted[0]:
            grads[0] = clear_tail(by.mm(grad_hidden_RH, up_EHD, groups, True), groups)
        return tuple(grads)


def linear(x_PI: Tensor, w_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """One matrix and few rows, without autograd; in the rows' dtype or a wider one.

    fp32 weights stay as they are: to cast them takes longer than to use them once. Alone, a row in
    16 bits is fastest as a vector: 12 GB/s of weights on one core, 10 as a matrix.
    """
    dtype = torch.promote_types(x_PI.dtype, w_OI.dtype)
    if dtype.itemsize == 2 and w_OI.numel() <= SMALL and w_OI.device.type == "cpu":
        dtype = torch.float32
    rows_PI, w_OI = x_PI.to(dtype), w_OI.to(dtype)
    bias_O = None if bias_O is None else bias_O.to(dtype)
    if len(rows_PI) != 1:
        y_PO = F.linear(rows_PI, w_OI, bias_O)
    elif bias_O is None:
        y_PO = torch.mv(w_OI, rows_PI[0])[None]
    else:
        y_PO = torch.addmv(bias_O, w_OI, rows_PI[0])[None]
    return y_PO.to(x_PI.dtype)


def single_ffn(
    x_PD: Tensor,
    expert: int,
    up_EHD: Tensor,
    down_EDF: Tensor,
    activation: str,
    biases: Biases | None = None,
) -> Tensor:
    """`reference.expert_ffn` of a few rows of one expert, without autograd."""
    up_H, down_D = (None, None) if biases is None else (bias[expert] for bias in biases)
    act_PF, _ = activations.forward(linear(x_PD, up_EHD[expert], up_H), activation)
    return linear(act_PF, down_EDF[expert], down_D)
