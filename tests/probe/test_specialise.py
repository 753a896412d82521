import math

import numpy as np
import pytest

from moestro.errors import MoestroError
from moestro.probe.measures import specialise as m

from .worlds import trace_of, world

NAMES = ("en-prose", "de-prose", "en-code", "maths")


def rejected(trials, **kwargs):
    found = [
        m.specialisation(world(s, **kwargs), draws=99, seed=s).p_value_L for s in range(trials)
    ]
    return np.mean(np.array(found) <= 0.05)


def at_most(rate, trials):
    return rate + 2.6 * math.sqrt(rate * (1 - rate) / trials)


def test_distance_is_total_variation_from_the_average():
    # Two domains on different halves: the average is uniform, each half of the mass must move.
    experts = np.array([0, 1, 0, 1, 2, 3, 2, 3]).reshape(8, 1, 1)
    found = m.specialisation(trace_of(experts, [2] * 4, [0, 0, 1, 1], 4), draws=50)
    np.testing.assert_allclose(found.distance_LM, [[0.5, 0.5]])
    np.testing.assert_allclose(found.mean_L, [0.5])
    np.testing.assert_allclose(found.interval_LM2, [[[0.5, 0.5], [0.5, 0.5]]])
    assert found.documents_M.tolist() == [2, 2]
    assert found.labels == ("a", "b")


def test_routing_that_ignores_domains_is_claimed_at_no_more_than_the_stated_rate():
    assert rejected(100, documents=(6, 6, 6), length=20) <= at_most(0.05, 100)


def test_documents_with_habits_are_not_taken_for_domains():
    # Dealing single tokens would claim nearly all of these.
    assert rejected(100, documents=(6, 6, 6), length=20, by_document=1.0) <= at_most(0.05, 100)


def test_a_planted_difference_is_found_in_its_layer_only():
    plain, special = world(2, length=60, top_k=2), world(2, length=60, top_k=2, by_domain=0.5)
    experts = np.concatenate([plain.experts_TLK, special.experts_TLK], axis=1)
    trace = trace_of(experts, plain.length_N, plain.domain_N, 8, tokens_T=plain.tokens_T)
    found = m.specialisation(trace, draws=199)
    assert found.supported_L.tolist() == [False, True]
    assert found.mean_L[1] > found.mean_chance_high_L[1] > found.mean_chance_L[1] > 0.01


def test_documents_are_dealt_whole_whatever_their_sequences():
    # The same habits; each document cut into eight sequences.
    claims = {True: 0, False: 0}
    for seed in range(20):
        trace = world(seed, documents=(3, 3), length=160, by_document=1.0)
        rest_N = trace.length_N - 7 * (trace.length_N // 8)
        length_N = np.stack([trace.length_N // 8] * 7 + [rest_N], axis=1).ravel()
        domain_N = trace.domain_N.repeat(8)
        for whole in claims:
            document_N = np.arange(6).repeat(8) if whole else None
            cut = trace_of(trace.experts_TLK, length_N, domain_N, 8, document_N=document_N)
            claims[whole] += int(m.specialisation(cut, draws=79, seed=seed).supported_L[0])
    assert claims[True] <= 3
    assert claims[False] >= 15


@pytest.mark.parametrize(("strength", "documents"), [(1.0, 30), (0.5, 12)])
def test_the_interval_covers_the_true_distance(strength, documents):
    # Where differences are small, plain bootstrap quantiles are biased upwards and cover less.
    base = np.array([[3, 3, 1, 1, 1, 1, 1, 1], [1.5] * 8, [1, 1, 1, 1, 1, 1, 3, 3]]) / 12
    base = strength * base + (1 - strength) / 8
    truth = 0.5 * np.abs(base - base.mean(axis=0)).sum(axis=1)
    covered, trials, rng = 0, 40, np.random.default_rng(4)
    for trial in range(trials):
        p_PE = np.concatenate([rng.dirichlet(each * 20, size=documents) for each in base])
        keys_TE = np.log(p_PE.repeat(64, axis=0)) + rng.gumbel(size=(64 * len(p_PE), 8))
        experts = keys_TE.argmax(axis=1)[:, None, None]
        trace = trace_of(experts, [64] * len(p_PE), np.arange(3).repeat(documents), 8)
        low, high = np.moveaxis(
            m.specialisation(trace, draws=99, seed=trial).interval_LM2[0], -1, 0
        )
        covered += ((low <= truth) & (truth <= high)).sum()
    assert covered / (3 * trials) > 0.8


def test_the_only_document_of_a_label_tells_nothing_of_it():
    alone = m.specialisation(world(0, documents=(1, 1), by_domain=3.0), draws=99)
    assert np.isnan(alone.p_value_L).all()
    assert not alone.supported_L.any()
    assert np.isnan(alone.interval_LM2).all()
    assert (alone.distance_LM > 0.1).all()
    beside = m.specialisation(world(0, documents=(8, 8, 1), by_document=0.3), draws=99)
    assert np.isnan(beside.interval_LM2[0, :, 0]).tolist() == [False, False, True]
    assert not np.isnan(beside.p_value_L).any()


def test_groupings_by_pattern():
    assert m.by_domain(NAMES).label_M == NAMES
    assert m.by_pattern("language", "^([a-z]+)-", NAMES).label_M == ("en", "de", "en", None)
    with pytest.raises(MoestroError, match="has 0 groups"):
        m.by_pattern("language", "^[a-z]+-", NAMES)
    with pytest.raises(MoestroError, match="not a regular expression"):
        m.by_pattern("language", "(", NAMES)


def test_a_grouping_puts_domains_together_and_leaves_some_out():
    trace = world(0, documents=(4, 5, 6, 7), by_domain=1.0)._replace(domains=NAMES)
    found = m.specialisation(trace, m.by_pattern("language", "^([a-z]+)-", NAMES), draws=9)
    assert found.grouping == "language"
    assert found.labels == ("en", "de")
    assert found.documents_M.tolist() == [10, 5]
    renamed = trace._replace(
        domain_N=np.array([0, 1, 0, 2])[trace.domain_N], domains=("e", "d", "m")
    )
    other = m.specialisation(renamed, m.Grouping("x", ("e", "d", None)), draws=9)
    np.testing.assert_allclose(found.distance_LM, other.distance_LM)


def test_what_cannot_be_compared_is_refused():
    trace = world(0, documents=(4, 4))
    with pytest.raises(MoestroError, match="at least two labels"):
        m.specialisation(trace, m.Grouping("all", ("x", "x")))
    with pytest.raises(MoestroError, match="at least two labels"):
        m.specialisation(trace.choose(trace.domain_N == 0))
    with pytest.raises(MoestroError, match="3 labels for 2 domains"):
        m.specialisation(trace, m.Grouping("bad", ("x", "y", "z")))
    with pytest.raises(MoestroError, match="draws is 0"):
        m.specialisation(trace, draws=0)


def test_relabelling_experts_changes_nothing():
    trace = world(3, by_domain=0.5, top_k=2)
    names = np.random.default_rng(0).permutation(8).astype(np.uint8)
    one = m.specialisation(trace, draws=20)
    two = m.specialisation(trace._replace(experts_TLK=names[trace.experts_TLK]), draws=20)
    np.testing.assert_allclose(one.distance_LM, two.distance_LM)
    np.testing.assert_allclose(one.p_value_L, two.p_value_L)
    np.testing.assert_allclose(one.beyond.excess_LM, two.beyond.excess_LM)
