"""Tokens per second from what a token and its misses take."""

import pytest

from moestro.models.budget import Budget, Mixture, Needs
from moestro.models.pace import (
    OUTSIDE_S,
    Pace,
    Rates,
    estimate,
    hit_rate,
    independent,
    missed_bytes,
    tokens_per_s,
)

SLAB = 1000
BUDGET = Budget(0, Needs(0, 4000, 0, 0, (Mixture(SLAB, 8, 2), Mixture(3 * SLAB, 8, 2))), (4, 8))


def test_a_token_takes_its_computing_and_what_its_misses_add():
    """By hand: misses of the second mixture, whose experts are larger than the mean, cost more."""
    pace = Pace(0.010, (0.0, 0.002, 0.003))
    shares = [[0.5, 0.25, 0.25], [0.9, 0.1, 0.0]]
    seconds = 0.010 + 0.5 * (0.25 * 0.002 + 0.25 * 0.003) + 1.5 * 0.1 * 0.002
    assert 1 / tokens_per_s(BUDGET, pace, shares) == pytest.approx(seconds)
    assert hit_rate(shares) == pytest.approx(1 - (0.25 + 0.5 + 0.1) / 4)
    assert missed_bytes(BUDGET, shares) == pytest.approx(SLAB * (0.25 + 0.5) + 3 * SLAB * 0.1)


def test_independent_misses_have_the_hit_rate():
    first, whole = independent(BUDGET, 0.7)
    assert first == pytest.approx([0.49, 0.42, 0.09])
    assert whole == [1, 0, 0]  # all of its experts are kept
    assert hit_rate([first]) == pytest.approx(0.7)


def test_an_estimate_is_a_range_around_what_overlaps():
    rates = Rates(memory=1e6, call_s=1e-4, alone=2e5, together=4e5)
    slow, fast = estimate(BUDGET, rates)
    # 4000 + 8000 bytes at half and all of the rate, 5 calls or one a layer.
    assert slow.compute_s == pytest.approx(0.024 + 1e-3 + OUTSIDE_S[1])
    assert fast.compute_s == pytest.approx(0.012 + 2e-4 + OUTSIDE_S[0])
    assert slow.missed_M == pytest.approx((0, 0.01, 0.02))  # mean slab 2000 bytes
    assert fast.missed_M == pytest.approx((0, 0.005 - 0.002, 0.010))
    shares = independent(BUDGET, 0.5)
    assert tokens_per_s(BUDGET, slow, shares) < tokens_per_s(BUDGET, fast, shares)
