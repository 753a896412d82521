"""Values out of 32-bit words, and their product with the scales of groups and blocks.

Everything is done some rows at a time, so that what is needed on the way is small.

Letters: O, I out and in of a matrix, N, M groups of its rows and columns, W words of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_NUMBERS_AT_ONCE = 1 << 18
# Rows begin at a multiple of this, where a block has one.
ROWS = 8
Rows = Callable[[slice], Tensor]


def unpack(words_OW: Tensor, bits: int) -> Tensor:
    """The values in 32-bit words, without sign, the lowest bits first. fp32 [O, W · 32 / bits].

    Args:
        words_OW: int32.
        bits: of a value; 4 or 8.
    """
    data = as_bytes(words_OW)
    if bits == 8:
        return data.float()
    return torch.stack([data & 15, data >> 4], dim=-1).flatten(-2).float()


def as_bytes(words: Tensor) -> Tensor:
    """The bytes of int32 words, four for each of the last axis."""
    # With one word a row it counts as contiguous whatever its strides, which a view minds.
    if words.stride(-1) != 1 or not words.is_contiguous():
        words = words.clone(memory_format=torch.contiguous_format)
    return words.view(torch.uint8)


def scaled_blocks(
    rows: Rows,
    out_OI: Tensor,
    scales_NM: Tensor,
    zeros_NM: Tensor | None,
    block: tuple[int, int],
    columns_I: Tensor | None = None,
) -> None:
    """(value - zero) · scale of blocks, in fp32; the last of a side may be a part of one.

    Args:
        rows: some of O → their values [.., I] in fp32, which may be written to.
        out_OI: what to fill.
        scales_NM: N = ceil(O / rows of a block), M = ceil(I / columns of it).
        zeros_NM: as many; None: zero.
        block: its (rows, columns).
        columns_I: which of the M each column has, if that does not follow from `block`.
    """
    height, width = out_OI.shape
    scales_NM = scales_NM.float()
    zeros_NM = None if zeros_NM is None else zeros_NM.float()
    spread = _spread(width, block[1], columns_I)
    for some in _slabs(height, block[0], max(_NUMBERS_AT_ONCE // max(width, 1), 1)):
        which = slice(some.start // block[0], -(-some.stop // block[0]))
        values = rows(some)
        groups = values if spread else torch.unflatten(values, 1, (scales_NM.shape[1], -1))
        if zeros_NM is not None:
            groups.sub_(spread(zeros_NM[which]) if spread else zeros_NM[which, :, None])
        groups.mul_(spread(scales_NM[which]) if spread else scales_NM[which, :, None])
        out_OI[some] = values


def _spread(
    width: int, columns: int, columns_I: Tensor | None
) -> Callable[[Tensor], Tensor] | None:
    """One number per block to one per column; None: equal groups of columns, none left over."""
    if columns_I is not None:
        return lambda per_block: per_block.index_select(1, columns_I)  # a fifth of per_block[:, …]
    if width and width % columns == 0:
        return None
    return lambda per_block: per_block.repeat_interleave(columns, dim=1)[:, :width]


def _slabs(height: int, rows: int, most: int) -> Iterator[slice]:
    """Rows in turn, at most `most` or `ROWS`, none in two blocks unless blocks have one row."""
    step = max(most // ROWS * ROWS, ROWS)
    whole = height if rows == 1 else rows
    for start in range(0, height, whole):
        end = min(start + whole, height)
        for first in range(start, end, step):
            yield slice(first, min(first + step, end))
