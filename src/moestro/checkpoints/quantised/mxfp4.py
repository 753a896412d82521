"""MXFP4 (OCP Microscaling 1.0, §5.3-5.4; gpt-oss): two e2m1 values in a byte, and powers of two.

The low half of a byte comes first; 32 values share a power.

Letters: E experts, O, I out and in of a matrix, N = I / 32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.checkpoints.quantised.form import Form, Header, Shape, expect
from moestro.checkpoints.quantised.scaling import nibbles
from moestro.errors import ShapeError
from moestro.kernels.packing import MXFP4, BlockRows

# e2m1 has 1 sign, 2 exponent and 1 mantissa bit.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_GROUP = 32
_GROUPS_AT_ONCE = 1 << 16


class Mxfp4(Form):
    """The experts of gpt-oss: `_blocks` [E, O, N, 16] and `_scales` [E, O, N]."""

    name = "MXFP4"
    bits = 4
    tensor = ""
    needed = ("_blocks", "_scales")

    def shape(self, parts: Mapping[str, Header]) -> Shape:
        """[E, I, O]: gpt-oss keeps plain experts transposed."""
        blocks = parts["_blocks"]
        sides = blocks.shape[:-1] if len(blocks.shape) in (3, 4) else ("E", "O", "N")
        expect("_blocks", blocks, [torch.uint8], [*sides, _GROUP // 2])
        expect("_scales", parts["_scales"], [torch.uint8], sides)
        *experts, out, groups, _ = blocks.shape
        return (*experts, groups * _GROUP, out)

    @property
    def in_blocks(self) -> bool:
        """All are."""
        return True

    def blocks(self, parts: Mapping[str, Header]) -> int | None:
        """See `Form`."""
        return MXFP4

    def rows(self, parts: Mapping[str, Tensor]) -> tuple[BlockRows, tuple[float, float]]:
        """See `Form`; the rows [O, I] of one expert, not transposed."""
        self.shape(parts)
        byte = parts["_blocks"]
        values = torch.stack([byte & 15, byte >> 4], dim=-1).flatten(-2)
        data = torch.cat([parts["_scales"][..., None], nibbles(values)], dim=-1)
        height, count = parts["_scales"].shape
        return BlockRows(data.view(height, -1), MXFP4, count * _GROUP), (0.0, 0.0)

    def fill(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """Exact in bf16 and fp32 as long as the exponent fits. [E, I, O]."""
        out.copy_(from_mxfp4(parts["_blocks"], parts["_scales"], out.dtype).transpose(-1, -2))


def from_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """e2m1 value · 2^(scale - 127); scale 255 is not a number. [..., N · 32].

    Args:
        blocks: uint8 [..., N, 16], two values in a byte.
        scales: uint8 [..., N].
        dtype: of the result; exact in bf16 and fp32 as long as the exponent fits.

    Raises:
        ShapeError: a dtype or shape does not fit.
    """
    fits = blocks.dim() >= 2 and (*scales.shape, _GROUP // 2) == tuple(blocks.shape)
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8 or not fits:
        raise ShapeError(
            "MXFP4 blocks are uint8 [..., N, 16] with uint8 scales [..., N]; given "
            f"{blocks.dtype} {list(blocks.shape)} and {scales.dtype} {list(scales.shape)}"
        )
    exact = dtype if dtype in (torch.bfloat16, torch.float32) else torch.float32
    byte = torch.arange(256, device=blocks.device)
    half = torch.tensor(_E2M1, dtype=exact, device=blocks.device)
    twins = torch.stack([half[byte & 15], half[byte >> 4]], dim=1)
    powers = torch.ldexp(torch.ones_like(byte, dtype=torch.float64), byte - 127).to(exact)
    powers[255] = torch.nan
    out = torch.empty(*scales.shape, _GROUP, dtype=dtype, device=blocks.device)
    # Some at a time, so that what is needed on the way is small.
    flat = (out.view(-1, _GROUP), blocks.reshape(-1, _GROUP // 2), scales.reshape(-1))
    for part, block, scale in zip(*(torch.split(x, _GROUPS_AT_ONCE) for x in flat), strict=True):
        numbers = F.embedding(block.int(), twins).flatten(-2)
        part.copy_(numbers.mul_(powers[scale.int()][:, None]))
    return out.flatten(-2)
