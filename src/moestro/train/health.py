"""The health of the routing, measured from Routings: imbalance, dead experts, drops, entropy.

One `Tally` sums a step's micro-batches on the device and over the ranks; `LayerHealth` is what a
person reads; `CollapseWatch` looks at the last steps together and says when a layer's routing has
fallen onto few experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moestro.moe.routing import Routing
from moestro.train.distributed import ALONE, Ranks

WINDOW_STEPS = 20


class LayerHealth(NamedTuple):
    """How one layer's experts were used in one step.

    Attributes:
        imbalance: Most loaded expert over the mean, from 1 (even) to E.
        dead: Experts that got no token.
        dropped: Share of the assignments that found no room, from 0 to 1.
        entropy: Mean over tokens of the entropy of the router's probabilities, as a share of
            log E: 1 is undecided, 0 is certain.
    """

    imbalance: float
    dead: int
    dropped: float
    entropy: float


class Tally:
    """Sums of one step over its micro-batches; after `reduce`, over the ranks too."""

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self._sums = torch.zeros(num_layers, num_experts + 3, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, routings: Sequence[Routing]) -> None:
        """Count one micro-batch's Routings, one per layer; no device-to-host copy."""
        if not routings:
            return
        rows = []
        for routing in routings:
            entropy, tokens = entropy_sum(routing)
            extra = torch.stack([routing.dropped().double(), entropy.double(), tokens.double()])
            rows.append(torch.cat([routing.counts_E().double(), extra]))
        self._sums += torch.stack(rows)

    def reduce(self, ranks: Ranks = ALONE) -> None:
        """Sum over the ranks; call once, after the step's last micro-batch."""
        if self._sums.numel():
            ranks.sum_(self._sums)

    @property
    def counts_LE(self) -> Tensor:
        """Assignments per layer and expert before drops, float64 [L, E]."""
        return self._sums[:, :-3]

    def packed(self) -> Tensor:
        """Every sum as one flat tensor, to be read in one copy and given to `unpack`."""
        return self._sums.flatten()

    def unpack(self, numbers: Sequence[float]) -> list[LayerHealth]:
        """Turn the numbers of `packed` into one LayerHealth per layer."""
        layers, width = self._sums.shape
        rows = (numbers[i * width : (i + 1) * width] for i in range(layers))
        return [_layer_health(*row) for row in rows]


def entropy_sum(routing: Routing) -> tuple[Tensor, Tensor]:
    """Sum over real tokens of the router's entropy as a share of log E, and their number."""
    probs_TE = routing.probs_TE.detach()
    if routing.valid_T is not None:
        probs_TE = probs_TE[routing.valid_T]
    tokens = probs_TE.new_tensor(float(probs_TE.shape[0]))
    if routing.num_experts == 1:
        return tokens.clone(), tokens
    entropy_T = torch.special.entr(probs_TE).sum(-1) / math.log(routing.num_experts)
    return entropy_T.sum(), tokens


def _layer_health(*sums: float) -> LayerHealth:
    *counts, dropped, entropy, tokens = sums
    assignments = sum(counts)
    mean = assignments / len(counts)
    return LayerHealth(
        imbalance=max(counts) / mean if mean else 1.0,
        dead=sum(count == 0 for count in counts),
        dropped=dropped / assignments if assignments else 0.0,
        entropy=entropy / tokens if tokens else 0.0,
    )


class CollapseWatch:
    """Says when a layer's routing has collapsed, judged over the last WINDOW_STEPS steps.

    A layer has collapsed when more than half of its experts got no token in the window, or when
    the effective number of experts (the exponential of the load's entropy) is nearer to top_k,
    the fewest there can be, than a quarter of the way up to E. It is reported once, and again
    only after it has recovered.

    Attributes:
        window_WLE: int64, counts of the last steps, the slot of step n being n mod WINDOW_STEPS.
        collapsed: Layers (by place among the mixtures) that are collapsed now.
    """

    def __init__(self, num_layers: int, num_experts: int, top_k: int) -> None:
        self.top_k = top_k
        shape = (WINDOW_STEPS, num_layers, num_experts)
        self.window_WLE = torch.zeros(shape, dtype=torch.int64, device="cpu")
        self.collapsed: set[int] = set()

    def observe(self, step: int, counts_LE: Tensor) -> list[str]:
        """Take in the counts of one step, from 1; a sentence for each layer just collapsed.

        Nothing is judged before the window is full.
        """
        self.window_WLE[step % WINDOW_STEPS] = counts_LE.long()
        num_experts = self.window_WLE.shape[2]
        if step < WINDOW_STEPS or num_experts <= self.top_k:
            return []
        messages = []
        for layer, counts_E in enumerate(self.window_WLE.sum(0).double()):
            effective, dead = effective_experts(counts_E), int((counts_E == 0).sum())
            floor = self.top_k + 0.25 * (num_experts - self.top_k)
            if effective >= floor and dead * 2 <= num_experts:
                self.collapsed.discard(layer)
            elif layer not in self.collapsed:
                self.collapsed.add(layer)
                messages.append(
                    f"expert collapse in mixture {layer}: over the last {WINDOW_STEPS} steps "
                    f"{dead} of {num_experts} experts got no token, and the load is as if "
                    f"{effective:.1f} experts were used; raise balance.switch or "
                    "balance.bias_rate, or lower optim.lr"
                )
        return messages


def effective_experts(counts_E: Tensor) -> float:
    """Exponential of the entropy of the load: E at perfect balance, 1 with one expert."""
    shares_E = counts_E.double() / counts_E.sum().clamp_min(1)
    return math.exp(float(torch.special.entr(shares_E).sum()))
