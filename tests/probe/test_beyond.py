import math

import numpy as np
import pytest

from moestro.probe.measures.beyond import beyond_tokens
from moestro.probe.measures.specialise import specialisation

from .worlds import trace_of, world


def p_values(trials, **kwargs):
    """By chance alone, and by token identity: two arrays of p-values."""
    found = [specialisation(world(s, **kwargs), draws=79, seed=s) for s in range(trials)]
    return [np.array([each.p_value_L[0] for each in part]) for part in
            (found, [each.beyond for each in found])]  # fmt: skip


def at_most(rate, trials):
    return rate + 2.6 * math.sqrt(rate * (1 - rate) / trials)


@pytest.mark.parametrize(
    "text",
    [
        {"dialect": 1.0, "by_token": 2.0},
        {"dialect": 1.0, "by_token": 2.0, "by_document": 1.0, "documents": (8, 8)},
        {"dialect": 1.0, "by_document": 1.0, "documents": (3,) * 8},
        {"dialect": 1.0, "by_document": 1.0, "documents": (3, 5, 20)},
    ],
    ids=["tokens", "tokens and documents", "few documents", "uneven"],
)
def test_token_identity_and_documents_are_not_taken_for_topic(text):
    _, beyond = p_values(60, **text)
    assert (beyond <= 0.05).mean() <= at_most(0.05, 60)


def test_tokens_used_differently_are_told_from_tokens_routed_differently():
    chance, beyond = p_values(15, dialect=1.0, by_token=2.0)
    assert (chance <= 0.05).mean() > 0.8
    assert (beyond <= 0.05).mean() < 0.3
    chance, beyond = p_values(15, dialect=1.0, by_token=2.0, by_domain=0.6)
    assert (chance <= 0.05).mean() > 0.8
    assert (beyond <= 0.05).mean() > 0.8


def test_routing_by_token_id_alone_leaves_nothing():
    trace = world(0, dialect=1.0)
    experts = (trace.tokens_T % 8)[:, None, None]
    routed = trace_of(experts, trace.length_N, trace.domain_N, 8, tokens_T=trace.tokens_T)
    found = specialisation(routed, draws=99).beyond
    np.testing.assert_allclose(found.excess_LM, 0, atol=1e-12)
    np.testing.assert_allclose(found.tokens_LM, found.distance_LM)
    assert found.p_value_L.tolist() == [1.0]
    assert (found.tokens_LM > 0.1).all()


def test_a_known_excess():
    # Id 0 goes to expert 0 under one label and to expert 1 under the other, id 1 always to 2.
    tokens = np.array([0, 0, 1, 1] * 4)
    experts = np.where(tokens == 1, 2, np.arange(16) // 8)[:, None, None]
    trace = trace_of(experts, [4] * 4, [0, 0, 1, 1], 3, tokens_T=tokens)
    found = specialisation(trace, draws=99).beyond
    # On average id 0 goes to both experts alike, so a quarter of all assignments goes elsewhere.
    np.testing.assert_allclose(found.excess_LM, [[0.25, 0.25]])
    np.testing.assert_allclose(found.tokens_LM, [[0, 0]], atol=1e-12)
    np.testing.assert_allclose(found.distance_LM, [[0.25, 0.25]])
    assert found.shared_M.tolist() == [1, 1]


def test_only_tokens_under_several_labels_are_asked_about():
    # The labels share id 0, a quarter of the one and half of the other; of the rest nobody knows.
    tokens = np.array([0, 1, 1, 1] * 3 + [0, 0, 2, 2] * 3)
    experts = np.where(tokens == 0, 0, tokens)[:, None, None]
    trace = trace_of(experts, [4] * 6, [0] * 3 + [1] * 3, 3, tokens_T=tokens)
    found = specialisation(trace, draws=99)
    assert found.beyond.shared_M.tolist() == [0.25, 0.5]
    assert (found.distance_LM > 0.3).all()
    np.testing.assert_allclose(found.beyond.distance_LM, 0, atol=1e-12)
    np.testing.assert_allclose(found.beyond.excess_LM, 0, atol=1e-12)


def test_labels_without_common_tokens_leave_the_question_open():
    trace = world(0, documents=(4, 4), by_domain=2.0)
    apart = trace._replace(tokens_T=trace.tokens_T + 100 * trace.domain_T.astype(np.int32))
    found = specialisation(apart, draws=19).beyond
    assert found.shared_M.tolist() == [0, 0]
    assert np.isnan(found.excess_LM).all()
    assert np.isnan(found.p_value_L).all()
    assert not found.supported_L.any()


def test_documents_left_out_have_no_part():
    trace = world(0, documents=(5, 5, 5), dialect=1.0, by_token=1.0)
    label_P = np.where(trace.domain_N == 2, -1, trace.domain_N)
    one = beyond_tokens(trace, label_P, 2, draws=19)
    two = beyond_tokens(trace.choose(trace.domain_N < 2), label_P, 2, draws=19)
    np.testing.assert_allclose(one.excess_LM, two.excess_LM)
    np.testing.assert_allclose(one.p_value_L, two.p_value_L)


def test_the_interval_of_the_excess_covers_it():
    """Two labels, one id: the excess is half of the distance between the labels."""
    base = np.array([[4, 2, 1, 1], [1, 1, 2, 4]]) / 8
    truth = 0.25 * np.abs(base[0] - base[1]).sum()
    covered, trials, rng = 0, 60, np.random.default_rng(3)
    for trial in range(trials):
        p_PE = np.concatenate([rng.dirichlet(each * 20, size=12) for each in base])
        experts = np.concatenate([rng.choice(4, size=30, p=p_E) for p_E in p_PE])[:, None, None]
        trace = trace_of(experts, [30] * 24, [0] * 12 + [1] * 12, 4)
        low, high = specialisation(trace, draws=99, seed=trial).beyond.interval_LM2[0, 0]
        covered += low <= truth <= high
    assert covered / trials > 0.85


def test_one_document_of_each_label_has_no_interval_and_supports_nothing():
    found = specialisation(world(0, documents=(1, 1), by_domain=3.0), draws=99).beyond
    assert np.isnan(found.interval_LM2).all()
    assert np.isnan(found.tokens_interval_LM2).all()
    assert not found.supported_L.any()
    assert (found.excess_LM > 0).all()
