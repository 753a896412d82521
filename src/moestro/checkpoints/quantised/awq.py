"""AWQ (Lin et al. 2023) in the layout GEMM of AutoAWQ: int4, packed along O in an order of its own.

Letters: O, I out and in of a matrix, N groups of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.checkpoints.quantised.form import SCALES, Form, Header, expect
from moestro.checkpoints.quantised.scaling import (
    GROUP,
    ROWS,
    Integers,
    as_bytes,
    row_blocks,
    scaled_blocks,
)
from moestro.errors import ShapeError
from moestro.kernels.packing import Q4_1, BlockRows

_PER_WORD = 8
# The outputs of a word, from its lowest bits on; two in a byte.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Awq(Form):
    """`qweight` [I, O / 8], `qzeros` [N, O / 8] and `scales` [N, O].

    Attributes:
        group: inputs that share a scale and a zero point; -1: all.
    """

    group: int
    name = "AWQ"
    bits = 4
    needed = (".qweight", ".qzeros", ".scales")

    def shape(self, parts: Mapping[str, Header]) -> tuple[int, int]:
        """[O, I]."""
        values = parts[".qweight"]
        expect("qweight", values, [torch.int32], ["I", "O / 8"])
        width, words = values.shape
        group = width if self.group == -1 else self.group
        groups = width // group if width else 0
        if groups * group != width:
            raise ShapeError(f"qweight has {width} inputs, which groups of {group} do not divide")
        expect("qzeros", parts[".qzeros"], [torch.int32], [groups, words])
        expect("scales", parts[".scales"], SCALES, [groups, words * _PER_WORD])
        return words * _PER_WORD, width

    def fill(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """(value - zero) · scale. [O, I]."""
        scaled_blocks(self._integers(parts), out)

    @property
    def in_blocks(self) -> bool:
        """Whether groups are whole blocks."""
        return self.group == -1 or self.group % GROUP == 0

    def blocks(self, parts: Mapping[str, Header]) -> int | None:
        """See `Form`."""
        return Q4_1 if self.in_blocks and self.shape(parts)[1] % GROUP == 0 else None

    def rows(self, parts: Mapping[str, Tensor]) -> tuple[BlockRows, tuple[float, float]]:
        """See `Form`."""
        return row_blocks(self._integers(parts), self.shape(parts), Q4_1)

    def _integers(self, parts: Mapping[str, Tensor]) -> Integers:
        _, width = self.shape(parts)
        values_IW, zeros_ON = parts[".qweight"], unpack_awq(parts[".qzeros"])
        block = (1, max(width, 1) if self.group == -1 else self.group)

        def rows(some: slice) -> Tensor:
            assert some.start % ROWS == 0
            words = slice(some.start // _PER_WORD, -(-some.stop // _PER_WORD))
            return unpack_awq(values_IW[:, words])

        return Integers(rows, parts[".scales"].T, zeros_ON, block)


def unpack_awq(words_IW: Tensor) -> Tensor:
    """The values of words, transposed. fp32 [W · 8, I]."""
    width, count = words_IW.shape
    data = as_bytes(words_IW).view(width, count, 4).permute(1, 2, 0)
    values = torch.empty(count, _PER_WORD, width, dtype=torch.float32, device=words_IW.device)
    values[:, _ORDER[0::2]] = (data & 15).float()
    values[:, _ORDER[1::2]] = (data >> 4).float()
    return values.flatten(0, 1)
