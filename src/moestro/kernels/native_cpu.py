"""Linear maps and mixtures by the native CPU kernels, over packed weights or plain ones.

All paths (amx, avx512, avx2, portable) give the same bits, whatever the number of rows, the other
rows of the batch and the threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from moestro.errors import CheckpointError, ShapeError
from moestro.kernels.addresses import FP32, INT64, ROWS, address, check, piece, spread
from moestro.kernels.native_library import CExperts, CMatrix, CSteps, call
from moestro.kernels.native_library import available as available
from moestro.kernels.native_library import library as library
from moestro.kernels.native_library import path as path
from moestro.kernels.native_packing import aligned as aligned
from moestro.kernels.native_packing import expert_sizes, packed_at
from moestro.kernels.native_packing import pack_expert as pack_expert
from moestro.kernels.native_packing import pack_experts as pack_experts
from moestro.kernels.native_packing import pack_matrix as pack_matrix
from moestro.kernels.native_packing import read_rows as read_rows
from moestro.kernels.native_packing import unpack_down as unpack_down
from moestro.kernels.native_packing import unpack_expert as unpack_expert
from moestro.kernels.native_packing import unpack_matrix as unpack_matrix
from moestro.kernels.native_packing import unpack_up as unpack_up
from moestro.kernels.packing import ACTIVATIONS, KINDS, UNGATED, ExpertSlabs, Format, PackedMatrix
from moestro.kernels.packing import matrix_bytes as matrix_bytes
from moestro.kernels.packing import slab_bytes as slab_bytes
from moestro.kernels.reference import Biases

PLAIN = Format("plain")


def linear(packed: PackedMatrix, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Multiply rows by a packed matrix: x · wᵀ + bias, [T, I] → [T, O] in x's dtype.

    bf16 weights multiply x rounded to bf16; integer weights multiply x rounded to 8 bits, with a
    scale for each group. Sums are fp32, in a fixed order.

    Raises:
        ShapeError: x is not [T, I] in fp32 or bf16 on CPU, or the bias not fp32 [O].
    """
    matrix = matrix_of(packed)
    x_TI, x_at = piece(x_TI, "rows", (*x_TI.shape[:1], packed.columns), ROWS)
    bias = None if bias_O is None else address(bias_O, "bias", (packed.rows,), FP32)
    y_TO = x_TI.new_empty(x_TI.shape[0], packed.rows)
    given = (ROWS[x_TI.dtype], x_at, x_TI.shape[0], y_TO.data_ptr(), bias)
    call("linear", ctypes.byref(matrix), *given)
    return y_TO


def mixture(
    packed: ExpertSlabs, x_TD: Tensor, tokens_A: Tensor, experts_A: Tensor, weights_A: Tensor
) -> Tensor:
    """A whole mixture: gather, gate and up, activation, down, weighted sum in a fixed order.

    The definition is `reference.mixture` over the unpacked weights, up to rounding. Assignments
    come token by token.

    Returns:
        y_TD in x's dtype, fp32 or bf16; zero for a token without an assignment.

    Raises:
        ShapeError: a shape or dtype does not fit, or an index is out of range.
        CheckpointError: experts that are stored could not be read.
    """
    experts, (size,) = experts_of(packed), (tokens_A.numel(),)
    x_TD, x_at = piece(x_TD, "rows", (*x_TD.shape[:1], packed.dim), ROWS)
    tokens_A, tokens_at = piece(tokens_A, "tokens", (size,), INT64)
    experts_A, experts_at = piece(experts_A, "experts", (size,), INT64)
    weights_A, weights_at = piece(weights_A, "weights", (size,), FP32, torch.float32)
    y_TD = torch.empty_like(x_TD)
    call(
        "mixture", ctypes.byref(experts), ROWS[x_TD.dtype], x_at, len(x_TD), tokens_at, experts_at,
        weights_at, size, y_TD.data_ptr(), failure=failure_of(packed),
        takes=lambda: f"{_range('tokens', tokens_A, len(x_TD))}, never falling; "
        f"{_range('experts', experts_A, packed.num_experts)}",
    )  # fmt: skip
    return y_TD


