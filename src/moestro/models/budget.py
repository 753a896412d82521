"""What runs in an amount of memory: experts kept in it, bytes read for a token, tokens per second.

Plain arithmetic on sizes, for a plan and for a run alike.

A token wants K of E experts in each mixture; all together are its cycle. Of a share h, the hit
rate, the experts are in memory; the rest is read: (1 - h) · cycle bytes a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moestro.errors import ConfigError


class Mixture(NamedTuple):
    """The experts of one layer."""

    slab_bytes: int  # of an expert
    experts: int  # E
    top_k: int  # K


class Needs(NamedTuple):
    """Bytes of a running model by what they are for."""

    process: int  # the program and its libraries
    dense: int  # weights that every token needs
    cache: int  # keys and values, or states
    buffers: int  # what a step computes with
    mixtures: tuple[Mixture, ...]

    @property
    def fixed(self) -> int:
        """All but experts."""
        return self.process + self.dense + self.cache + self.buffers

    @property
    def cycle(self) -> int:
        """Bytes of the experts that a token wants."""
        return sum(each.top_k * each.slab_bytes for each in self.mixtures)

    @property
    def all_experts(self) -> int:
        """Bytes of all experts."""
        return sum(each.experts * each.slab_bytes for each in self.mixtures)


class Budget(NamedTuple):
    """What an amount of memory holds."""

    memory: int
    needs: Needs
    kept: tuple[int, ...]  # experts of each mixture

    @property
    def share(self) -> float:
        """The part of all experts' bytes that is kept."""
        kept = zip(self.needs.mixtures, self.kept, strict=True)
        return sum(each.slab_bytes * n for each, n in kept) / max(1, self.needs.all_experts)

    @property
    def below_cycle(self) -> bool:
        """Whether some mixture keeps fewer experts than one token wants."""
        pairs = zip(self.needs.mixtures, self.kept, strict=True)
        return any(kept < each.top_k for each, kept in pairs)

    def read_bytes(self, hit: float) -> float:
        """Bytes read for a token at a hit rate."""
        return (1 - hit) * self.needs.cycle


def fit(needs: Needs, memory: int) -> Budget:
    """Keep the same number of experts of each mixture, and one more of the first that fit.

    Raises:
        ConfigError: not even one expert of each mixture fits; says the smallest budget that works.
    """
    left, mixtures = memory - needs.fixed, needs.mixtures
    least = sum(each.slab_bytes for each in mixtures)
    if left < least:
        raise ConfigError(
            f"{_mib(memory)} of memory is too little: the process takes {_mib(needs.process)}, "
            f"weights that every token needs {_mib(needs.dense)}, the cache {_mib(needs.cache)}, "
            f"buffers {_mib(needs.buffers)}, and one expert of each mixture {_mib(least)}; the "
            f"smallest budget that works is {_mib(needs.fixed + least)}"
        )
    kept = [0] * len(mixtures)
    for number in range(max((each.experts for each in mixtures), default=0)):
        row = [n for n, each in enumerate(mixtures) if number < each.experts]
        for n in row:
            if mixtures[n].slab_bytes > left:
                return Budget(memory, needs, tuple(kept))
            left -= mixtures[n].slab_bytes
            kept[n] += 1
    return Budget(memory, needs, tuple(kept))


def hit_bounds(budget: Budget) -> tuple[float, float]:
    """Hit rates between which trained routers lie, where none was measured.

    Random routing finds exactly the share s that is kept. Published per-layer LRU caches of
    trained models lie below 1 - (1 - s)^9: 0.67 at s = 1/8, 0.81 at 1/4 and 0.90 to 0.95 at 0.4
    (llama.cpp #27861 and imp #1359, Qwen3; OLMoE 0.28 at 1/8 and 0.68 at 3/8).
    """
    share = budget.share
    return share, 1 - (1 - share) ** 9


def tokens_per_s(
    budget: Budget, hit: float, memory_rate: float, disk_rate: float, other_s: float = 0.0
) -> tuple[float, float]:
    """The least and most tokens per second of a single text.

    Weights pass once through the processor at `memory_rate` while what is missing is read at
    `disk_rate` (bytes per second): at worst one after the other, at best together.

    Args:
        budget: from `fit`.
        hit: the hit rate.
        memory_rate: of plain reading.
        disk_rate: of the file, expert by expert.
        other_s: seconds of a token that neither bounds.
    """
    compute = (budget.needs.dense + budget.needs.cycle) / memory_rate + other_s
    reading = budget.read_bytes(hit) / disk_rate
    return 1 / (compute + reading), 1 / max(compute, reading)


def mean_hit(budget: Budget, rate_LE: Sequence[Sequence[float]]) -> float:
    """The hit rate of the experts kept, from the rate of each mixture at each size from 1."""
    pairs = list(zip(rate_LE, budget.kept, strict=True))
    return sum(rate[kept - 1] for rate, kept in pairs) / len(pairs)


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
