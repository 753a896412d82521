"""Low-rank adapters: a pair of thin matrices whose product is added to a weight (Hu et al. 2021).

The definition is the merged weight, W + scale · B A, for each expert its own; see docs/tuning.md. A
module with a parameter `name` has its adapter, or None, as `name_adapter`.

Letters: E experts (1 of a plain matrix), O and I out and in of the weight, N rank, P parts of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moestro.kernels.reference import Activation, activate
from moestro.kernels.torch_grouped import SEGMENTS, Groups

# (rows [R, I], weights [E, O, I]) → [R, O]: each row by the weights of its expert.
Product = Callable[[Tensor, Tensor], Tensor]


def only(x_TI: Tensor, w_1OI: Tensor) -> Tensor:
    """The product where there is one expert."""
    return F.linear(x_TI, w_1OI[0].to(x_TI.dtype))


class Adapter(nn.Module):
    """scale · B A x, in place of (W + scale · B A) x - W x.

    Rows of the weight that are a matrix of their own in other programs, such as those of queries,
    keys and values, have an A of their own: `a [E, P · N, I]`, `b [E, O, N]`. B starts at zero.

    Args:
        experts: E.
        rows: of each part; O in all.
        inputs: I.
        rank: N.
        scale: of the product.
        dropout: of the input, in training.
    """

    def __init__(
        self,
        experts: int,
        rows: tuple[int, ...],
        inputs: int,
        rank: int,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.rows, self.rank, self.scale, self.dropout = rows, rank, scale, dropout
        self.a = nn.Parameter(torch.empty(experts, len(rows) * rank, inputs))
        self.b = nn.Parameter(torch.empty(experts, sum(rows), rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniform within 1 / sqrt(I), as torch's linear layers start; B zero."""
        nn.init.uniform_(self.a, -1 / math.sqrt(self.a.shape[-1]), 1 / math.sqrt(self.a.shape[-1]))
        nn.init.zeros_(self.b)

    def forward(self, x_RI: Tensor, product: Product = only) -> Tensor:
        """What is to be added to W x: [..., I] → [..., O]."""
        low_RN = product(F.dropout(x_RI, self.dropout, self.training), self.a)
        parts = zip(low_RN.split(self.rank, -1), self.b.split(self.rows, 1), strict=True)
        added = [product(low, b_EON.contiguous()) for low, b_EON in parts]
        return (added[0] if len(added) == 1 else torch.cat(added, -1)) * self.scale

    def delta(self) -> Tensor:
        """Scale · B A, [E, O, I]."""
        parts = zip(self.b.split(self.rows, 1), self.a.split(self.rank, 1), strict=True)
        return torch.cat([b_EON @ a_ENI for b_EON, a_ENI in parts], 1) * self.scale

    def extra_repr(self) -> str:
        """Shapes, for print(model)."""
        return f"{self.a.shape[-1]} → {self.rank} → {self.b.shape[1]}"


class Adapters(NamedTuple):
    """Of the two weights of experts, those that there are."""

    up: Adapter | None
    down: Adapter | None

    def merged(self, up_EHD: Tensor, down_EDF: Tensor) -> tuple[Tensor, Tensor]:
        """The weights with what the adapters add: the definition."""
        weights = (up_EHD, down_EDF)
        up, down = (
            weight if one is None else weight + one.delta().to(weight.dtype)
            for weight, one in zip(weights, self, strict=True)
        )
        return up, down

    def ffn(
        self,
        rows_RD: Tensor,
        up: Callable[[Tensor], Tensor],
        down: Callable[[Tensor], Tensor],
        activation: Activation,
        offsets_E: Tensor,
        experts_E: Tensor | None,
    ) -> Tensor:
        """Each row through its expert, with the adapters beside both of its products.

        Args:
            rows_RD: rows, grouped by expert.
            up: the first product with its bias.
            down: the second.
            activation: between them.
            offsets_E: int64, end of each group.
            experts_E: int64, expert of each group; None: group e is expert e's.
        """

        def product(x_RI: Tensor, w_EOI: Tensor) -> Tensor:
            return SEGMENTS.grouped_mm(x_RI, w_EOI, offsets_E, experts_E)

        hidden_RH = up(rows_RD)
        if self.up is not None:
            hidden_RH = hidden_RH + self.up(rows_RD, product)
        act_RF = activate(hidden_RH, activation)
        y_RD = down(act_RF)
        return y_RD if self.down is None else y_RD + self.down(act_RF, product)


class _Unpacked(torch.autograd.Function):
    """A grouped product with weights that are unpacked when needed, again in the backward."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, unpack: Callable[[int], Tensor], groups: Groups) -> Tensor:
        ctx.unpack, ctx.groups, ctx.inputs = unpack, groups, x_RI.shape[1]
        return _by_expert(x_RI, lambda expert: unpack(expert).t(), groups, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, None, None]:
        return _by_expert(grad_RO, ctx.unpack, ctx.groups, ctx.inputs), None, None


def _by_expert(
    x_RI: Tensor, weight: Callable[[int], Tensor], groups: Groups, width: int | None
) -> Tensor:
    """Each group times the matrix [I, O] of its expert; zero past the last."""
    done, last = [], 0
    for run in groups.runs:
        size = (run.rows.stop - run.rows.start) // len(run.experts)
        for place, expert in enumerate(run.experts):
            first = run.rows.start + place * size
            w_IO = weight(expert).to(x_RI.dtype)
            done.append(x_RI[first : first + size] @ w_IO)
            width, last = w_IO.shape[1], first + size
    if width is None:
        width = weight(0).shape[1]
    return torch.cat([*done, x_RI.new_zeros(len(x_RI) - last, width)])


def unpacked_mm(
    x_RI: Tensor,
    unpack: Callable[[int], Tensor],
    offsets_E: Tensor,
    experts_E: Tensor | None = None,
) -> Tensor:
    """`reference.grouped_mm` by weights that `unpack` gives, one expert's [O, I] at a time.

    Gradients flow to the rows alone.
    """
    y_RO: Tensor = _Unpacked.apply(x_RI, unpack, Groups(offsets_E, experts_E))
    return y_RO
