"""Span corruption, the objective of T5: hide a few spans of a text and predict them.

Raffel et al. 2020, §3.1.4 and §3.3: 15 % of the tokens, in spans of 3 on average. Each span becomes
one sentinel in the source; the target is each sentinel and what it hides. Sentinels are the last
ids of the vocabulary, counting down. As in T5's own runs both end with the end-of-text token; the
paper's figure 2 draws one more sentinel at the end of the target instead.

Letters: S tokens of a text, N hidden ones, P spans.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moestro.data.documents import stable_hash
from moestro.errors import DataError

Ids = NDArray[np.int64]
DENSITY = 0.15
MEAN_SPAN = 3.0


class Hidden(NamedTuple):
    """How much is hidden: a function of the length alone, so texts of one length stay of one.

    Attributes:
        tokens: N, from 1 to S - 1.
        spans: P, at most N, and at most S - N.
    """

    tokens: int
    spans: int


class Corrupted(NamedTuple):
    """One text after corruption.

    Attributes:
        source: int64 [S - N + P + 1], the text with a sentinel for each span, and the end.
        target: int64 [N + P + 1], each sentinel with what it hides, and the end.
    """

    source: Ids
    target: Ids


def hidden(length: int) -> Hidden:
    """How much of a text of S = `length` tokens, at least 2, is hidden."""
    if length < 2:
        raise DataError(f"a text of {length} tokens has no span to hide; give at least 2")
    tokens = min(max(round(length * DENSITY), 1), length - 1)
    return Hidden(tokens, min(max(round(tokens / MEAN_SPAN), 1), length - tokens))


def corrupt(tokens_S: Ids, vocab_size: int, end: int, seed: tuple[object, ...]) -> Corrupted:
    """Hide random spans, no two of which touch; all such choices are equally likely.

    Args:
        tokens_S: int64, a text; no sentinel among them.
        vocab_size: The model's, V; the first span's sentinel is V - 1, the second's V - 2.
        end: The id that ends source and target.
        seed: What the choice is a function of, whatever the machine and NumPy's version.
    """
    length = len(tokens_S)
    num_hidden, num_spans = hidden(length)
    if tokens_S.max() >= vocab_size - num_spans:
        raise DataError(
            f"the text holds the id {tokens_S.max()}, but of a vocabulary of {vocab_size} the last "
            f"{num_spans} ids stand for hidden spans; give the model a larger vocabulary"
        )
    bits = np.random.PCG64(stable_hash("spans", *seed))
    gone_P = _lengths(num_hidden, num_spans, bits)
    # What is kept lies around and between the spans: only the first and last part may be empty.
    kept_P = _lengths(length - num_hidden + 2, num_spans + 1, bits)
    kept_P[[0, -1]] -= 1
    source: list[Ids] = []
    target: list[Ids] = []
    place = 0
    for number, (kept, gone) in enumerate(zip(kept_P, gone_P, strict=False)):
        sentinel, border = np.array([vocab_size - 1 - number]), place + kept
        source += [tokens_S[place:border], sentinel]
        target += [sentinel, tokens_S[border : border + gone]]
        place = border + gone
    return Corrupted(_joined([*source, tokens_S[place:]], end), _joined(target, end))


def _lengths(total: int, parts: int, bits: np.random.PCG64) -> Ids:
    """`total` cut at random places into non-empty `parts`."""
    # The raw bits of a bit generator are the same in every NumPy; its choices need not be.
    cuts = np.argsort(bits.random_raw(total - 1), kind="stable")[: parts - 1] + 1
    borders: Ids = np.concatenate([[0], np.sort(cuts), [total]])
    lengths: Ids = borders[1:] - borders[:-1]
    return lengths


def _joined(pieces: list[Ids], end: int) -> Ids:
    return np.concatenate([*pieces, np.array([end])]).astype(np.int64)
