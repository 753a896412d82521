"""fp8: e4m3 values with one scale per block (DeepSeek-V3, §3.3), usually 128 × 128, or per matrix.

Letters: O, I out and in of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.checkpoints.quantised.form import SCALES, Form, Header, Shape, expect
from moestro.checkpoints.quantised.scaling import Integers, scaled_blocks


@dataclass(frozen=True)
class BlockFp8(Form):
    """DeepSeek's and Qwen's: `weight` [.., O, I] and `weight_scale_inv`, a scale per block."""

    block: tuple[int, int]
    bits = 8
    name = "fp8"
    tensor = ""
    needed = ("", "_scale_inv")

    def shape(self, parts: Mapping[str, Header]) -> Shape:
        """That of the values; of the experts of a layer in one tensor too."""
        values = parts[""]
        sides = values.shape if len(values.shape) in (2, 3) else ("O", "I")
        expect("the weight", values, [torch.float8_e4m3fn], sides)
        counts = [-(-side // of) for side, of in zip(values.shape[-2:], self.block, strict=True)]
        kinds = (*SCALES, torch.float8_e8m0fnu)
        expect("_scale_inv", parts["_scale_inv"], kinds, [*values.shape[:-2], *counts])
        return tuple(values.shape)

    def fill(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """[O, I]."""
        self.shape(parts)
        fill_fp8(parts[""], parts["_scale_inv"], self.block, out)


class MatrixFp8(Form):
    """AutoFP8's: `weight` [O, I] and `weight_scale`, one number."""

    bits = 8
    name = "fp8"
    tensor = ""
    needed = ("", "_scale")

    def shape(self, parts: Mapping[str, Header]) -> tuple[int, int]:
        """That of the values."""
        values, scale = parts[""], parts["_scale"]
        expect("the weight", values, [torch.float8_e4m3fn], ["O", "I"])
        expect("_scale", scale, SCALES, [1] * min(len(scale.shape), 1))
        height, width = values.shape
        return height, width

    def fill(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """[O, I]."""
        height, width = self.shape(parts)
        block = (max(height, 1), max(width, 1))
        fill_fp8(parts[""], parts["_scale"].view(1, 1), block, out)


def fill_fp8(values_OI: Tensor, scales_NM: Tensor, block: tuple[int, int], out_OI: Tensor) -> None:
    """Values times the scale of their block, multiplied in fp32.

    Args:
        values_OI: float8_e4m3fn.
        scales_NM: N = ceil(O / rows of a block), M = ceil(I / columns of it).
        block: its (rows, columns).
        out_OI: what to fill.
    """
    every = torch.arange(256, dtype=torch.uint8, device=values_OI.device)
    numbers = every.view(torch.float8_e4m3fn).float()
    # A pair of bytes read as one number has its first byte in the low half.
    table = torch.stack([numbers.repeat(256), numbers.repeat_interleave(256)], dim=1)
    values_OI = values_OI.contiguous()

    def numbers_of(some: slice) -> Tensor:
        return _numbers(values_OI[some], table)

    scaled_blocks(Integers(numbers_of, scales_NM, None, block), out_OI)


def _numbers(values: Tensor, table: Tensor) -> Tensor:
    """fp8 as fp32, by a table of all pairs: torch takes five times as long on a CPU."""
    if values.shape[-1] % 2:
        return values.float()
    return F.embedding(values.view(torch.int16).int() & 0xFFFF, table).flatten(-2)
