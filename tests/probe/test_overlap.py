import itertools
import math

import numpy as np
import pytest

from moestro.errors import MoestroError
from moestro.probe.measures import overlap as m

from .worlds import trace_of, world


def independent(seed, factors, top_k, documents=12, length=40):
    """Sets of K experts, each as likely as the product of its experts' factors."""
    rng = np.random.default_rng(seed)
    sets = np.array(list(itertools.combinations(range(len(factors)), top_k)))
    likely = factors[sets].prod(axis=1)
    length_N = rng.integers(length // 2, 2 * length, size=documents)
    drawn = sets[rng.choice(len(sets), size=length_N.sum(), p=likely / likely.sum())]
    return trace_of(drawn[:, None], length_N, [0] * documents, len(factors))


def test_coactivation_of_a_known_trace():
    # Expert 0 in four tokens: twice with 1, once with 2, once with 3.
    experts = np.array([[[0, 1]], [[1, 0]], [[0, 2]], [[3, 0]]])
    found = m.coactivation(trace_of(experts, [2, 2], [0, 0], 4), draws=9)
    np.testing.assert_allclose(found.given_LEE[0, 0, 1:], [0.5, 0.25, 0.25])
    np.testing.assert_allclose(found.given_LEE[0, 1:, 0], [1, 1, 1])
    assert np.isnan(found.given_LEE[0].diagonal()).all()
    # Expert 0 is in every token, so that its partners cannot depend on it.
    np.testing.assert_allclose(found.ratio_LEE[0, 0, 1:], 1, rtol=1e-6)
    assert found.pairs == ()


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (6, 3), (6, 5)])
def test_the_null_is_exact_for_independent_choice(num_experts, top_k):
    sets = np.array(list(itertools.combinations(range(num_experts), top_k)))
    onehot = (sets[..., None] == np.arange(num_experts)).any(axis=1)
    counts = (1 + sets).prod(axis=1)  # the factors are 1, 2, 3, and each set occurs as it should
    truth = (onehot * counts[:, None]).T @ onehot
    experts = sets.repeat(counts, axis=0)[:, None]
    found = m.coactivation(trace_of(experts, [len(experts)], [0], num_experts), draws=1)
    apart = ~np.eye(num_experts, dtype=bool)
    expected = truth / truth.diagonal()[:, None]
    np.testing.assert_allclose(found.independent_LEE[0][apart], expected[apart], rtol=1e-5)
    np.testing.assert_allclose(found.ratio_LEE[0][apart], 1, rtol=1e-5)
    assert np.isnan(found.ratio_interval_LEE2).all()  # a single document


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (6, 3)])
def test_independent_pairs_stand_out_at_no_more_than_the_stated_rate(num_experts, top_k):
    # Loads are uneven, and some pairs hardly occur.
    claims, trials = 0, 40
    for trial in range(trials):
        factors = np.exp(np.random.default_rng(trial).normal(size=num_experts))
        trace = independent(trial, factors, top_k)
        claims += bool(m.coactivation(trace, draws=99, seed=trial).pairs)
    assert claims / trials <= 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / trials)


def test_a_planted_pair_stands_out_with_its_ratio():
    trace = independent(0, np.ones(6), 2, documents=30)
    experts = trace.experts_TLK.copy()
    experts[::6, 0] = [2, 5]
    found = m.coactivation(trace._replace(experts_TLK=experts), draws=199)
    pair = found.pairs[0]
    assert pair.layer == 0
    assert pair.experts == (2, 5)
    assert 1 < pair.low < pair.ratio < pair.high
    both = ((experts == 2).any(axis=2) & (experts == 5).any(axis=2)).mean()
    assert pair.together == pytest.approx(both)
    assert pair.independent == pytest.approx(both / pair.ratio)
    np.testing.assert_allclose(found.ratio_LEE[0, 5, 2], pair.ratio)
    assert found.p_value_LEE[0, 2, 5] == found.p_value_LEE[0, 5, 2] == 1 / 200


def test_the_interval_of_a_ratio_covers_it():
    inside = []
    for trial in range(25):
        found = m.coactivation(independent(trial, np.array([3.0, 2, 1, 1, 1]), 2), draws=1)
        low, high = np.moveaxis(found.ratio_interval_LEE2[0][np.triu_indices(5, 1)], -1, 0)
        inside.append(((low <= 1) & (high >= 1)).mean())
    assert 0.88 < np.mean(inside) < 0.995


def test_coactivation_needs_several_experts_a_token():
    with pytest.raises(MoestroError, match="of which this model has 1"):
        m.coactivation(world(0))
    trace = world(0, top_k=2)
    with pytest.raises(MoestroError, match="expert choice"):
        m.coactivation(trace._replace(subject=trace.subject._replace(top_k=0)))


def test_layers_that_copy_each_other_share_all_and_unrelated_ones_nothing():
    trace = world(0, documents=(10, 10), layers=3)
    experts = trace.experts_TLK.copy()
    experts[:, 1] = (experts[:, 0] + 3) % 8  # other names
    found = m.layer_overlap(trace._replace(experts_TLK=experts), draws=99)
    np.testing.assert_allclose(found.information_L[0], 1, rtol=1e-9)
    low, high = found.interval_L2[1]
    assert abs(found.information_L[1]) < 0.02
    assert low < 0.01
    assert high < 0.04
    assert 0.005 < found.chance_L[1] < 0.1  # what finite text alone would have shown


def test_half_copied_layers_lie_within_their_interval():
    # A layer copies the last one's choice for half of the tokens: 8 experts, used alike.
    def copied(seed, documents):
        trace = world(seed, documents=(documents,), layers=2)
        experts = trace.experts_TLK.copy()
        same = np.random.default_rng(seed).random(len(experts)) < 0.5
        experts[same, 1] = experts[same, 0]
        return trace._replace(experts_TLK=experts)

    same, other = 1 / 2 + 1 / 16, 1 / 16
    truth = 1 + (same * math.log(same) + 7 * other * math.log(other)) / math.log(8)
    covered = 0
    for seed in range(20):
        low, high = m.layer_overlap(copied(seed, 30), draws=79, seed=seed).interval_L2[0]
        covered += low <= truth <= high
    assert covered >= 16


def test_layer_overlap_needs_two_layers_and_first_choices():
    with pytest.raises(MoestroError, match="there is one only"):
        m.layer_overlap(world(0))
    trace = world(0, layers=2)
    with pytest.raises(MoestroError, match="expert choice"):
        m.layer_overlap(trace._replace(subject=trace.subject._replace(top_k=0)))
    assert np.isnan(m.layer_overlap(world(0, documents=(1,), layers=2), draws=9).interval_L2).all()


def test_a_single_expert_has_nothing_to_share():
    assert m.layer_overlap(world(0, experts=1, layers=2), draws=9).information_L.tolist() == [0.0]
