import numpy as np
import pytest

from moestro.errors import MoestroError
from moestro.probe.measures import tokens as m

from .worlds import trace_of, world


def leaning(documents=20, length=40, seed=0):
    """Token 3 goes to expert 1 nine times in ten, all others anywhere; ids are all as frequent."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(8, size=documents * length)
    experts = rng.integers(4, size=len(tokens))
    experts[(tokens == 3) & (rng.random(len(tokens)) < 0.9)] = 1
    return trace_of(
        experts[:, None, None], [length] * documents, [0] * documents, 4, tokens_T=tokens
    )


def test_token_table_counts():
    experts = np.array([[[0, 1]], [[1, 2]], [[1, 0]]])
    trace = trace_of(experts, [3], [0], 3, tokens_T=np.array([7, 4, 7]))
    table = m.token_table(trace, 0)
    assert table.token_U.tolist() == [4, 7]
    assert table.count_U.tolist() == [1, 2]
    assert table.counts_UE.tolist() == [[0, 1, 1], [2, 2, 0]]


def test_the_token_that_leans_to_an_expert_is_found_with_its_lift():
    trace = leaning()
    found = m.typical_tokens(trace, ranks=3)
    assert found.token_LEX.shape == (1, 4, 3)
    assert found.token_LEX[0, 1, 0] == 3
    rate = (trace.experts_TLK[trace.tokens_T == 3] == 1).mean()
    assert found.rate_LEX[0, 1, 0] == pytest.approx(rate)
    usual = (trace.experts_TLK == 1).mean()
    assert found.lift_LEX[0, 1, 0] == pytest.approx(rate / usual)
    assert 1 < found.low_LEX[0, 1, 0] < found.lift_LEX[0, 1, 0]
    assert found.count_LEX[0, 1, 0] == (trace.tokens_T == 3).sum()
    assert found.supported_LEX.sum() == 1  # of 12 listed, the only one that is true


def test_a_token_of_one_document_supports_nothing():
    trace = leaning(documents=1, length=800)
    found = m.typical_tokens(trace)
    assert found.token_LEX[0, 1, 0] == 3
    assert found.lift_LEX[0, 1, 0] > 1.5
    assert not found.supported_LEX.any()
    # Nearly so where one document holds nearly all of its occurrences.
    trace = leaning(documents=2, length=400)
    few = trace.tokens_T.copy()
    few[401:][few[401:] == 3] = 0
    assert not m.typical_tokens(trace._replace(tokens_T=few)).supported_LEX.any()


def test_random_routing_supports_no_token():
    claims = [
        m.typical_tokens(world(seed, by_document=0.5)).supported_LEX.any() for seed in range(60)
    ]
    assert np.mean(claims) <= 0.05 + 2.6 * (0.05 * 0.95 / 40) ** 0.5


def test_rare_tokens_and_unused_experts_have_empty_places():
    trace = trace_of(np.zeros((12, 1, 1)), [12], [0], 2, tokens_T=np.repeat([1, 2], [9, 3]))
    found = m.typical_tokens(trace, ranks=2, min_count=4)
    assert found.token_LEX[0].tolist() == [[1, -1], [-1, -1]]
    assert found.min_count == 4
    assert np.isnan(found.lift_LEX[0, 1]).all()
    assert not found.supported_LEX[0, 1].any()


@pytest.mark.parametrize("predictor", [0, 1, 2, 3])
def test_what_decides_the_routing_explains_it(predictor):
    trace = world(1, documents=(10, 10), length=60, vocabulary=8, layers=2)
    position = trace.position_T
    token = trace.tokens_T.astype(np.int64)
    previous = np.where(position == 0, 9, np.roll(token, 1))
    following = np.where(np.roll(position, -1) == 0, 9, np.roll(token, -1))
    decided = [token, previous, following, np.ceil(np.log2(position + 1)).astype(int)][predictor]
    experts = trace.experts_TLK.copy()
    experts[:, 1, 0] = decided % 8
    found = m.explained(trace._replace(experts_TLK=experts), draws=99)
    assert (
        found.predictors[predictor]
        == ("token", "previous token", "next token", "position")[predictor]
    )
    assert found.accuracy_LJ[1, predictor] > 0.99
    assert found.explained_LJ[1, predictor] > 0.99
    others = np.delete(found.explained_LJ[1], predictor)
    assert (others < 0.5).all()
    assert (found.explained_LJ[0] < 0.05).all()  # random routing: nothing to tell


def test_random_routing_is_not_explained_by_learning_it_by_heart():
    # 800 ids for 2000 tokens: tested on the tokens learnt from, identity would tell half of them.
    trace = world(2, documents=(20,), length=100, vocabulary=800)
    found = m.explained(trace, draws=199)
    low, high = found.explained_interval_LJ2[0, 0]
    assert low < 0
    assert high < 0.05
    assert found.majority_interval_L2[0, 0] < found.majority_L[0] < found.majority_interval_L2[0, 1]
    assert 0.05 < found.unseen_J[0] < 0.9
    assert found.unseen_J[3] < 0.01  # the last places of the longest sequence


def test_known_shares():
    # Half the tokens are id 0 (always expert 0), the others id 1 (always expert 1), and one of 2.
    tokens = np.array([0, 0, 1, 1] * 2 + [0, 0, 1, 2])
    experts = np.where(tokens == 0, 0, 1)[:, None, None]
    found = m.explained(trace_of(experts, [4] * 3, [0] * 3, 2, tokens_T=tokens), draws=9)
    # Of equally frequent experts the first is named: expert 0, right for half of the tokens.
    assert found.majority_L.tolist() == [0.5]
    assert found.accuracy_LJ[0, 0] == pytest.approx(11 / 12)  # id 2 is in one document only
    assert found.explained_LJ[0, 0] == pytest.approx(5 / 6)
    assert found.unseen_J[0] == pytest.approx(1 / 12)


def test_what_cannot_be_told_is_refused():
    with pytest.raises(MoestroError, match="one document only"):
        m.explained(world(0, documents=(1,)))
    trace = world(0)
    with pytest.raises(MoestroError, match="expert choice"):
        m.explained(trace._replace(subject=trace.subject._replace(top_k=0)))


def test_a_single_expert_leaves_nothing_to_explain():
    found = m.explained(world(0, experts=1), draws=9)
    assert found.majority_L.tolist() == [1.0]
    assert np.isnan(found.explained_LJ).all()
