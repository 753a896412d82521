"""Group tokens by expert, put them back, and drop what exceeds an expert's capacity.

Letters: T tokens, D width, E experts, K experts per token, R rows, A assignments of a Routing.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moestro.errors import ShapeError
from moestro.moe.routing import Plan, Routing


def capacity(factor: float, num_tokens: int, top_k: int, num_experts: int) -> int:
    """C = ceil(factor · T · K / E), the most rows an expert takes (Fedus et al. 2021, eq. 3)."""
    # As the decimal that was typed: 1.1 · 100 / 10 is 11, but 11.000000000000002 in floats. And
    # in integers: under torch.compile the number of tokens is a symbol, which no Fraction takes.
    exact = Fraction(str(factor))
    return -(-exact.numerator * num_tokens * top_k // (exact.denominator * num_experts))


def limit(routing: Routing, rows: int, priority: str, num_sequences: int = 1) -> Routing:
    """Keep at most `rows` assignments per expert; the others are dropped, and say so.

    Args:
        routing: token choice.
        rows: C.
        priority: "arrival": first choices before second choices, then in the order of the tokens
            (Lepikhin et al. 2020, GShard §2.2); "router": highest weight first (batch prioritised
            routing, Riquelme et al. 2021).
        num_sequences: N; each of the N sequences that the tokens are, one after another, fills
            experts of its own.

    Returns:
        The routing with `kept_R`. Padding takes no room and does not count as dropped; what was
        dropped before takes none either.

    Raises:
        ShapeError: the tokens do not split into N sequences.
    """
    if num_sequences < 1 or routing.num_tokens % num_sequences:
        raise ShapeError(f"{routing.num_tokens} tokens do not split into {num_sequences} sequences")
    length = max(routing.num_tokens // num_sequences, 1)
    queues = num_sequences * routing.num_experts
    queue_of_R = routing.tokens_R // length * routing.num_experts + routing.experts_R
    if routing.valid_T is not None:
        # Padding queues for an expert that does not exist.
        queue_of_R = queue_of_R.masked_fill(~routing.valid_T[routing.tokens_R], queues)
    if routing.kept_R is not None:
        queue_of_R = queue_of_R.masked_fill(~routing.kept_R, queues)
    if priority == "router":
        arrival_R = routing.weights_R.detach().argsort(descending=True, stable=True)
    else:
        ranks_R = torch.arange(len(queue_of_R), device=queue_of_R.device)
        arrival_R = (ranks_R % routing.top_k).argsort(stable=True)
    order_R = arrival_R[queue_of_R[arrival_R].argsort(stable=True)]
    # Nothing in place and no shape that depends on data: torch.func and torch.compile pass through.
    counts = queue_of_R.new_zeros(queues + 1)
    counts = counts.scatter_add(0, queue_of_R, torch.ones_like(queue_of_R))
    starts = counts.cumsum(0) - counts
    queue_of_R = queue_of_R[order_R]
    places_R = torch.arange(len(order_R), device=order_R.device) - starts[queue_of_R]
    kept_R = (places_R < rows) & (queue_of_R < queues)
    kept_R = torch.zeros_like(kept_R).scatter(0, order_R, kept_R)
    return routing._replace(kept_R=kept_R)


def make_plan(routing: Routing, padded_counts: Callable[[Tensor], Tensor] | None = None) -> Plan:
    """Group the kept assignments by expert.

    `padded_counts` maps the rows of each expert (int64 [E]) to rows to give it, at least as many;
    the difference becomes zero rows, and groups then lie largest first. None gives each what it
    has, in the order of the experts.
    """
    experts_A, num_experts = routing.experts_R, routing.num_experts
    if routing.kept_R is not None:
        experts_A = experts_A.masked_fill(~routing.kept_R, num_experts)
    order_A = experts_A.argsort(stable=True)
    counts_E = torch.bincount(experts_A, minlength=num_experts + 1)[:num_experts]
    padded_E = counts_E if padded_counts is None else padded_counts(counts_E)
    padded = padded_E is not counts_E
    groups_E = padded_E.argsort(descending=True, stable=True) if padded else None
    sizes_E = padded_E if groups_E is None else padded_E[groups_E]
    offsets_E = sizes_E.cumsum(0)
    starts_E = offsets_E - sizes_E
    if groups_E is not None:  # from the order of the groups to that of the experts
        starts_E = torch.empty_like(starts_E).index_copy_(0, groups_E, starts_E)
    num_rows = len(order_A)
    if padded or routing.kept_R is not None:
        num_rows = int(offsets_E[-1])
        order_A = order_A[: int(counts_E.sum())]
    # Row of each sorted assignment: its rank within its expert, from the start of the group.
    shift_E = starts_E - (counts_E.cumsum(0) - counts_E)
    rows_A = torch.full_like(experts_A, num_rows)
    sorted_rows_A = torch.arange(len(order_A), device=order_A.device) + shift_E[experts_A[order_A]]
    rows_A[order_A] = sorted_rows_A
    tokens_R = torch.zeros(num_rows, dtype=torch.int64, device=order_A.device)
    tokens_R[sorted_rows_A] = routing.tokens_R[order_A]
    padding_P = sorted_rows_A[:0]
    if len(sorted_rows_A) < num_rows:
        free_R = torch.ones(num_rows, dtype=torch.bool, device=order_A.device)
        padding_P = free_R.index_fill_(0, sorted_rows_A, False).nonzero().squeeze(1)
    slots_TK, rows_TK, complete = _by_token(routing, rows_A, num_rows)
    return Plan(tokens_R, padding_P, slots_TK, rows_TK, offsets_E, groups_E, counts_E, complete)


def _by_token(routing: Routing, rows_A: Tensor, num_rows: int) -> tuple[Tensor, Tensor, bool]:
    """slots_TK, rows_TK and whether every place is filled; see `Plan`."""
    if routing.top_k:
        slots_TK = torch.arange(len(rows_A), device=rows_A.device).view(-1, routing.top_k)
        return slots_TK, rows_A.view(-1, routing.top_k), routing.kept_R is None
    empty = len(rows_A)
    order_A = routing.tokens_R.argsort(stable=True)
    counts_T = torch.bincount(routing.tokens_R, minlength=routing.num_tokens)
    starts_T = counts_T.cumsum(0) - counts_T
    most = int(counts_T.max()) if empty else 0
    tokens_A = routing.tokens_R[order_A]
    place_A = torch.arange(empty, device=rows_A.device) - starts_T[tokens_A]
    slots_TK = rows_A.new_full((routing.num_tokens, most), empty)
    slots_TK[tokens_A, place_A] = order_A
    rows_TK = torch.cat([rows_A, rows_A.new_tensor([num_rows])])[slots_TK]
    return slots_TK, rows_TK, False


def dispatch(x_TD: Tensor, plan: Plan) -> Tensor:
    """Copy each token to its rows. [T, D] → [R, D], grouped by expert; padding rows are zero."""
    rows_RD: Tensor = _Dispatch.apply(x_TD, plan)
    return rows_RD


def combine(rows_RD: Tensor, weights_A: Tensor, plan: Plan) -> Tensor:
    """Weighted sum of each token's rows. [R, D] → [T, D] in the rows' dtype.

    The sum runs over K in a fixed order, in at least fp32, so that the result does not depend on
    what else is in the batch. A token without a row gets zero. The weights are the Routing's.
    """
    y_TD: Tensor = _Combine.apply(rows_RD, weights_A, plan)
    return y_TD


def mix_few(x_TD: Tensor, routing: Routing, single: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Dispatch, experts and combine of few tokens, without a plan and without gradients.

    The same sum in the same order as `combine`'s, for token choice. Each expert that is hit works
    once: `single` maps (rows [P, D], its number) to [P, D].
    """
    top_k, dtype = routing.top_k, torch.promote_types(x_TD.dtype, torch.float32)
    kept_R = None if routing.kept_R is None else routing.kept_R.tolist()
    rows_of: dict[int, list[int]] = {}
    for row, expert in enumerate(routing.experts_R.tolist()):
        if kept_R is None or kept_R[row]:
            rows_of.setdefault(expert, []).append(row)
    y_RD = x_TD.new_zeros(len(routing.experts_R), x_TD.shape[1], dtype=dtype)
    for expert, rows in rows_of.items():
        if len(rows) == 1:
            token = rows[0] // top_k
            y_RD[rows[0]] = single(x_TD[token : token + 1], expert)[0]
        else:
            y_RD[rows] = single(x_TD[[row // top_k for row in rows]], expert).to(dtype)
    y_TKD = y_RD.mul_(routing.weights_R.to(dtype)[:, None]).view(-1, top_k, x_TD.shape[1])
    y_TD = y_TKD[:, 0]
    for k in range(1, top_k):
        y_TD = y_TD + y_TKD[:, k]
    return y_TD.to(x_TD.dtype)


def _pick(rows_RD: Tensor, plan: Plan, place: int) -> Tensor:
    """The row at one place of every token, in at least fp32; zero where the place is empty.

    Casting first matters: an operation on mixed dtypes is several times slower on CPU.
    """
    dtype = torch.promote_types(rows_RD.dtype, torch.float32)
    rows_T = plan.rows_TK[:, place]
    if plan.complete:
        return rows_RD.index_select(0, rows_T).to(dtype)
    empty_T = rows_T == len(rows_RD)
    picked_TD = rows_RD.index_select(0, rows_T.masked_fill(empty_T, 0)).to(dtype)
    return picked_TD.masked_fill_(empty_T[:, None], 0)


def _gather_sum(rows_RD: Tensor, weights_TK: Tensor | None, plan: Plan) -> Tensor:
    """Σ_k weight · row over each token's places, in at least fp32; empty places add nothing."""
    num_tokens, places = plan.rows_TK.shape
    sum_TD: Tensor | None = None
    for k in range(places if len(rows_RD) else 0):
        picked_TD = _pick(rows_RD, plan, k)
        if weights_TK is None:
            sum_TD = picked_TD if sum_TD is None else sum_TD.add_(picked_TD)
        else:
            weight_T1 = weights_TK[:, k, None].to(picked_TD.dtype)
            if sum_TD is None:
                sum_TD = picked_TD.mul_(weight_T1)
            else:
                sum_TD.addcmul_(picked_TD, weight_T1)
    if sum_TD is None:
        dtype = torch.promote_types(rows_RD.dtype, torch.float32)
        return rows_RD.new_zeros(num_tokens, rows_RD.shape[1], dtype=dtype)
    return sum_TD


class _Dispatch(torch.autograd.Function):
    """Gather forward; the backward sums each token's rows instead of scattering into it."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, plan: Plan) -> Tensor:
        ctx.plan, ctx.num_tokens = plan, len(x_TD)
        rows_RD = x_TD.index_select(0, plan.tokens_R)
        return rows_RD.index_fill_(0, plan.padding_P, 0) if len(plan.padding_P) else rows_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return _gather_sum(grad_RD, None, ctx.plan).to(grad_RD.dtype), None


class _Combine(torch.autograd.Function):
    """Weighted gather-sum forward; the backward weights per token, then gathers into the rows."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weights_A: Tensor, plan: Plan) -> Tensor:
        padded_A = torch.cat([weights_A, weights_A.new_zeros(1)])
        weights_TK = padded_A[plan.slots_TK]
        ctx.save_for_backward(rows_RD, weights_TK)
        ctx.plan, ctx.num_assignments = plan, len(weights_A)
        return _gather_sum(rows_RD, weights_TK, plan).to(rows_RD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, weights_TK = ctx.saved_tensors
        plan: Plan = ctx.plan
        num_tokens, places = weights_TK.shape
        if not len(rows_RD) or not places:
            return torch.zeros_like(rows_RD), weights_TK.new_zeros(ctx.num_assignments), None
        grad32_TD = grad_TD.to(weights_TK.dtype)
        dots_TK = torch.empty_like(weights_TK)
        scaled_KTD = rows_RD.new_empty(places, num_tokens, rows_RD.shape[1])
        for k in range(places):
            picked_TD = _pick(rows_RD, plan, k).to(weights_TK.dtype)
            torch.sum(picked_TD.mul_(grad32_TD), dim=-1, out=dots_TK[:, k])
            torch.mul(grad32_TD, weights_TK[:, k, None], out=picked_TD)
            scaled_KTD[k].copy_(picked_TD)
        filled_TK = plan.rows_TK < len(rows_RD)
        source_R = plan.tokens_R.new_zeros(len(rows_RD))
        order_TK = torch.arange(num_tokens * places, device=rows_RD.device).view(places, -1).t()
        source_R[plan.rows_TK[filled_TK]] = order_TK[filled_TK]
        grad_rows_RD = scaled_KTD.flatten(0, 1).index_select(0, source_R)
        if len(plan.padding_P):
            grad_rows_RD.index_fill_(0, plan.padding_P, 0)
        grad_weights_A = weights_TK.new_zeros(ctx.num_assignments)
        grad_weights_A[plan.slots_TK[filled_TK]] = dots_TK[filled_TK]
        return grad_rows_RD, grad_weights_A, None
