import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.data.spans import Corrupted, corrupt, hidden
from moestro.errors import DataError

VOCAB, END = 1000, 1


def restored(found: Corrupted) -> list[int]:
    """The text: each sentinel of the source replaced by what follows it in the target."""
    spans, text = {}, []
    for token in found.target[:-1]:
        if token >= 900:
            spans[token] = last = []
        else:
            last.append(token)
    for token in found.source[:-1]:
        text += spans.pop(token) if token >= 900 else [token]
    assert not spans
    return text


@given(st.integers(2, 600), st.integers(0, 2**40))
def test_source_and_target_together_are_the_text(length: int, seed: int) -> None:
    tokens_S = np.arange(length) % 700 + 2
    found = corrupt(tokens_S, VOCAB, END, (seed,))
    assert restored(found) == tokens_S.tolist()
    num_hidden, num_spans = hidden(length)
    assert len(found.source) == length - num_hidden + num_spans + 1
    assert len(found.target) == num_hidden + num_spans + 1
    assert found.source[-1] == found.target[-1] == END
    sentinels = [VOCAB - 1 - n for n in range(num_spans)]
    for side in found:
        assert [token for token in side if token >= 900] == sentinels
        assert side.dtype == np.int64
    # No span is empty, and no two touch.
    assert not set(np.diff(np.flatnonzero(found.source >= 900))) & {1}
    assert not set(np.diff(np.flatnonzero(found.target >= 900))) & {1}


def test_how_much_is_hidden() -> None:
    assert hidden(512) == (77, 26)  # T5's own numbers for its sources of 512 tokens
    assert hidden(2) == (1, 1)
    assert hidden(20) == (3, 1)


def test_all_choices_are_equally_likely() -> None:
    """Of 12 tokens 2 are hidden, in one span: it has 11 places."""
    tokens_S, draws = np.arange(12) + 2, 4400
    targets = [corrupt(tokens_S, VOCAB, END, (seed,)).target.tolist() for seed in range(draws)]
    counts = [targets.count([999, first, first + 1, END]) for first in range(2, 13)]
    assert sum(counts) == draws
    assert all(320 < count < 480 for count in counts)  # 400, four deviations either way


def test_where_spans_lie_and_how_long_they_are() -> None:
    length, draws = 100, 1000
    tokens_S, counts_S, lengths = np.arange(length) + 2, np.zeros(length), []
    for seed in range(draws):
        target = corrupt(tokens_S, VOCAB, END, (seed,)).target[:-1]
        counts_S[target[target < 900] - 2] += 1
        lengths += np.diff([*np.flatnonzero(target >= 900), len(target)]).tolist()
    assert counts_S.sum() == 15 * draws
    # At the edges fewer spans can hide a token.
    assert counts_S.min() / draws > 0.03
    assert np.abs(counts_S[10:90] / draws - 0.15).max() < 0.05
    assert set(lengths) == set(range(2, 13))  # a sentinel and 1 to 11: 15 in 5 spans


def test_it_is_a_function_of_the_seed() -> None:
    tokens_S = np.arange(200) + 2
    first, again, other = (
        corrupt(tokens_S, VOCAB, END, seed).target.tolist() for seed in ((1, 2), (1, 2), (1, 3))
    )
    assert first == again != other
    # This one must never change: a run that is resumed elsewhere sees the same spans.
    short = corrupt(np.arange(2, 42), VOCAB, END, ("fixed",))
    assert short.target.tolist() == [999, 6, 7, 8, 998, 38, 39, 40, 1]


def test_too_little_text_and_a_full_vocabulary_are_refused() -> None:
    with pytest.raises(DataError, match="at least 2"):
        corrupt(np.array([5]), VOCAB, END, (0,))
    with pytest.raises(DataError, match="holds the id 299, but of a vocabulary of 300 the last"):
        corrupt(np.arange(300), 300, END, (0,))
