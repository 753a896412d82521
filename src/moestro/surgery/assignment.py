"""The linear assignment problem: each row a column of its own, at the least cost in all."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def cheapest(cost_FF: NDArray[np.float64]) -> NDArray[np.int64]:
    """The column of each row, a permutation of least Σ cost.

    Shortest augmenting paths with dual prices (Jonker and Volgenant 1987), O(F³).

    Args:
        cost_FF: square, finite.
    """
    size = len(cost_FF)
    # Index `size` stands for "none yet": of columns, the root of each search.
    row_of = np.full(size + 1, -1)
    row_price, column_price = np.zeros(size), np.zeros(size + 1)
    for new in range(size):
        row_of[size], column = new, size
        least, before = np.full(size, np.inf), np.full(size, size)
        done = np.zeros(size + 1, dtype=bool)
        while row_of[column] >= 0:
            done[column] = True
            row, free = row_of[column], ~done[:size]
            reduced = cost_FF[row] - row_price[row] - column_price[:size]
            better = free & (reduced < least)
            least[better], before[better] = reduced[better], column
            nearest = int(np.where(free, least, np.inf).argmin())
            step = least[nearest]
            row_price[row_of[done]] += step
            column_price[done] -= step
            least[free] -= step
            column = nearest
        while column != size:
            row_of[column], column = row_of[before[column]], before[column]
    columns = np.empty(size, dtype=np.int64)
    columns[row_of[:size]] = np.arange(size)
    return columns
