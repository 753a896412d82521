"""How fast a token passes when some of its experts are read from a file: arithmetic on rates.

A token takes the time of one whose experts are all in memory, and for each mixture what its misses
add. Those that miss are read while the others are computed, so what they add is not their number
times anything: it is measured, or estimated from rates, for each number of them.

Letters: L mixtures, M = K + 1 numbers of misses, from none to all K experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import NamedTuple

from moestro.models.budget import Budget

# Seconds of a token outside of native code: from a step alone to text that is written.
OUTSIDE_S = (0.2e-3, 2e-3)


class Pace(NamedTuple):
    """Seconds of a token, for a text of its own."""

    compute_s: float  # where all of its experts are in memory
    missed_M: tuple[float, ...]  # what so many misses of one mixture add, of the mean size


class Rates(NamedTuple):
    """What a machine does, before a model is opened."""

    memory: float  # bytes per second of reading memory
    call_s: float  # of a native call that does next to nothing
    alone: float  # bytes per second of reading the file, an expert at a time
    together: float  # several experts at a time


def tokens_per_s(budget: Budget, pace: Pace, share_LM: Sequence[Sequence[float]]) -> float:
    """Tokens per second of a single text.

    Args:
        budget: from `budget.fit`.
        pace: of the machine and the model.
        share_LM: of tokens that miss so many of each mixture's experts; see `independent`.
    """
    mixtures = budget.needs.mixtures
    mean = sum(each.slab_bytes for each in mixtures) / max(1, len(mixtures))
    total = pace.compute_s
    for each, share_M in zip(mixtures, share_LM, strict=True):
        added = sum(share * cost for share, cost in zip(share_M, pace.missed_M, strict=True))
        total += added * each.slab_bytes / mean
    return 1 / total


def independent(budget: Budget, hit: float) -> list[list[float]]:
    """Shares of tokens by misses [L, M], where each expert is in memory by chance.

    A mixture that keeps all of its experts misses none.
    """
    found = []
    for each, kept in zip(budget.needs.mixtures, budget.kept, strict=True):
        k, rate = each.top_k, 1.0 if kept >= each.experts else hit
        found.append([comb(k, m) * (1 - rate) ** m * rate ** (k - m) for m in range(k + 1)])
    return found


def hit_rate(share_LM: Sequence[Sequence[float]]) -> float:
    """The share of the wanted experts that is in memory."""
    wanted = sum(len(share_M) - 1 for share_M in share_LM)
    missed = sum(m * share for share_M in share_LM for m, share in enumerate(share_M))
    return 1 - missed / max(1, wanted)


def missed_bytes(budget: Budget, share_LM: Sequence[Sequence[float]]) -> float:
    """Bytes read for a token."""
    pairs = zip(budget.needs.mixtures, share_LM, strict=True)
    return sum(
        each.slab_bytes * m * share for each, share_M in pairs for m, share in enumerate(share_M)
    )


def estimate(budget: Budget, rates: Rates) -> tuple[Pace, Pace]:
    """The slowest and the fastest that rates let expect, before a model is opened.

    Weights pass at half to all of the rate of plain reading, and a layer is one to five calls. At
    worst experts are read one by one before the others are computed; at best together, meanwhile.
    """
    needs, layers = budget.needs, max(1, len(budget.needs.mixtures))
    slab = sum(each.slab_bytes for each in needs.mixtures) / layers
    top_k = max((each.top_k for each in needs.mixtures), default=0)
    plain_s, expert_s = (needs.dense + needs.cycle) / rates.memory, slab / rates.memory
    slow = tuple(m * slab / rates.alone for m in range(top_k + 1))
    fast = tuple(
        max(0.0, m * slab / max(rates.together, rates.alone) - (top_k - m) * expert_s)
        for m in range(top_k + 1)
    )
    return (
        Pace(2 * plain_s + 5 * layers * rates.call_s + OUTSIDE_S[1], slow),
        Pace(plain_s + layers * rates.call_s + OUTSIDE_S[0], fast),
    )