def plain_mixture(
    x_TD: Tensor,
    tokens_R: Tensor,
    experts_R: Tensor,
    weights_R: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    activation: str,
    biases: Biases | None = None,
    kept_R: Tensor | None = None,
) -> Tensor:
    """`reference.mixture` of token choice, on weights as they are; raises as `mixture` does."""
    experts = plain_experts(up_EHD, down_EDF, activation, *(biases or (None, None)))
    chosen = (tokens_R, experts_R, weights_R)
    if kept_R is not None:
        chosen = (tokens_R[kept_R], experts_R[kept_R], weights_R[kept_R])
    return mixture(experts, x_TD, *chosen)


def plain_matrix(w_OI: Tensor, bias_O: Tensor | None = None) -> PackedMatrix:
    """A matrix of a model as it is, not copied: fp32 or bf16 on CPU. A bias is taken as fp32.

    bf16 weights multiply rows rounded to bf16, fp32 weights multiply in fp32.

    Raises:
        ShapeError: it is not such a matrix, or bf16 with an odd number of columns.
    """
    w_OI = check(w_OI, "plain weights", (None, None), ROWS).detach().contiguous()
    rows, columns = w_OI.shape
    bias_O = None if bias_O is None else bias_O.detach().float().contiguous()
    packed = PackedMatrix(w_OI, rows, columns, PLAIN, bias_O)
    matrix_of(packed)
    return packed


def plain_experts(
    up_EHD: Tensor | tuple[Tensor, Tensor],
    down_EDF: Tensor,
    activation: str,
    up_bias_EH: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
) -> ExpertSlabs:
    """Stacked experts as they are, strided or not, and not copied. Biases are taken as fp32.

    Args:
        up_EHD: gates first, then what they multiply; or the two, each [E, F, D], of equal strides
            where an axis is longer than 1.
        down_EDF: of the same dtype, fp32 or bf16.
        activation: see `reference.activate`.
        up_bias_EH: as in `ExpertSlabs`.
        down_bias_ED: the same.

    Raises:
        ShapeError: see `plain_matrix`; or they do not fit each other.
    """
    pair = up_EHD if isinstance(up_EHD, tuple) else (up_EHD,)
    up_EHD, *other = (check(x, "up", (None, None, None), ROWS).detach() for x in pair)
    down_EDF = check(down_EDF, "down", (None, None, None), (up_EHD.dtype,)).detach()
    up_bias, down_bias = (
        None if each is None else each.detach().float().contiguous()
        for each in (up_bias_EH, down_bias_ED)
    )
    both = up_EHD.shape if not other else (len(up_EHD), 2 * up_EHD.shape[1], up_EHD.shape[2])
    dim, hidden = expert_sizes(both, down_EDF.shape, activation)
    slabs = ExpertSlabs(
        up_EHD, len(down_EDF), dim, hidden, activation, PLAIN, up_bias, down_bias, down_EDF
    )
    return slabs._replace(up=other[0]) if other else slabs


def matrix_of(packed: PackedMatrix) -> CMatrix:
    """The C structure; the tensor must outlive it.

    Raises:
        ShapeError: the data is not what the matrix says of it.
    """
    data, rows, columns, format, _ = packed
    if format.kind == "plain":
        at = _plain_at(data, (rows, columns))
    else:
        at = packed_at(data, matrix_bytes(rows, columns, format))
    return CMatrix(at, rows, columns, _kind(format, data), format.group)


