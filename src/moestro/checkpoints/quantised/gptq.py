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
from moestro.checkpoints.quantised.scaling import scaled_blocks, unpack
from moestro.errors import ShapeError

_WORD = 32


@dataclass(frozen=True)
class Gptq(Form):
    """`qweight` [W, O], `qzeros` [N, O · bits / 32], `scales` [N, O] and, maybe, `g_idx` [I].

    Attributes:
        bits: of a value; 4 or 8.
        group: inputs that share a scale; -1: all.
        less_one: zero points are stored less one, as in version 1.
    """

    bits: int
    group: int
    less_one: bool
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

        scales_ON, block = parts[".scales"].T, (1, self._size(width))
        scaled_blocks(rows, out, scales_ON, zeros_ON, block, groups_I)

    def _size(self, width: int) -> int:
        return max(width, 1) if self.group == -1 else self.group


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
