"""Formats of packed weights: their kinds, and the bytes that they take, without a tensor.

`moestro.kernels.packing` says what the bytes are. Letters: O/I out and in of a matrix, Q group
length, E experts, D width, F hidden width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from moestro.errors import ShapeError

# In the order of native/moestro.h. Plain weights are not packed: rows as they are in the model.
KINDS = ("bfloat16", "int8", "int4", "float32", "uint4", "mxfp4", "iq4_nl", "nf4", "plain")
# Activations, see `reference.activate`; in the order of native/moestro.h.
GATED = (
    "swiglu", "geglu", "clamped_swiglu", "geglu_tanh", "limited_swiglu", "capped_swiglu",
)  # fmt: skip
UNGATED = ("relu", "gelu", "relu2")
ACTIVATIONS = (*GATED, *UNGATED)
# The integers of 16 places: twice OCP's e2m1; ggml's IQ4_NL; 127 times NF4's numbers, rounded.
TABLES = {
    "mxfp4": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),
    "iq4_nl": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "nf4": (-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127),
}
QUANTISED = ("int8", "int4", "uint4", *TABLES)
GROUPS = (32, 64)
COLUMNS = 32
PAIRS = 32
# Blocks that native code reads, by ggml's number: (numbers, bytes) of a block. Those of NF4, which
# ggml lacks, are as those of IQ4_NL.
Q4_0, Q4_1, Q8_0, Q4_K, IQ4_NL, MXFP4, NF4 = 2, 3, 8, 12, 20, 39, 512
BLOCKS = {
    Q4_0: (32, 18), Q4_1: (32, 20), 6: (32, 22), 7: (32, 24), Q8_0: (32, 34), Q4_K: (256, 144),
    13: (256, 176), 14: (256, 210), IQ4_NL: (32, 18), MXFP4: (32, 17), NF4: (32, 18),
}  # fmt: skip
# Bytes of numbers on their way into packed form, where more than one expert is packed at once; of
# each number, as it is stored, in 16 bits and in fp32, at most.
SIDE_BY_SIDE, UNPACKED = 128 << 20, 6
# What each kind holds bit by bit in groups of 32.
EXACT = {
    "int4": (Q4_0,), "mxfp4": (MXFP4,), "iq4_nl": (IQ4_NL,), "nf4": (NF4,), "uint4": (Q4_0, Q4_1),
    "int8": (Q4_0, 6, Q8_0, IQ4_NL, MXFP4),
}  # fmt: skip
PAGE = 4096


class Format(NamedTuple):
    """How weights are stored.

    Attributes:
        kind: one of `KINDS`.
        group: Q, of integers.
        down: of experts, the kind of their down projections where it is another one.
    """

    kind: str
    group: int = 32
    down: str | None = None

    @property
    def of_down(self) -> Format:
        """The format of experts' down projections."""
        return self if self.down is None else Format(self.down, self.group)

    def described(self) -> dict[str, str | int]:
        """As JSON has it, without what is not set."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    @property
    def bits(self) -> float:
        """Bits per weight, scales and minima included."""
        if self.kind not in QUANTISED:
            return 32.0 if self.kind == "float32" else 16.0
        each = 32 if self.kind == "uint4" else 16
        return (8 if self.kind == "int8" else 4) + each / self.group


# What --weights takes beside "as-is".
WEIGHTS = {
    "fp32": Format("float32"),
    "bf16": Format("bfloat16"),
    "int8": Format("int8", 32),
    "int8-64": Format("int8", 64),
    "int4": Format("int4", 32),
    "int4-64": Format("int4", 64),
}


def check_format(format: Format) -> None:
    """Refuse a kind or group length that does not exist.

    Raises:
        ShapeError: says what there is.
    """
    for kind in (format.kind, format.of_down.kind):
        if kind not in KINDS or kind == "plain":
            raise ShapeError(f"packed weights are {', '.join(KINDS[:-1])}; given {kind!r}")
    quantised = {format.kind, format.down} & {*QUANTISED}
    unknown = quantised and format.group not in (GROUPS[:1] if quantised & {*TABLES} else GROUPS)
    if unknown or type(format.group) is not int:
        raise ShapeError(
            f"groups have 32 or 64 inputs, of kinds with a table 32; given {format.group!r}"
        )


@lru_cache(typed=True)
def matrix_bytes(rows: int, columns: int, format: Format) -> int:
    """Bytes of a packed matrix, a multiple of 64.

    Raises:
        ShapeError: it is empty, or there is no such format.
    """
    check_format(format)
    if rows < 1 or columns < 1:
        raise ShapeError(f"a packed matrix has rows and columns; given {rows} × {columns}")
    blocks = -(-rows // COLUMNS)
    if format.kind == "float32":
        return blocks * COLUMNS * columns * 4
    if format.kind == "bfloat16":
        return blocks * COLUMNS * -(-columns // PAIRS) * PAIRS * 2
    group_bytes = COLUMNS * format.group * format.bits / 8
    return blocks * -(-columns // format.group) * int(group_bytes)


@lru_cache(typed=True)
def slab_bytes(dim: int, hidden_dim: int, activation: str, format: Format) -> int:
    """Bytes of one packed expert, a multiple of 4096.

    Raises:
        ShapeError: as `matrix_bytes`, or there is no such activation.
    """
    if activation not in ACTIVATIONS:
        raise ShapeError(f"activations are {', '.join(ACTIVATIONS)}; given {activation!r}")
    up = matrix_bytes(hidden_dim, dim, format) * (1 if activation in UNGATED else 2)
    return -(-(up + matrix_bytes(dim, hidden_dim, format.of_down)) // PAGE) * PAGE


def block_row_bytes(number: int, columns: int) -> int:
    """Bytes of a row of blocks.

    Raises:
        ShapeError: there are no such blocks, or the row is not made of whole ones.
    """
    length, size = BLOCKS.get(number, (0, 0))
    if not length or columns < 1 or columns % length:
        raise ShapeError(f"rows of {columns} numbers cannot be blocks of kind {number}")
    return columns // length * size


def packed_at_once(numbers: int, most: int) -> int:
    """How many experts of so many numbers are packed side by side, up to `most`."""
    return max(1, min(most, SIDE_BY_SIDE // (UNPACKED * numbers)))
