"""Texts that were read before, so that what several requests begin with is computed once.

Where a decoding `cuts_exactly`, a past can be taken up at any token, and what a request gets does
not depend on whether its beginning was known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moestro.models.cache import KVCache

# A shorter beginning costs as much to copy and keep as to compute.
SHORTEST = 16


@dataclass
class _Kept:
    tokens_S: NDArray[np.int64]
    past: KVCache

    @property
    def nbytes(self) -> int:
        return self.past.nbytes + self.tokens_S.nbytes


class Prefixes:
    """Pasts by their tokens; of more than `most_bytes`, the least recently used go.

    Args:
        most_bytes: of all pasts together.

    Attributes:
        asked: tokens of all prompts that were looked up.
        hits: of these, those whose past was known.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.asked = self.hits = 0
        self._kept: list[_Kept] = []  # the least recently used first

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(each.nbytes for each in self._kept)

    def find(
        self, tokens: Sequence[int], running: Iterable[tuple[Sequence[int], KVCache]] = ()
    ) -> KVCache | None:
        """A past of its own for a prompt, of as many of its tokens as are known; None: too few.

        At least the last token is left, since its logits are wanted.

        Args:
            tokens: of the prompt.
            running: texts that are being read or written, as (what has passed, their past).
        """
        wanted_S = np.asarray(tokens, np.int64)
        self.asked += len(wanted_S)
        best: tuple[int, KVCache, _Kept | None] | None = None
        others = [(np.asarray(passed, np.int64), past, None) for passed, past in running]
        kept = [(each.tokens_S, each.past, each) for each in self._kept]
        for passed_S, past, owner in (*others, *kept):
            shared = min(_shared(passed_S, wanted_S), len(wanted_S) - 1)
            longer = shared >= SHORTEST and (best is None or shared > best[0])
            if longer and past.can_cut(shared):
                best = (shared, past, owner)
        if best is None:
            return None
        shared, past, owner = best
        if owner is not None:
            self._kept = [each for each in self._kept if each is not owner] + [owner]
        self.hits += shared
        return past.fork(shared)

    def keep(self, tokens: Sequence[int], past: KVCache) -> None:
        """Take the past of a text that is done; nothing else may write to it from now on."""
        new = _Kept(np.asarray(tokens, np.int64), past)
        if len(new.tokens_S) < SHORTEST or new.nbytes > self.most_bytes:
            return
        # A beginning of it is not needed any more.
        self._kept = [
            each
            for each in self._kept
            if _shared(each.tokens_S, new.tokens_S) < len(each.tokens_S)
            or not past.can_cut(len(each.tokens_S))
        ]
        self._kept.append(new)
        room = self.most_bytes - self.nbytes
        while room < 0:
            room += self._kept.pop(0).nbytes


def _shared(one_S: NDArray[np.int64], other_S: NDArray[np.int64]) -> int:
    """With how many equal tokens two texts begin."""
    length = min(len(one_S), len(other_S))
    unequal = np.flatnonzero(one_S[:length] != other_S[:length])
    return int(unequal[0]) if len(unequal) else length
