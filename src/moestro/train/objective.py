"""What training minimises: cross entropy, plus the balance losses of every mixture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moestro.config import BalanceConfig
from moestro.data.windows import IGNORED
from moestro.models.network import ModelOutput
from moestro.moe import balance
from moestro.moe.routing import Routing
from moestro.train.distributed import ALONE, Ranks

Term = Callable[[int, Routing], Tensor]


class Loss(NamedTuple):
    """What one micro-batch adds to the loss of its step.

    Attributes:
        total: What to differentiate: cross entropy + sum over layers of weighted balance losses.
        parts: Detached scalars by name: `loss` is the cross entropy in nats per label; each
            balance loss is unweighted and a mean over layers, so 1 is perfect for `switch`.
    """

    total: Tensor
    parts: dict[str, Tensor]


class Objective:
    """The loss of a step: its micro-batches', of all ranks, add up to it.

    The cross entropy is a mean over the labels of the whole step, however they are spread over
    micro-batches and ranks; a mean of the micro-batches' means would weigh the labels of a short
    one more. The balance losses are means over the micro-batches. Without `restart` a step is one
    micro-batch.

    With the scope `global`, the Switch loss takes its fractions from the assignments of all ranks
    and of the step's micro-batches so far, and its probabilities from the micro-batch at hand.
    """

    def __init__(self, cfg: BalanceConfig, ranks: Ranks = ALONE) -> None:
        self.cfg = cfg
        self._ranks = ranks
        self.restart()

    def restart(self, labels: Tensor | None = None, micro_batches: int = 1) -> None:
        """Begin a step.

        Args:
            labels: Scalar, the labels of the step over all ranks; None: those of each micro-batch.
            micro_batches: Of the step, over all ranks.
        """
        self._labels, self._micro_batches = labels, micro_batches
        self._counts_LE: Tensor | None = None

    def __call__(self, output: ModelOutput, targets_BS: Tensor) -> Loss:
        """The loss of a micro-batch of B sequences, in at least fp32; `IGNORED` is no label."""
        labels = num_labels(targets_BS) if self._labels is None else self._labels
        dtype = torch.promote_types(output.logits.dtype, torch.float32)
        logits_TV, targets_T = output.logits.to(dtype).flatten(0, 1), targets_BS.flatten()
        summed = cross_entropy(logits_TV, targets_T, ignore_index=IGNORED, reduction="sum")
        total = summed / labels.clamp(min=1)
        parts = {"loss": total.detach()}
        for name, weight, values_L in self.balance(output.routings, targets_BS.shape[0]):
            total = total + weight * values_L.sum() / self._micro_batches
            parts[name] = values_L.detach().mean() / self._micro_batches
        return Loss(total, parts)

    def balance(
        self, routings: Sequence[Routing], num_sequences: int
    ) -> list[tuple[str, float, Tensor]]:
        """Name, weight and value [L] of each balance loss that is on; none without mixtures."""
        if not routings:
            return []
        return [
            (name, weight, torch.stack([term(i, r) for i, r in enumerate(routings)]))
            for name, weight, term in self._terms(routings, num_sequences)
        ]

    def _terms(
        self, routings: Sequence[Routing], num_sequences: int
    ) -> list[tuple[str, float, Term]]:
        """Name, weight and function of each balance loss that is on."""
        cfg = self.cfg
        switch: Term = _switch
        if cfg.switch and cfg.scope == "global":
            switch = partial(_global_switch, self._count(routings))
        elif cfg.scope == "sequence":
            switch = partial(_sequence_switch, num_sequences)
        terms: list[tuple[str, float, Term]] = [
            ("switch", cfg.switch, switch),
            ("importance", cfg.importance, lambda _, routing: balance.importance_loss(routing)),
            ("load", cfg.load, lambda _, routing: balance.load_loss(routing)),
            ("z", cfg.z, lambda _, routing: balance.z_loss(routing)),
        ]
        return [term for term in terms if term[1]]

    def _count(self, routings: Sequence[Routing]) -> Tensor:
        """Counts of this step so far, over all ranks, this micro-batch included: [L, E]."""
        counts_LE = self._ranks.sum_(torch.stack([r.counts_E() for r in routings]))
        if self._counts_LE is not None:
            counts_LE = counts_LE + self._counts_LE
        self._counts_LE = counts_LE
        return counts_LE


def num_labels(targets_BS: Tensor) -> Tensor:
    """Targets that something is learned of; int64 scalar."""
    return (targets_BS != IGNORED).sum()


def _switch(_: int, routing: Routing) -> Tensor:
    return balance.switch_loss(routing)


def _global_switch(counts_LE: Tensor, layer: int, routing: Routing) -> Tensor:
    return balance.switch_loss(routing, counts_LE[layer])


def _sequence_switch(num_sequences: int, _: int, routing: Routing) -> Tensor:
    return balance.sequence_loss(routing, num_sequences)
