"""compressed-tensors (llm-compressor): integers packed in words, plain int8, and fp8.

config.json describes a few kinds of weights. Which one a tensor is, its dtype and its scales say:
one for the matrix, for each row, for groups along a row, or for blocks.

Letters: O, I out and in of a matrix, N, M groups of its rows and columns, W = ceil(I · bits / 32).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moestro.checkpoints.quantised.form import SCALES, Form, Header, Shape, expect
from moestro.checkpoints.quantised.fp8 import fill_fp8
from moestro.checkpoints.quantised.gptq import check_groups, number_of
from moestro.checkpoints.quantised.scaling import (
    GROUP,
    Integers,
    row_blocks,
    scaled_blocks,
    unpack,
)
from moestro.errors import ShapeError
from moestro.kernels.packing import Q8_0, BlockRows

_WORD = 32
Block = tuple[int, int]
ZERO, GROUPS = ".weight_zero_point", ".weight_g_idx"


class Weights(NamedTuple):
    """One kind of weights that config.json describes.

    Attributes:
        kind: of a value.
        bits: of a value.
        symmetric: there are no zero points.
        block: rows and columns that share a scale; None: all.
        reordered: activations decided which columns are in a group.
    """

    kind: Literal["int", "float"]
    bits: int
    symmetric: bool
    block: tuple[int | None, int | None]
    reordered: bool = False

    def within(self, height: int, width: int) -> Block:
        """The block of a matrix of this size."""
        rows, columns = self.block
        return rows or max(height, 1), columns or max(width, 1)

    @property
    def number(self) -> int | None:
        """Of the blocks of 32 that hold such weights; None: there are none."""
        columns = self.block[1]
        if self.kind != "int" or self.reordered or (columns is not None and columns % GROUP):
            return None
        return number_of(self.bits, self.symmetric)


@dataclass(frozen=True)
class Compressed(Form):
    """What the forms of compressed-tensors share.

    Attributes:
        weights: all that config.json describes.
    """

    weights: tuple[Weights, ...]
    name = "compressed-tensors"

    @property
    def bits(self) -> int:  # type: ignore[override]  # a form of its own has one number, this several
        """The fewest."""
        return min(weights.bits for weights in self.weights)

    @property
    def in_blocks(self) -> bool:
        """Whether groups of some are whole blocks, in order."""
        return any(weights.number is not None for weights in self.weights)

    def which(
        self, shape: Shape, bits: list[int], kind: str, parts: Mapping[str, Header]
    ) -> Weights:
        """The described kind of weights that a tensor's scales fit.

        Raises:
            ShapeError: there is none, or it lacks zero points or groups.
        """
        scales = parts[".weight_scale"]
        if scales.dtype not in SCALES:
            raise ShapeError(f"weight_scale is {scales.dtype}; read are 16 and 32 bits")
        alike = [one for one in self.weights if one.kind == kind and one.bits in bits]
        fitting = [one for one in alike if tuple(scales.shape) in scale_shapes(one, shape)]
        if not fitting:
            possible = [list(each) for one in alike for each in scale_shapes(one, shape)]
            raise ShapeError(
                f"{kind} weights {list(shape)} of {' or '.join(map(str, bits))} bits have scales "
                f"{list(scales.shape)}; quantization_config describes "
                f"{' or '.join(map(str, possible)) or 'no such weights'}"
            )
        one = fitting[0]
        if not one.symmetric and ZERO not in parts:
            raise ShapeError("weights that are not symmetric have no weight_zero_point")
        if one.reordered and GROUPS not in parts:
            raise ShapeError("weights with actorder group have no weight_g_idx")
        return one


@dataclass(frozen=True)
class PackedInts(Compressed):
    """`weight_packed` [O, W], `weight_scale` and `weight_shape`; zero points packed along O."""

    needed = (".weight_packed", ".weight_scale", ".weight_shape")
    optional = (ZERO, GROUPS)
    small = (".weight_shape",)

    def shape(self, parts: Mapping[str, Header]) -> Shape:
        """[O, I]."""
        return self._kind(parts)[0]

    def fill(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """(value - zero) · scale. [O, I]."""
        scaled_blocks(self._integers(parts), out)

    def blocks(self, parts: Mapping[str, Header]) -> int | None:
        """See `Form`."""
        (_, width), one = self._kind(parts)
        return None if width % GROUP else one.number

    def rows(self, parts: Mapping[str, Tensor]) -> tuple[BlockRows, tuple[float, float]]:
        """See `Form`."""
        shape, one = self._kind(parts)
        assert one.number is not None
        return row_blocks(self._integers(parts), shape, one.number)

    def _integers(self, parts: Mapping[str, Tensor]) -> Integers:
        (height, width), one = self._kind(parts)
        words, block = parts[".weight_packed"], one.within(height, width)
        scales_NM = _matrix(parts[".weight_scale"])
        middle, zeros = 1 << (one.bits - 1), parts.get(ZERO)
        if zeros is None:
            zeros_NM = torch.full_like(scales_NM, middle, dtype=torch.int32)
        elif zeros.dtype == torch.int32:
            zeros_NM = unpack(zeros.T, one.bits).T[:height]
        else:
            zeros_NM = _matrix(zeros).int() + middle
        columns_I = self._columns(parts, scales_NM.shape[1])

        def rows(some: slice) -> Tensor:
            return unpack(words[some], one.bits)[:, :width]

        return Integers(rows, scales_NM, zeros_NM, block, columns_I)

    def _kind(self, parts: Mapping[str, Header]) -> tuple[tuple[int, int], Weights]:
        """Shape and description of a tensor by its parts."""
        held = parts[".weight_shape"]
        assert isinstance(held, Tensor)
        expect("weight_shape", held, [torch.int64, torch.int32], [2])
        height, width = held.tolist()
        words = parts[".weight_packed"]
        fewest = {one.bits: -(-width * one.bits // _WORD) for one in self.weights}
        bits = [bits for bits, count in fewest.items() if (height, count) == tuple(words.shape)]
        if words.dtype != torch.int32 or len(bits) != 1:
            raise ShapeError(
                f"weight_packed is {words.dtype} {list(words.shape)}, weight_shape "
                f"{[height, width]}; that is int32 [{height}, columns · bits / 32] for "
                f"{' and '.join(map(str, sorted(fewest)))} bits"
            )
        one = self.which((height, width), bits, "int", parts)
        scales = tuple(parts[".weight_scale"].shape)
        if ZERO in parts:
            if parts[ZERO].dtype == torch.int32:
                across = scales[1] if len(scales) == 2 else 1
                expect("weight_zero_point", parts[ZERO], [torch.int32],
                       [-(-height * one.bits // _WORD), across])  # fmt: skip
            else:
                expect("weight_zero_point", parts[ZERO], [torch.int8], scales)
        if GROUPS in parts:
            expect("weight_g_idx", parts[GROUPS], [torch.int32, torch.int64], [width])
        return (height, width), one

    def _columns(self, parts: Mapping[str, Tensor], count: int) -> Tensor | None:
        """The group of each column where that does not follow from their order."""
        if GROUPS not in parts or bool((parts[GROUPS] == -1).all()):
            return None
        check_groups("weight_g_idx", parts[GROUPS], count)
        return parts[GROUPS].long()


@dataclass(frozen=True)
class WholeValues(Compressed):
    """`weight` [O, I], int8 or e4m3, and `weight_scale`."""

    needed = (".weight", ".weight_scale")
    optional = (ZERO,)

    def shape(self, parts: Mapping[str, Header]) -> Shape:
        """That of the values."""
        self._kind(parts)
        return tuple(parts[".weight"].shape)

    def fill(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """(value - zero) · scale. [O, I]."""
        one, values_OI = self._kind(parts), parts[".weight"]
        height, width = values_OI.shape
        block, scales_NM = one.within(height, width), _matrix(parts[".weight_scale"])
        if values_OI.dtype == torch.float8_e4m3fn:
            fill_fp8(values_OI, scales_NM, block, out)
            return
        scaled_blocks(self._integers(parts), out)

    def blocks(self, parts: Mapping[str, Header]) -> int | None:
        """See `Form`; whatever the bits, a value is a byte."""
        one, values = self._kind(parts), parts[".weight"]
        known = values.dtype == torch.int8 and ZERO not in parts and one.number is not None
        return Q8_0 if known and values.shape[1] % GROUP == 0 else None

    def rows(self, parts: Mapping[str, Tensor]) -> tuple[BlockRows, tuple[float, float]]:
        """See `Form`."""
        height, width = parts[".weight"].shape
        return row_blocks(self._integers(parts), (height, width), Q8_0)

    def _integers(self, parts: Mapping[str, Tensor]) -> Integers:
        one, values_OI = self._kind(parts), parts[".weight"]
        height, width = values_OI.shape
        block, scales_NM = one.within(height, width), _matrix(parts[".weight_scale"])
        zeros_NM = _matrix(parts[ZERO]) if ZERO in parts else None
        return Integers(lambda some: values_OI[some].float(), scales_NM, zeros_NM, block)

    def _kind(self, parts: Mapping[str, Header]) -> Weights:
        values = parts[".weight"]
        expect("weight", values, [torch.int8, torch.float8_e4m3fn], ["O", "I"])
        integers = values.dtype == torch.int8
        # An int8 holds fewer bits as well.
        bits = sorted({one.bits for one in self.weights}) if integers else [8]
        one = self.which(tuple(values.shape), bits, "int" if integers else "float", parts)
        if ZERO in parts:
            expect("weight_zero_point", parts[ZERO], [values.dtype], parts[".weight_scale"].shape)
            if not integers and not one.symmetric:
                raise ShapeError("fp8 weights with zero points are not read")
        return one


def scale_shapes(weights: Weights, shape: Shape) -> list[Shape]:
    """The shapes of scales that weights of this kind may have, for a matrix [O, I]."""
    height, width = shape
    rows, columns = weights.within(height, width)
    full = (-(-height // rows), -(-width // columns))
    if weights.block == (None, None):
        return [(), (1,), full]
    return [full, full[:1]] if weights.block == (1, None) else [full]


def _matrix(per_block: Tensor) -> Tensor:
    """Scales or zero points as [N, M]."""
    return per_block if per_block.dim() == 2 else per_block.reshape(-1, 1)