def experts_of(packed: ExpertSlabs) -> CExperts:
    """The C structure; the tensors must outlive it.

    Raises:
        ShapeError: the tensors are not what the experts say of them.
    """
    data, num_experts, dim, hidden, activation, format, up_bias, down_bias, _, stored, _ = packed
    if activation not in ACTIVATIONS or num_experts < 1:
        raise ShapeError(
            f"experts are at least one, of {', '.join(ACTIVATIONS)}; given {num_experts} of "
            f"{activation!r}"
        )
    width, slab = hidden * (1 if activation in UNGATED else 2), 0
    plain = _Plain()
    if format.kind == "plain":
        plain = _plain_of(packed)
        at = plain.at
    else:
        slab = slab_bytes(dim, hidden, activation, format)
        at = 0 if stored is not None else packed_at(data, num_experts * slab)
    biases = (
        None if bias is None else address(bias, "bias", (num_experts, size), FP32)
        for bias, size in ((up_bias, width), (down_bias, dim))
    )
    return CExperts(
        at, plain.up, plain.down, slab, num_experts, dim, hidden, _kind(format, data), format.group,
        ACTIVATIONS.index(activation), _kind(format.of_down, data),
        0 if stored is None else stored.mixture, *biases,
        None if stored is None else stored.residency.handle, plain.up_steps, plain.down_steps,
    )  # fmt: skip


class _Plain(NamedTuple):
    """Where plain experts lie; nothing of packed ones."""

    at: int = 0
    up: int | None = None
    down: int | None = None
    up_steps: CSteps = CSteps()
    down_steps: CSteps = CSteps()


def _plain_of(packed: ExpertSlabs) -> _Plain:
    data, num_experts, dim, hidden = packed[:4]
    shape, up = (num_experts, hidden, dim), packed.up
    if packed.activation not in UNGATED and up is None:
        data = check(data, "plain weights", (num_experts, 2 * hidden, dim), ROWS)
        data, up = data[:, :hidden], data[:, hidden:]
    at, steps = _spread(data, shape)
    up_at, up_steps = (None, steps) if up is None else _spread(up, shape, (data.dtype,))
    # The stride of an axis of size 1 says nothing.
    if any(a != b for a, b, size in zip(steps, up_steps, shape, strict=True) if size > 1):
        raise ShapeError(
            f"gates and what they multiply have equal strides; given {steps} and {up_steps}; "
            "`.contiguous()` of both makes them so"
        )
    down_at, down_steps = _spread(packed.down, (num_experts, dim, hidden), (data.dtype,))
    return _Plain(at, up_at, down_at, CSteps(*steps), CSteps(*down_steps))


def _spread(
    weight: Tensor | None, shape: tuple[int, ...], dtypes: Iterable[torch.dtype] = ROWS
) -> tuple[int, tuple[int, ...]]:
    at, steps = spread(weight, "plain weights", shape, dtypes)
    if steps[1:] == (0, 0) and shape[1:] != (1, 1):
        raise ShapeError(
            f"plain weights are no one number for all; given strides {steps}; `.contiguous()` "
            "makes a matrix of it"
        )
    _refuse_odd(weight, shape, rows=steps[2] == 1)
    return at, steps


def failure_of(packed: ExpertSlabs) -> Callable[[], CheckpointError] | None:
    """What says why experts that are stored could not be read; None: they are in memory."""
    return None if packed.stored is None else packed.stored.residency.failure


def _plain_at(
    weight: Tensor | None, shape: tuple[int, ...], dtypes: Iterable[torch.dtype] = ROWS
) -> int:
    at = address(weight, "plain weights", shape, dtypes)
    _refuse_odd(weight, shape)
    return at


def _refuse_odd(weight: Tensor | None, shape: tuple[int, ...], rows: bool = True) -> None:
    odd = rows and shape[-1] % 2 and weight is not None and weight.dtype == torch.bfloat16
    if odd or min(shape) < 1:
        raise ShapeError(
            f"plain weights are not empty, and have an even width in bfloat16; given {list(shape)}"
        )


def read(data: Tensor) -> int:
    """Read memory once with all threads, as fast as it goes: what bandwidth is measured by."""
    at = address(data, "data", data.shape, (data.dtype,))
    return int(library().moestro_read(at, data.nbytes))


def _kind(format: Format, data: Tensor) -> int:
    """The number in moestro.h; plain bf16 comes before plain fp32."""
    return KINDS.index(format.kind) + (format.kind == "plain" and data.dtype == torch.float32)


def _range(name: str, given_A: Tensor, count: int) -> str:
    """Which indices are allowed and which were given."""
    ids = given_A.tolist()
    return f"{name} from 0 to {count - 1}, given {min(ids, default=0)} to {max(ids, default=0)}"
