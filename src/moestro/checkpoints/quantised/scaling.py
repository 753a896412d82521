"""Values out of 32-bit words, their product with the scales of blocks, and both as rows of blocks.

Everything is done some rows at a time, so that what is needed on the way is small.

Letters: O, I out and in of a matrix, N, M groups of its rows and columns, W words of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moestro.errors import ShapeError
from moestro.kernels.packing import BLOCKS, Q4_0, Q8_0, BlockRows

_NUMBERS_AT_ONCE = 1 << 18
# Rows begin at a multiple of this, where a block has one.
ROWS = 8
# Inputs that share a scale in rows of blocks.
GROUP = 32
Rows = Callable[[slice], Tensor]


class Integers(NamedTuple):
    """A matrix [O, I] of (value - zero) · scale.

    Attributes:
        rows: some of O → their values [.., I] in fp32, which may be written to.
        scales_NM: of blocks; N = ceil(O / rows of a block), M = ceil(I / columns of it).
        zeros_NM: as many; None: zero.
        block: its (rows, columns).
        columns_I: which of the M each column has, if that does not follow from `block`.
    """

    rows: Rows
    scales_NM: Tensor
    zeros_NM: Tensor | None
    block: tuple[int, int]
    columns_I: Tensor | None = None


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


def scaled_blocks(given: Integers, out_OI: Tensor) -> None:
    """Fill a matrix with the numbers, in fp32; the last block of a side may be a part of one."""
    rows, scales_NM, zeros_NM, block, columns_I = given
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


def row_blocks(
    given: Integers, shape: tuple[int, int], number: int
) -> tuple[BlockRows, tuple[float, float]]:
    """The same as rows of ggml's blocks of 32, whose scales are fp16.

    Args:
        given: without an order of columns; a block has whole groups of 32 columns.
        shape: [O, I].
        number: of the blocks: Q4_0, Q8_0 or Q4_1, whose minimum is -zero · scale.

    Returns:
        The rows, and what rounding scales and minima to fp16 adds: the squared error and, unless
        that is zero, the sum of squares of the numbers.

    Raises:
        ShapeError: values, scales or columns are none that such blocks have.
    """
    if given.columns_I is not None:
        raise ShapeError("columns are in groups of another order; --weights int8 reads them so")
    (height, width), count = shape, shape[1] // GROUP
    data = torch.empty(height, count, BLOCKS[number][1], dtype=torch.uint8, device="cpu")
    sums = torch.zeros(2, dtype=torch.float64, device="cpu")
    places_N = torch.arange(height, device="cpu") // given.block[0]
    places_M = torch.arange(count, device="cpu") * GROUP // given.block[1]
    for some in _slabs(height, 1, max(_NUMBERS_AT_ONCE // max(width, 1), 1)):
        values = torch.unflatten(given.rows(some), 1, (count, GROUP))
        scales, zeros = (
            torch.zeros((), device="cpu", dtype=torch.float32)
            if each is None
            else each[places_N[some]][:, places_M].float().expand(len(values), count)
            for each in (given.scales_NM, given.zeros_NM)
        )
        minima = -zeros * scales
        if number in (Q4_0, Q8_0):
            values = values - zeros[..., None]
            minima = torch.zeros((), device="cpu", dtype=torch.float32)
        _check(values, scales, minima, number)
        _put(data[some], values, scales, minima, number)
        sums += _rounding(values, scales, minima)
    if sums[0] == 0:
        sums.zero_()
    squared, whole = sums.tolist()
    return BlockRows(data.view(height, -1), number, width), (squared, whole)


def _check(values: Tensor, scales: Tensor, minima: Tensor, number: int) -> None:
    """Refuse what blocks of this kind do not have."""
    low, high = {Q4_0: (-8, 7), Q8_0: (-128, 127)}.get(number, (0, 15))
    least, most = values.aminmax()
    if least < low or most > high:
        raise ShapeError(
            f"values are {int(least)} to {int(most)} from their zero points; weights that the "
            f"settings call symmetric have {low} to {high}"
        )
    for each in (scales, minima):
        if not bool(each.half().isfinite().all()):
            raise ShapeError("a scale or minimum is not finite in fp16")


def _put(data: Tensor, values: Tensor, scales: Tensor, minima: Tensor, number: int) -> None:
    """Write blocks [.., N, bytes] of values [.., N, 32]."""
    data[..., 0:2] = scales.half()[..., None].view(torch.uint8)
    if number == Q8_0:
        data[..., 2:] = values.to(torch.int8).view(torch.uint8)
        return
    if number == Q4_0:
        values = values + 8
    else:
        data[..., 2:4] = minima.half()[..., None].view(torch.uint8)
    data[..., -GROUP // 2 :] = nibbles(values.to(torch.uint8))


def nibbles(values: Tensor) -> Tensor:
    """Half bytes [.., 32] as ggml has them [.., 16]: the first 16 low, the others high."""
    return values[..., : GROUP // 2] | values[..., GROUP // 2 :] << 4


def _rounding(values: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    """The squared error of rounding scales and minima of groups, and the sum of squares."""
    scales, minima = scales.double(), minima.double()
    off, shift = scales.half().double() - scales, minima.half().double() - minima
    if not off.any() and not shift.any():
        return torch.zeros(2, dtype=torch.float64, device="cpu")
    total, squares = values.double().sum(-1), values.double().square().sum(-1)

    def added(scale: Tensor, least: Tensor) -> Tensor:
        each = scale.square() * squares + 2 * scale * least * total + GROUP * least.square()
        return each.sum()

    return torch.stack([added(off, shift), added(scales, minima)])


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
