"""GPTQ (Frantar et al. 2022) as AutoGPTQ and GPTQModel write it: int4 and int8, packed along I.

A 32-bit word has the values of consecutive inputs, its lowest bits first. Every group of inputs has
a scale and a zero point per output; `g_idx` says which group an input is in, where activations
decided the order. Version 1 stores zero points less one. Its writers subtract a one from each in
the whole word, so that is how it is added again: a zero point of 0 borrows from its neighbour.

Letters: O, I out and in of a matrix, N groups of inputs, W = I · bits / 32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.checkpoints.quantised.form import SCALES, Form, Header, expect
from moestro.checkpoints.quantised.scaling import (
    GROUP,
    Integers,
    row_blocks,
    scaled_blocks,
    unpack,
)
from moestro.errors import ShapeError
from moestro.kernels.packing import Q4_0, Q4_1, Q8_0, BlockRows

_WORD = 32


@dataclass(frozen=True)
class Gptq(Form):
    """`qweight` [W, O], `qzeros` [N, O · bits / 32], `scales` [N, O] and, maybe, `g_idx` [I].

    Attributes:
        bits: of a value; 4 or 8.
        group: inputs that share a scale; -1: all.
        less_one: zero points are stored less one, as in version 1.
        symmetric: all zero points are in the middle.
        reordered: activations decided which inputs are in a group.
    """

    bits: int
    group: int
    less_one: bool
    symmetric: bool = False
    reordered: bool = False
    name = "GPTQ"
    needed = (".qweight", ".qzeros", ".scales")
    optional = (".g_idx",)

    def shape(self, parts: Mapping[str, Header]) -> tuple[int, int]:
        """[O, I]."""
        values, per_word = parts[".qweight"], _WORD // self.bits
        expect("qweight", values, [torch.int32], ["I · bits / 32", "O"])
        width, height = values.shape[0] * per_word, values.shape[1]
        if height % per_word:
            raise ShapeError(
                f"qweight has {height} outputs; their zero points fill words of {per_word}"
            )
        groups = 1 if self.group == -1 else -(-width // self.group)
        expect("scales", parts[".scales"], SCALES, [groups, height])
        expect("qzeros", parts[".qzeros"], [torch.int32], [groups, height // per_word])
        if ".g_idx" in parts:
            expect("g_idx", parts[".g_idx"], [torch.int32, torch.int64], [width])
        return height, width

    def fill(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """(value - zero) · scale. [O, I]."""
        scaled_blocks(self._integers(parts), out)

    @property
    def in_blocks(self) -> bool:
        """Whether groups are whole blocks, in order."""
        return self._number is not None

    def blocks(self, parts: Mapping[str, Header]) -> int | None:
        """See `Form`."""
        return None if self.shape(parts)[1] % GROUP else self._number

    def rows(self, parts: Mapping[str, Tensor]) -> tuple[BlockRows, tuple[float, float]]:
        """See `Form`."""
        number = self.blocks(parts)
        assert number is not None
        return row_blocks(self._integers(parts), self.shape(parts), number)

    @property
    def _number(self) -> int | None:
        if self.group != -1 and (self.reordered or self.group % GROUP):
            return None
        return number_of(self.bits, self.symmetric)

    def _integers(self, parts: Mapping[str, Tensor]) -> Integers:
        _, width = self.shape(parts)
        values_WO, zeros = parts[".qweight"], parts[".qzeros"].long()
        if self.less_one:
            zeros = zeros + sum(1 << place for place in range(0, _WORD, self.bits))
        zeros_ON = unpack(_as_int32(zeros), self.bits).T
        groups_I = parts[".g_idx"].long() if ".g_idx" in parts else None
        if groups_I is not None:
            check_groups("g_idx", groups_I, zeros_ON.shape[1])
            if torch.equal(
                groups_I, torch.arange(width, device=groups_I.device) // self._size(width)
            ):
                groups_I = None

        def rows(some: slice) -> Tensor:
            return unpack(values_WO[:, some].T, self.bits)

        return Integers(rows, parts[".scales"].T, zeros_ON, (1, self._size(width)), groups_I)

    def _size(self, width: int) -> int:
        return max(width, 1) if self.group == -1 else self.group


def number_of(bits: int, symmetric: bool) -> int | None:
    """The number of the blocks of 32 that hold such integers; None: there are none."""
    if bits == 4:
        return Q4_0 if symmetric else Q4_1
    return Q8_0 if symmetric else None


def _as_int32(words: Tensor) -> Tensor:
    """The low half of each."""
    words = words & 0xFFFFFFFF
    return (words - ((words >> 31) << 32)).int()


def check_groups(what: str, groups_I: Tensor, count: int) -> None:
    """Refuse groups that have no scale.

    Raises:
        ShapeError: names the group.
    """
    outside = groups_I[(groups_I < 0) | (groups_I >= count)]
    if len(outside):
        raise ShapeError(f"{what} names the group {int(outside[0])}; there are {count}, from 0 on")
