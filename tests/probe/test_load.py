import math

import numpy as np
import pytest

from moestro.probe.measures import load as m

from .traces import make_trace
from .worlds import trace_of, world


def test_load_of_a_known_trace():
    # Layer 0: expert 0 takes all. Layer 1: four experts evenly.
    experts = np.zeros((8, 2, 1), dtype=int)
    experts[:, 1, 0] = np.arange(8) % 4
    load = m.load(trace_of(experts, [4, 4], [0, 0], 4), draws=50)
    np.testing.assert_allclose(load.share_LE, [[1, 0, 0, 0], [0.25] * 4])
    np.testing.assert_allclose(load.share_interval_LE2[0], [[1, 1], [0, 0], [0, 0], [0, 0]])
    np.testing.assert_allclose(load.imbalance_L, [4.0, 1.0])
    np.testing.assert_allclose(load.imbalance_interval_L2, [[4, 4], [1, 1]])
    np.testing.assert_allclose(load.variation_L, [math.sqrt(3), 0.0])
    assert load.dead_L == ((1, 2, 3), ())
    assert load.dead_limit == pytest.approx(1 - math.sqrt(0.05))


def test_dropped_share_and_its_noise():
    trace = trace_of(np.zeros((20, 1, 2), dtype=int), [5] * 4, [0] * 4, 4)
    assert m.load(trace, draws=20).dropped_interval_L2.tolist() == [[0, 0]]
    kept = np.ones((20, 1, 2), dtype=bool)
    kept[:5, 0, 1] = False
    load = m.load(trace._replace(kept_TLK=kept), draws=200)
    assert load.dropped_L.tolist() == [5 / 40]
    assert load.dropped_interval_L2[0, 0] == 0
    assert 0.2 < load.dropped_interval_L2[0, 1] <= 0.5


def test_places_left_empty_are_no_assignments():
    trace = trace_of([[[0, 4]], [[4, 4]], [[1, 0]]], [3], [0], 4, top_k=0)
    np.testing.assert_allclose(m.load(trace, draws=5).share_LE, [[2 / 3, 1 / 3, 0, 0]])


def test_one_document_has_no_intervals():
    trace = world(0, documents=(1,))
    load, table = m.load(trace, draws=20), m.expert_table(trace, draws=20)
    assert np.isnan(load.share_interval_LE2).all()
    assert np.isnan(load.imbalance_interval_L2).all()
    assert np.isnan(table.interval_LME2).all()
    assert not table.supported_LME.any()
    assert np.isnan(m.entropy(trace, draws=20).balance_interval_L2).all()


def test_the_interval_of_a_share_covers_it_at_its_rate():
    # One world, of which each trial sees other documents.
    truth = m.load(world(0, documents=(3000,), by_document=1.0), draws=2).share_LE
    covered = []
    for trial in range(1, 60):
        load = m.load(world(trial, documents=(10, 10), by_document=1.0), draws=199, seed=trial)
        low, high = np.moveaxis(load.share_interval_LE2, -1, 0)
        covered.append(((low <= truth) & (truth <= high)).mean())
    assert 0.85 < np.mean(covered) < 0.99


def test_expert_table_is_each_domains_share_by_expert():
    experts = np.array([0, 0, 1, 1, 2, 2, 2, 1, 2, 2, 2, 2]).reshape(12, 1, 1)
    table = m.expert_table(trace_of(experts, [4, 4, 4], [0, 1, 1], 3), draws=20)
    np.testing.assert_allclose(table.share_LME, [[[0.5, 0.5, 0.0], [0.0, 1 / 8, 7 / 8]]])
    np.testing.assert_allclose(table.interval_LME2[0, 1, 2], [0.75, 1.0])
    assert np.isnan(table.p_value_LME).all()  # the only document of a domain tells nothing of it


def test_cells_are_claimed_together_at_no_more_than_the_stated_rate():
    # As few draws as can claim anything, so that each of them counts.
    claims, trials = 0, 200
    for trial in range(trials):
        trace = world(trial, documents=(4, 8, 12), length=20, by_document=1.0)
        claims += m.expert_table(trace, draws=19, seed=trial).supported_LME.any()
    assert claims / trials <= 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / trials)


def test_a_planted_cell_is_found_in_its_domain():
    trace = world(1, documents=(12, 12, 12), length=60)
    experts = trace.experts_TLK.copy()
    chosen = (trace.domain_T == 1) & (np.arange(len(experts)) % 3 == 0)
    experts[chosen] = 5
    table = m.expert_table(trace._replace(experts_TLK=experts), draws=199)
    assert table.supported_LME[0, 1, 5]
    assert table.share_LME[0, 1, 5] > table.interval_LME2[0, 1, 5, 0] > 1 / 8
    # Its domain uses the other experts less; the other domains only differ in this one.
    assert not table.supported_LME[0, [0, 2], :5].any()


def test_entropy_tells_balance_from_spread():
    # Each sequence uses one expert alone, all together use all evenly.
    experts = np.arange(4).repeat(6).reshape(24, 1, 1)
    entropy = m.entropy(trace_of(experts, [6] * 4, [0, 0, 1, 1], 4), draws=50)
    np.testing.assert_allclose(entropy.balance_L, [1.0])
    np.testing.assert_allclose(entropy.balance_LM, [[0.5, 0.5]])
    np.testing.assert_allclose(entropy.spread_L, [0.5], rtol=1e-6)
    np.testing.assert_allclose(entropy.spread_LM, [[0.5, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(entropy.spread_interval_LM2, np.full((1, 2, 2), 0.5), rtol=1e-6)


def test_means_are_over_tokens_not_sequences():
    trace = trace_of([[[0]], [[1]], [[1]], [[1]]], [1, 3], [0, 0], 2)
    np.testing.assert_allclose(m.entropy(trace, draws=5).balance_L, [0.811278], rtol=1e-5)
    margin = m.margin(trace._replace(margin_TL=np.array([[1.0], [0], [0], [0]])), draws=200)
    np.testing.assert_allclose(margin.mean_L, [0.25])
    assert margin.interval_L2[0, 0] == -0.5
    assert 0.25 < margin.interval_L2[0, 1] <= 0.5


def test_what_the_trace_does_not_know_is_none():
    trace = make_trace(logits=False)
    assert m.entropy(trace) is None
    assert m.margin(trace) is None
    partly = make_trace()
    partly.probs_NLE[:, 0], partly.entropy_TL[:, 0] = np.nan, np.nan
    found = m.entropy(partly, draws=10)
    assert np.isnan(found.balance_L).tolist() == [True, False]
    assert np.isnan(found.spread_interval_L2[0]).all()
    assert not np.isnan(found.spread_L[1])
