"""Values out of 32-bit words, and their product with the scales of groups and blocks.

Everything is done some rows at a time, so that what is needed on the way is small.

Letters: O, I out and in of a matrix, N, M groups of its rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_NUMBERS_AT_ONCE = 1 << 18
Rows = Callable[[slice], Tensor]


def unpack(words: Tensor, bits: int, axis: int, order: tuple[int, ...] = ()) -> Tensor:
    """The values in 32-bit words, without sign, along an axis that becomes longer.

    Args:
        words: int32 or int64.
        bits: of a value; 4 or 8.
        axis: 0 or 1 of two.
        order: the place in its word of each value; (): the lowest bits first.
    """
    places = torch.tensor(order or range(32 // bits), dtype=words.dtype, device=words.device)
    shifts = (places * bits).view(-1, 1) if axis == 0 else places * bits
    values = (words.unsqueeze(axis + 1) >> shifts) & ((1 << bits) - 1)
    return values.flatten(axis, axis + 1)


def scaled_columns(
    rows: Rows, scales_NO: Tensor, zeros_NO: Tensor, groups_I: Tensor, dtype: torch.dtype
) -> Tensor:
    """(value - zero) · scale of matrices that lie transposed, the groups along `I`. [O, I].

    Args:
        rows: some of I → their values, whole numbers [.., O].
        scales_NO: multiplied in fp32.
        zeros_NO: whole numbers.
        groups_I: which of the N each has; in range.
        dtype: of the result.
    """
    width, height = len(groups_I), scales_NO.shape[1]
    out_OI = torch.empty(height, width, dtype=dtype, device=scales_NO.device)
    scales_NO = scales_NO.float()
    step = max(_NUMBERS_AT_ONCE // max(height, 1) // 8 * 8, 8)
    for start in range(0, width, step):
        some = slice(start, min(start + step, width))
        groups = groups_I[some]
        out_OI[:, some] = ((rows(some) - zeros_NO[groups]) * scales_NO[groups]).T
    return out_OI


def scaled_blocks(
    rows: Rows,
    shape: tuple[int, int],
    scales_NM: Tensor,
    zeros_NM: Tensor | None,
    block: tuple[int, int],
    dtype: torch.dtype,
    columns_I: Tensor | None = None,
) -> Tensor:
    """(value - zero) · scale of blocks, in fp32; the last of a side may be a part of one. [O, I].

    Args:
        rows: some of O → their values [.., I].
        shape: of the result.
        scales_NM: N = ceil(O / rows of a block), M = ceil(I / columns of it).
        zeros_NM: as many; None: zero.
        block: its (rows, columns).
        dtype: of the result.
        columns_I: which of the M each column has, if that does not follow from `block`.
    """
    height, width = shape
    out_OI = torch.empty(height, width, dtype=dtype, device=scales_NM.device)
    scales_NM = scales_NM.float()

    def spread(per_block: Tensor) -> Tensor:
        if columns_I is not None:
            return per_block[:, columns_I]
        if per_block.shape[1] == 1:
            return per_block
        return per_block.repeat_interleave(block[1], dim=1)[:, :width]

    for some in _slabs(height, block[0], max(_NUMBERS_AT_ONCE // max(width, 1), 1)):
        which = slice(some.start // block[0], -(-some.stop // block[0]))
        values = rows(some).float()
        if zeros_NM is not None:
            values = values - spread(zeros_NM[which].float())
        out_OI[some] = values * spread(scales_NM[which])
    return out_OI


def _slabs(height: int, rows: int, most: int) -> Iterator[slice]:
    """Rows in turn, at most `most`, none in two blocks unless blocks have one row."""
    whole = height if rows == 1 else rows
    for start in range(0, height, whole):
        end = min(start + whole, height)
        for first in range(start, end, most):
            yield slice(first, min(first + most, end))
