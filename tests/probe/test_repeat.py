from itertools import permutations

import numpy as np
import pytest

from moestro.errors import MoestroError
from moestro.probe.measures.repeat import repetition

from .worlds import trace_of, world


def test_repetition_of_uniform_routing_matches_mixtrals_nulls():
    found = repetition(world(0, documents=(60, 60), length=200, top_k=2))
    assert found.first_uniform == pytest.approx(0.125)
    assert found.any_uniform == pytest.approx(0.464, abs=5e-4)
    np.testing.assert_allclose(found.any_shuffled_LM, 0.464, atol=0.015)
    assert (np.abs(found.first_LM - 0.125) < 4 * found.first_error_LM).all()
    assert (np.abs(found.any_LM - found.any_uniform) < 4 * found.any_error_LM).all()
    assert (found.first_error_LM < 0.01).all()


def test_repetition_of_known_sequences():
    # Domain a repeats first choices always; domain b shares one expert with the next at every
    # second step only, never the first choice.
    a = [[0, 1], [0, 2], [0, 3], [0, 1], [0, 2]]
    b = [[0, 1], [1, 2], [3, 0], [0, 1], [2, 3]]
    found = repetition(trace_of(np.array(a + b)[:, None], [5, 5], [0, 1], 4))
    np.testing.assert_allclose(found.first_LM, [[1.0, 0.0]])
    np.testing.assert_allclose(found.any_LM, [[1.0, 0.5]])
    np.testing.assert_allclose(found.first_shuffled_LM, [[1.0, 2 / (5 * 4)]])
    assert np.isnan(found.first_error_LM).all()


def test_the_last_token_of_one_sequence_is_no_neighbour_of_the_next():
    experts = np.array([0, 1, 1, 0, 0, 1])[:, None, None]
    assert repetition(trace_of(experts, [2, 2, 2], [0] * 3, 2)).first_LM.tolist() == [[0.0]]
    assert repetition(trace_of(experts, [6], [0], 2)).first_LM.tolist() == [[0.4]]


def test_errors_are_over_documents():
    # Two documents: one repeats always, one never; its sequences are no new evidence.
    experts = np.array([0, 0, 0, 0, 0, 1, 0, 1])[:, None, None]
    found = repetition(trace_of(experts, [2] * 4, [0] * 4, 2, document_N=[0, 0, 1, 1]))
    assert found.first_LM.tolist() == [[0.5]]
    np.testing.assert_allclose(found.first_error_LM, [[0.5]])  # s / sqrt(2) of the rates 1 and 0


def test_skewed_loads_repeat_by_themselves_and_the_shuffled_null_says_so():
    rng = np.random.default_rng(7)
    experts = rng.choice(4, p=np.array([13, 1, 1, 1]) / 16, size=6000)[:, None, None]
    found = repetition(trace_of(experts, [100] * 60, [0] * 60, 4))
    expected = (13**2 + 3) / 256
    assert found.first_uniform == 0.25
    np.testing.assert_allclose(found.first_LM, expected, atol=0.03)
    np.testing.assert_allclose(found.first_shuffled_LM, expected, atol=0.03)
    np.testing.assert_array_equal(found.any_LM, found.first_LM)  # K = 1


def test_shuffled_is_the_mean_over_all_orders_of_the_tokens():
    rng = np.random.default_rng(0)
    experts_TK = np.argsort(rng.random((6, 4)))[:, :2]
    every = [experts_TK[list(order)] for order in permutations(range(6))]
    found = [repetition(trace_of(own_TK[:, None], [6], [0], 4)) for own_TK in every]
    first, any_ = (np.mean([each[field] for each in found]) for field in (0, 1))
    assert 0 < first < any_ < 1
    np.testing.assert_allclose(found[0].first_shuffled_LM, first)
    # From draws, so the mean over what each order drew.
    assert np.mean([each.any_shuffled_LM for each in found]) == pytest.approx(any_, abs=0.01)


def test_no_token_is_its_own_neighbour():
    experts = np.array([[0, 1], [2, 3], [4, 5]])[:, None]  # no two share any
    found = repetition(trace_of(experts, [3], [0], 6))
    assert found.first_shuffled_LM.tolist() == found.any_shuffled_LM.tolist() == [[0.0]]


def test_neighbours_that_know_nothing_of_each_other_are_on_average_as_shuffled():
    """Many experts and short domains, where a token that is paired with itself would be seen."""
    excess = []
    for seed in range(40):
        trace = world(seed, documents=(12,) * 7, length=36, experts=128, vocabulary=50)
        found = repetition(trace)
        excess.append((found.first_LM - found.first_shuffled_LM).mean())
    assert abs(np.mean(excess)) < 3 * np.std(excess, ddof=1) / len(excess) ** 0.5


def test_what_has_no_neighbours():
    trace = world(0)
    with pytest.raises(MoestroError, match="expert choice"):
        repetition(trace._replace(subject=trace.subject._replace(top_k=0)))
    singles = trace_of(np.zeros((3, 1, 1)), [1, 1, 1], [0, 0, 1], 2)
    with pytest.raises(MoestroError, match="at least 2 tokens"):
        repetition(singles)
    found = repetition(trace_of(np.zeros((4, 1, 1)), [3, 1], [0, 1], 2))
    assert found.first_LM[0, 0] == 1
    assert np.isnan(found.first_LM[0, 1])
