"""Expert parallelism: experts of which each rank holds a share, and the exchange of their rows.

Rank r of a group of N holds experts [r · E / N, (r + 1) · E / N). Rows are sorted by expert, so
what goes to one rank is one slice; counts are exchanged first, then rows. What came is a batch of
its own, one expert a row, which this rank's experts mix as any other. Back the same way; weights
never travel, and drops stay home. What else is to be computed of the tokens, as a shared expert, is
computed while the rows are on their way, forward and backward.

Nothing is averaged: a loss that is a sum over the tokens of all ranks gives an expert the gradient
of one process, since the exchange has brought it the tokens of all.

Letters: T tokens, D width, E experts, R rows, P ranks of the group, L experts of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moestro.errors import ConfigError
from moestro.moe import dispatch
from moestro.moe.experts import Experts, hidden_from_compiler
from moestro.moe.mixing import compute_dtype
from moestro.moe.routing import Routing

Group = dist.ProcessGroup | None  # None: all ranks


class ParallelExperts(Experts):
    """This rank's share of the experts of a mixture, in place of all of them.

    Every rank of the group calls it together, with tokens of its own or with none. Capacity and
    drops are those of the rank's own tokens: N ranks with one micro-batch each are one process
    with N micro-batches.

    Attributes:
        num_experts: E, of all ranks.
        first: number of the expert in row 0 of the weights.
    """

    def __init__(self, whole: Experts, group: Group = None) -> None:
        """Keep this rank's share of `whole`, which may be without memory.

        Raises:
            ConfigError: the experts do not split evenly.
        """
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        count, dim, hidden_dim = whole.down.shape
        if count % ranks:
            raise ConfigError(
                f"{count} experts do not split over {ranks} ranks; use a number of ranks that "
                "divides them"
            )
        share = count // ranks
        self.group, self.num_experts, self.first = group, count, rank * share
        with torch.device("meta"):  # the weights are those of `whole`
            super().__init__(
                share, dim, hidden_dim, whole.activation, whole.dropout, whole.init_scale,
                whole.backend, whole.biases is not None, whole.out_scale,
            )  # fmt: skip
        for name, weight in whole.named_parameters():
            part = weight.detach()[self.first : self.first + share].clone()
            self.register_parameter(name, nn.Parameter(part, weight.requires_grad))

    def in_turn(self, weight: Tensor) -> Iterator[Tensor]:
        """Those of all ranks, so that each draws what one process does; the others' are let go."""
        of_other = weight.new_empty(weight.shape[1:])
        for expert in range(self.num_experts):
            own = 0 <= expert - self.first < len(weight)
            yield weight[expert - self.first] if own else of_other

    def forward(
        self,
        x_TD: Tensor,
        routing: Routing,
        noise_T: Tensor | None = None,
        meanwhile: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """See `Experts.forward`; `routing` names experts of all ranks.

        Args:
            x_TD: tokens.
            routing: who goes where.
            noise_T: keys of the tokens.
            meanwhile: computes something to be added, [T, D], while rows travel.
        """
        x_TD = x_TD.to(compute_dtype(x_TD))
        return hidden_from_compiler(self._across)(x_TD, routing, noise_T, meanwhile)

    def _across(
        self,
        x_TD: Tensor,
        routing: Routing,
        noise_T: Tensor | None,
        meanwhile: Callable[[], Tensor] | None,
    ) -> Tensor:
        plan = dispatch.make_plan(routing)
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        way, local = meet(plan.counts_E, dtype, self.group)
        trip, beside_TD = _Trip(way), None
        rows_RD = _Depart.apply(dispatch.dispatch(x_TD, plan), trip)
        if meanwhile is not None:
            beside_TD = meanwhile()
        rows_RD = _Arrive.apply(rows_RD, trip)
        if noise_T is not None and self.dropout:
            noise_T = _exchange(noise_T[plan.tokens_R, None], way).squeeze(1)
        done_RD = super().forward(rows_RD, local, noise_T)
        y_TD = dispatch.combine(_Swap.apply(done_RD, way.back()), routing.weights_R, plan)
        return y_TD if beside_TD is None else y_TD + beside_TD


class Way(NamedTuple):
    """How rows travel: `to[i]` to rank i, `by[i]` from it."""

    to: list[int]
    by: list[int]
    group: Group

    def back(self) -> Way:
        """The way home."""
        return Way(self.by, self.to, self.group)


def meet(counts_E: Tensor, dtype: torch.dtype, group: Group) -> tuple[Way, Routing]:
    """Exchange counts. Returns the rows' way there, and the Routing of those that come.

    The rows come rank by rank and, of each rank, expert by expert; each has one of the L experts
    of this rank, with weight 1 in `dtype`.
    """
    sent_PL = counts_E.view(dist.get_world_size(group), -1).contiguous()
    came_PL = torch.empty_like(sent_PL)
    dist.all_to_all_single(came_PL, sent_PL, group=group)
    to, by = torch.stack([sent_PL.sum(1), came_PL.sum(1)]).tolist()  # the only copy to the host
    ranks, share = came_PL.shape
    experts_R = torch.arange(share, device=counts_E.device).repeat(ranks)
    experts_R = experts_R.repeat_interleave(came_PL.flatten(), output_size=sum(by))
    ones_R = torch.ones(len(experts_R), dtype=dtype, device=counts_E.device)
    nothing_RL = ones_R[:, None].expand(-1, share)  # no router was asked here
    rows_R = torch.arange(len(experts_R), device=counts_E.device)
    local = Routing(rows_R, experts_R, ones_R, nothing_RL, nothing_RL, top_k=1)
    return Way(to, by, group), local


class _Trip:
    """Rows on their way: `there` in the forward, their gradients back in the backward."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self._work: Any = None
        self._rows: tuple[Tensor, Tensor] | None = None  # that come, and that go: both must stay

    def begin(self, rows_RD: Tensor, back: bool = False) -> Tensor:
        """Send rows; returns what those of the others will be in, once `end` has returned."""
        came_RD, sent_RD, self._work = _begin(rows_RD, self._way.back() if back else self._way)
        self._rows = came_RD, sent_RD
        return came_RD

    def end(self) -> Tensor:
        """Wait until all have come; returns them."""
        assert self._rows is not None
        self._work.wait()
        came_RD = self._rows[0]
        self._work = self._rows = None
        return came_RD


class _Depart(torch.autograd.Function):
    """Begin a trip; the backward ends the way back."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return trip.begin(rows_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.end(), None


class _Arrive(torch.autograd.Function):
    """End a trip; the backward begins the way back.

    What runs between the two in the forward does so in the backward: autograd takes what was made
    last first. The gradient handed on is not looked at: a gradient must have the shape of its rows
    here, which is another at home.
    """

    @staticmethod
    def forward(ctx: Any, came_RD: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        trip.end()
        return came_RD.view_as(came_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        ctx.trip.begin(grad_RD, back=True)
        return grad_RD, None


class _Swap(torch.autograd.Function):
    """Send rows along a Way and get those of the others; the backward sends gradients back."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return _exchange(rows_RD, way)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return _exchange(grad_RD, ctx.way.back()), None


def _exchange(rows_RD: Tensor, way: Way) -> Tensor:
    came_RD, _, work = _begin(rows_RD, way)
    work.wait()
    return came_RD


def _begin(rows_RD: Tensor, way: Way) -> tuple[Tensor, Tensor, Any]:
    """What comes, what is sent, and what to wait for."""
    came_RD = rows_RD.new_empty(sum(way.by), rows_RD.shape[1])
    # A rank without rows would enter with any layout, one with rows only with this.
    sent_RD = rows_RD.contiguous()
    work = dist.all_to_all_single(came_RD, sent_RD, way.by, way.to, way.group, async_op=True)
    return came_RD, sent_RD, work


def several() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def limit_together(routing: Routing, factor: float, priority: str, group: Group = None) -> Routing:
    """Drop what exceeds the capacity of all ranks' tokens, as `dispatch.limit` does of one's.

    Every rank calls it together and gets the assignments of all, the tokens of the first rank
    first; what it keeps of its own are the definition's drops.

    Args:
        routing: token choice, of this rank's tokens; of none on some.
        factor: of the capacity, whose tokens are the valid ones of all ranks.
        priority: see `dispatch.limit`.
        group: the ranks.
    """
    top_k, experts = routing.top_k, routing.num_experts
    valid_T = routing.valid_T
    if valid_T is None:
        valid_T = torch.ones(routing.num_tokens, dtype=torch.bool, device=routing.experts_R.device)
    own = routing.experts_R.new_tensor([routing.num_tokens])
    lengths = [
        int(each) for each in torch.cat(_gathered(own, [1] * dist.get_world_size(group), group))
    ]
    lengths_R = [n * top_k for n in lengths]
    experts_R = torch.cat(_gathered(routing.experts_R.int(), lengths_R, group)).long()
    all_valid_T = torch.cat(_gathered(valid_T.byte(), lengths, group)).bool()
    weights_R = routing.weights_R.detach()
    if priority == "router":
        weights_R = torch.cat(_gathered(weights_R, lengths_R, group))
    tokens = len(all_valid_T)
    tokens_R = torch.arange(tokens, device=experts_R.device).repeat_interleave(top_k)
    logits_TE = experts_R.new_zeros(1).expand(tokens, experts)  # only its shape is looked at
    joined = Routing(
        tokens_R, experts_R, weights_R, logits_TE, logits_TE, top_k, valid_T=all_valid_T
    )
    rows = dispatch.capacity(factor, int(all_valid_T.sum()), top_k, experts)
    kept_R = dispatch.limit(joined, rows, priority).kept_R
    assert kept_R is not None
    first = sum(lengths[: dist.get_rank(group)]) * top_k
    return routing._replace(kept_R=kept_R[first : first + len(routing.experts_R)])


def _gathered(x: Tensor, lengths: list[int], group: Group) -> list[Tensor]:
    """The tensors of all ranks, of these lengths; each sends the longest."""
    padded = x.new_zeros(max(lengths))
    padded[: len(x)] = x
    found = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(found, padded, group=group)
    return [each[:length] for each, length in zip(found, lengths, strict=True)]
