"""Packed weights: fp32, bf16, 8 and 4 bits in the layout that the native kernels stream.

One layout serves one row and many. A matrix [O, I] is cut into blocks of 32 outputs; a block is one
contiguous stream over its inputs. fp32: 32 outputs side by side. bf16: the same for pairs of
inputs, which is both an AMX tile and a streaming AVX-512 line. Of the others: for each group of Q
inputs the 32 scales (fp16, 64 bytes), of uint4 also the 32 minima, then quads of inputs, 32
outputs side by side; a byte of 4-bit weights holds input i of one quad in its low half and of the
next quad in its high half, of int4 both plus 8. uint4 is scale · q + minimum, q from 0 to 15; of
mxfp4, iq4_nl and nf4 the half bytes are places in a table (`TABLES`), of scale · table[q].
Outputs are padded to 32, inputs to 32 (bf16) or Q, with zeros. The slab of an expert is its gate
and up blocks in turn, then its down blocks, rounded up to whole pages of 4096 bytes.

`quantise` is the definition; the native packer gives the same integers and scales bit by bit. Kinds
with a table have none: they hold blocks that were made so, and nothing else.
Letters: O/I out and in of a matrix, Q group length, E experts, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moestro.kernels.formats import ACTIVATIONS as ACTIVATIONS
from moestro.kernels.formats import BLOCKS as BLOCKS
from moestro.kernels.formats import COLUMNS as COLUMNS
from moestro.kernels.formats import EXACT as EXACT
from moestro.kernels.formats import GROUPS as GROUPS
from moestro.kernels.formats import IQ4_NL as IQ4_NL
from moestro.kernels.formats import KINDS as KINDS
from moestro.kernels.formats import MXFP4 as MXFP4
from moestro.kernels.formats import NF4 as NF4
from moestro.kernels.formats import PAGE as PAGE
from moestro.kernels.formats import PAIRS as PAIRS
from moestro.kernels.formats import Q4_0 as Q4_0
from moestro.kernels.formats import Q4_1 as Q4_1
from moestro.kernels.formats import Q4_K as Q4_K
from moestro.kernels.formats import Q8_0 as Q8_0
from moestro.kernels.formats import QUANTISED as QUANTISED
from moestro.kernels.formats import TABLES as TABLES
from moestro.kernels.formats import UNGATED as UNGATED
from moestro.kernels.formats import Format as Format
from moestro.kernels.formats import block_row_bytes as block_row_bytes
from moestro.kernels.formats import check_format as check_format
from moestro.kernels.formats import matrix_bytes as matrix_bytes
from moestro.kernels.formats import slab_bytes as slab_bytes
from moestro.kernels.residency import Stored


class PackedMatrix(NamedTuple):
    """A packed matrix [rows, columns]."""

    data: Tensor  # uint8, at a multiple of 64 bytes; of kind "plain" the matrix, fp32 or bf16
    rows: int
    columns: int
    format: Format
    bias: Tensor | None = None  # fp32 [rows], of a projection that has one


class ExpertSlabs(NamedTuple):
    """E packed experts in one page-aligned piece of memory, a slab each."""

    # uint8 [E · slab_bytes], without memory where they are `stored`; of kind "plain" gate_up
    # [E, 2F, D] or up [E, F, D] itself, strided or not
    data: Tensor
    num_experts: int  # E
    dim: int  # D
    hidden_dim: int  # F
    activation: str  # see `reference.activate`
    format: Format  # of all matrices
    up_bias: Tensor | None = None  # fp32 [E, 2F] (gate first) or [E, F]
    down_bias: Tensor | None = None  # fp32 [E, D]
    down: Tensor | None = None  # of kind "plain" the down projections [E, D, F]
    stored: Stored | None = None  # where they are read from as they are wanted
    # of kind "plain", where `data` holds the gates alone: what they multiply, [E, F, D]
    up: Tensor | None = None


class BlockRows(NamedTuple):
    """Rows of a matrix as a GGUF file has them: blocks of integers with scales.

    Attributes:
        data: uint8 [O, bytes of a row].
        number: ggml's number of the blocks' kind; see native/blocks.cpp.
        columns: I.
    """

    data: Tensor
    number: int
    columns: int


class StoredRows(Protocol):
    """A module's matrices as a file has them, read when they are packed.

    Attributes:
        rounding: fp64 [2], to which packing adds the squared error of what is rounded, and the sum
            of its squares.
    """

    rounding: Tensor

    def rows(self, name: str, entry: int | None = None) -> Iterable[BlockRows | Tensor]:
        """The parts of a tensor of the module, or of entry `entry` of its first axis, in order.

        Each is read when it is reached.

        Gate and up are two parts, or one; of others all but the last have a multiple of 32 rows.
        Plain numbers are fp32 or bf16.
        """


def blank_matrix(w_OI: Tensor, format: Format, bias_O: Tensor | None = None) -> PackedMatrix:
    """What `native_cpu.pack_matrix` gives, without memory but for the bias, which is copied."""
    rows, columns = w_OI.shape
    data = torch.empty(matrix_bytes(rows, columns, format), dtype=torch.uint8, device="meta")
    bias_O = None if bias_O is None else bias_O.detach().float().clone()
    return PackedMatrix(data, rows, columns, format, bias_O)


def blank_experts(
    down_EDF: Tensor,
    activation: str,
    format: Format,
    up_bias_EH: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
) -> ExpertSlabs:
    """What `native_cpu.pack_experts` gives, without memory but for the biases, which are copied."""
    num_experts, dim, hidden = down_EDF.shape
    size = num_experts * slab_bytes(dim, hidden, activation, format)
    data = torch.empty(size, dtype=torch.uint8, device="meta")
    pair = (up_bias_EH, down_bias_ED)
    up_bias, down_bias = (None if bias is None else bias.detach().float().clone() for bias in pair)
    return ExpertSlabs(data, num_experts, dim, hidden, activation, format, up_bias, down_bias)


def quantise(w_OI: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor | None]:
    """Integers, scales and minima of a matrix whose I is a multiple of the group.

    int8: scale = max|w| / 127, integers in [-127, 127]. int4: scale = m / -8 where m is the weight
    of largest size, sign kept, so that m itself is -8 and all 16 integers from -8 to 7 are used.
    uint4: scale = (max w - min w) / 15, integers in [0, 15], of w - min w.
    Scales and minima are rounded to fp16 before the integers are chosen.

    Returns:
        (int8 [O, I], fp16 [O, I / Q], of uint4 fp16 [O, I / Q]).
    """
    w_OGQ, minima_OG = w_OI.float().unflatten(1, (-1, format.group)), None
    sizes_OG = w_OGQ.abs()
    if format.kind == "int8":
        low, high = -127, 127
        scales_OG = sizes_OG.amax(-1) / 127.0
    elif format.kind == "uint4":
        low, high = 0, 15
        least_OG = w_OGQ.amin(-1)
        scales_OG = (w_OGQ.amax(-1) - least_OG) / 15.0
        minima_OG = (least_OG + 0.0).half()  # of two zeros the positive one
        w_OGQ = w_OGQ - minima_OG.float()[..., None]
    else:
        low, high = -8, 7
        largest_OG1 = sizes_OG.argmax(-1, keepdim=True)
        scales_OG = w_OGQ.gather(-1, largest_OG1).squeeze(-1) / -8.0
    limit = torch.finfo(torch.float16).max
    scales_OG = scales_OG.clamp(-limit, limit).half()
    wide_OG = scales_OG.float()
    inverse_OG = torch.where(wide_OG == 0, torch.zeros_like(wide_OG), 1.0 / wide_OG)
    q_OGQ = (w_OGQ * inverse_OG[..., None]).round().clamp(low, high).to(torch.int8)
    return q_OGQ.flatten(1), scales_OG, minima_OG


def dequantise(q_OI: Tensor, scales_OG: Tensor, minima_OG: Tensor | None = None) -> Tensor:
    """The fp32 weights that integers, scales and minima stand for."""
    group = q_OI.shape[1] // scales_OG.shape[1]
    w_OI = q_OI.float() * scales_OG.float().repeat_interleave(group, dim=1)
    if minima_OG is not None:
        w_OI = w_OI + minima_OG.float().repeat_interleave(group, dim=1)
    return w_OI


def error_bound(w_OI: Tensor, format: Format) -> Tensor:
    """Largest |w - packed w| of each group, [O, ceil(I / Q)]; of each weight where there are none.

    Half a step; for int4 a whole step, since +8 is missing and a weight nearly as large as the
    largest, of the other sign, becomes 7. On top: 2^-11 of the range for the scale's own rounding,
    of uint4 as much of the largest for the minimum's, and below fp16's normal range its smallest
    step. bf16: 2^-8 of the weight.
    """
    if format.kind not in QUANTISED:
        step = 2.0**-8 if format.kind == "bfloat16" else 0.0
        return w_OI.abs().float() * step + 1e-38
    padded_OI = torch.nn.functional.pad(w_OI.float(), (0, -w_OI.shape[1] % format.group))
    padded_OGQ, tiny = padded_OI.unflatten(1, (-1, format.group)), 2.0**-24
    sizes_OG = padded_OGQ.abs().amax(-1)
    if format.kind == "uint4":
        range_OG = padded_OGQ.amax(-1) - padded_OGQ.amin(-1)
        shifted_OG: Tensor = range_OG / 30 + (range_OG + sizes_OG) * 2.0**-10 + 15 * tiny
        return shifted_OG
    steps, most = (0.5, 127) if format.kind == "int8" else (1.0, 8)
    bound_OG: Tensor = sizes_OG / most * steps * (1 + 2.0**-9) + sizes_OG * 2.0**-11 + most * tiny
    return bound_OG
