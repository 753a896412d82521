"""AWQ (Lin et al. 2023) in the layout GEMM of AutoAWQ: int4, packed along O in an order of its own.

Letters: O, I out and in of a matrix, N groups of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.checkpoints.quantised.form import SCALES, Form, Header, Shape, expect
from moestro.checkpoints.quantised.scaling import scaled_columns, unpack
from moestro.errors import ShapeError

_PER_WORD = 8
# From its lowest bits on, a word has the outputs 0, 2, 4, 6, 1, 3, 5, 7: here the place of each.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


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

    def shape(self, parts: Mapping[str, Header]) -> Shape:
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

    def dequantize(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """(value - zero) · scale. [O, I]."""
        _, width = self.shape(parts)
        values_IW = parts[".qweight"]
        zeros_NO = unpack(parts[".qzeros"], 4, 1, _PLACES)
        groups_I = torch.arange(width, device="cpu") // (width if self.group == -1 else self.group)

        def rows(some: slice) -> Tensor:
            return unpack(values_IW[some], 4, 1, _PLACES)

        return scaled_columns(rows, parts[".scales"], zeros_NO, groups_I, dtype)
