"""How the processes of a run share the model, and which of that fits their number."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field

from moestro.config.number import Positive
from moestro.errors import ConfigError
from moestro.settings import Settings


class Layout(NamedTuple):
    """Who holds what among `ranks` processes.

    All but the experts is cut into `shard` pieces, with `replicas` copies of each. The experts of
    a layer are split over `expert` ranks; each share is cut into `expert_shard` pieces, with
    `expert_replicas` copies.
    """

    ranks: int
    expert: int
    shard: int

    @property
    def replicas(self) -> int:
        """Copies of what is no expert."""
        return self.ranks // self.shard

    @property
    def expert_shard(self) -> int:
        """Pieces of a rank group's share of the experts."""
        return max(1, self.shard // self.expert)

    @property
    def expert_replicas(self) -> int:
        """Copies of each expert."""
        return self.ranks // (self.expert * self.expert_shard)

    @property
    def splits(self) -> bool:
        """Whether any rank holds less than the whole model."""
        return self.expert > 1 or self.shard > 1


class ParallelConfig(Settings):
    """How the processes of a run share the model; torchrun says how many they are."""

    expert: Positive = Field(1, description="Ranks that the experts of a layer are split over.")
    shard: Literal["auto"] | Positive = Field(
        1,
        description="Ranks that weights, gradients and moments are sharded over, the experts' "
        "after the split; auto: all.",
    )
    timeout_s: Positive = Field(
        600, description="Longest wait for another rank before the run stops."
    )

    def layout(self, ranks: int, num_experts: int | None) -> Layout:
        """The layout of so many processes.

        Args:
            ranks: of the run.
            num_experts: of a mixture layer; None: the model has none.

        Raises:
            ConfigError: it does not fit; names the nearest that do.
        """
        experts = num_experts or 1
        fitting = [m for m in _divisors(ranks) if experts % m == 0]
        if self.expert not in fitting:
            of = f"{experts} experts" if num_experts else "a model without experts"
            raise ConfigError(
                f"{of} cannot be split {self.expert} ways over {ranks} processes; set "
                f"parallel.expert = {_nearest(self.expert, fitting)}"
                f"{_nearest_ranks(self.expert, ranks, experts)}"
            )
        fitting = [s for s in _divisors(ranks) if s <= self.expert or s % self.expert == 0]
        shard = ranks if self.shard == "auto" else self.shard
        if shard not in fitting:
            raise ConfigError(
                f"parallel.shard = {shard} does not fit {ranks} processes with experts "
                f"split {self.expert} ways; set it to {_nearest(shard, fitting)}"
            )
        return Layout(ranks, self.expert, shard)


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _nearest(asked: int, fitting: list[int]) -> str:
    """The next below and the next above that fit."""
    below, above = [n for n in fitting if n < asked], [n for n in fitting if n > asked]
    return " or ".join(map(str, [*below[-1:], *above[:1]]))


def _nearest_ranks(split: int, ranks: int, experts: int) -> str:
    """How many processes that split would need, where it fits the experts."""
    if experts % split:
        return ""
    fewer = ranks // split * split
    return f", or start {' or '.join(str(n) for n in (fewer, fewer + split) if n)} processes"
