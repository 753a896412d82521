"""Linear maps and mixtures by the native CPU kernels, over packed weights or plain ones.

All paths (amx, avx512, avx2, portable) give the same bits, whatever the number of rows, the other
rows of the batch and the threads.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moestro.errors import ShapeError
from moestro.kernels.native_library import Experts, Matrix
from moestro.kernels.native_library import available as available
from moestro.kernels.native_library import library as library
from moestro.kernels.native_library import path as path
from moestro.kernels.packing import (
    COLUMNS,
    KINDS,
    PAGE,
    Format,
    PackedExperts,
    PackedMatrix,
    check_format,
)

UNGATED = ("relu", "gelu")
ACTIVATIONS = ("swiglu", "geglu", "clamped_swiglu", *UNGATED)
PLAIN = Format("plain")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def aligned(nbytes: int) -> Tensor:
    """Uninitialised uint8 memory that starts on a page."""
    memory = torch.empty(nbytes + PAGE, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % PAGE
    return memory[start : start + nbytes]


def matrix_bytes(rows: int, columns: int, format: Format) -> int:
    """Bytes of a packed matrix."""
    return int(library().moestro_matrix_bytes(*_code(format), rows, columns))


def slab_bytes(dim: int, hidden_dim: int, activation: str, format: Format) -> int:
    """Bytes of one packed expert."""
    gated = activation not in UNGATED
    return int(library().moestro_slab_bytes(*_code(format), gated, dim, hidden_dim))


def pack_matrix(w_OI: Tensor, format: Format) -> PackedMatrix:
    """Pack one matrix.

    Raises:
        ShapeError: it is no fp32 or bf16 matrix, or holds what cannot be packed.
    """
    check_format(format)
    rows, columns = w_OI.shape
    data = aligned(matrix_bytes(rows, columns, format))
    _pack(w_OI, format, data.data_ptr(), 1)
    return PackedMatrix(data, rows, columns, format)


def pack_expert(
    up_HD: Tensor, down_DF: Tensor, activation: str, format: Format, slab: Tensor
) -> None:
    """Pack one expert into its slab (uint8, `slab_bytes` long, on a multiple of 64 bytes).

    Args:
        up_HD: `gate_up` [2F, D] of a gated expert, gate first, or `up` [F, D].
        down_DF: down projection.
        activation: decides whether there is a gate.
        format: of the slab.
        slab: written to.

    Raises:
        ShapeError: see `pack_matrix`.
    """
    check_format(format)
    dim, hidden = _sizes(up_HD, down_DF, activation)
    if slab.numel() != slab_bytes(dim, hidden, activation, format):
        raise ShapeError(f"the slab has {slab.numel()} bytes, which does not fit the expert")
    at, up_bytes = slab.data_ptr(), matrix_bytes(hidden, dim, format)
    if activation in UNGATED:
        _pack(up_HD, format, at, 1)
        _pack(down_DF, format, at + up_bytes, 1)
        return
    block = up_bytes // -(-hidden // COLUMNS)
    _pack(up_HD[:hidden], format, at, 2)
    _pack(up_HD[hidden:], format, at + block, 2)
    _pack(down_DF, format, at + 2 * up_bytes, 1)


def unpack_matrix(packed: PackedMatrix) -> Tensor:
    """The fp32 matrix [rows, columns] that a packed one stands for."""
    return _unpack(packed.data.data_ptr(), packed.rows, packed.columns, packed.format, 1)


def unpack_expert(packed: PackedExperts, expert: int) -> tuple[Tensor, Tensor]:
    """(up [H, D], down [D, F]) in fp32 of one expert."""
    dim, hidden, format = packed.dim, packed.hidden_dim, packed.format
    at = packed.data.data_ptr() + expert * packed.slab_bytes
    up_bytes = matrix_bytes(hidden, dim, format)
    if packed.activation in UNGATED:
        up_HD = _unpack(at, hidden, dim, format, 1)
        return up_HD, _unpack(at + up_bytes, dim, hidden, format, 1)
    block = up_bytes // -(-hidden // COLUMNS)
    gate_FD, up_FD = (_unpack(at + n * block, hidden, dim, format, 2) for n in (0, 1))
    return torch.cat([gate_FD, up_FD]), _unpack(at + 2 * up_bytes, dim, hidden, format, 1)


def linear(packed: PackedMatrix, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Multiply rows by a packed matrix: x · wᵀ + bias, [T, I] → [T, O] in x's dtype.

    bf16 weights multiply x rounded to bf16; int8 and int4 weights multiply x rounded to 8 bits,
    with a scale for each group. Sums are fp32, in a fixed order.

    Raises:
        ShapeError: x is not [T, I] in fp32 or bf16 on CPU, or the bias not fp32 [O].
    """
    x_TI = _rows(x_TI, packed.columns)
    if bias_O is not None:
        _check(bias_O, "the bias", (packed.rows,), torch.float32)
    y_TO = x_TI.new_empty(x_TI.shape[0], packed.rows)
    matrix = matrix_of(packed)
    bias = None if bias_O is None else bias_O.data_ptr()
    _done(
        library().moestro_linear(
            ctypes.byref(matrix), _DTYPES[x_TI.dtype], x_TI.data_ptr(), len(x_TI), y_TO.data_ptr(),
            bias,
        )
    )  # fmt: skip
    return y_TO


def mixture(
    packed: PackedExperts, x_TD: Tensor, tokens_A: Tensor, experts_A: Tensor, weights_A: Tensor
) -> Tensor:
    """A whole mixture: gather, gate and up, activation, down, weighted sum in a fixed order.

    The definition is `reference.mixture` over the unpacked weights, up to rounding.

    Args:
        packed: the experts.
        x_TD: tokens, fp32 or bf16.
        tokens_A: int64, token of each assignment, not falling.
        experts_A: int64, its expert.
        weights_A: fp32, its weight.

    Returns:
        y_TD in x's dtype; zero for a token without an assignment.

    Raises:
        ShapeError: a shape or dtype does not fit, or an index is out of range.
    """
    x_TD = _rows(x_TD, packed.dim)
    for name, each in (("tokens", tokens_A), ("experts", experts_A)):
        _check(each, name, (len(tokens_A),), torch.int64, contiguous=False)
    _check(weights_A, "weights", (len(tokens_A),), weights_A.dtype, contiguous=False)
    y_TD = torch.empty_like(x_TD)
    tokens_A, experts_A, weights_A = (
        each.contiguous() for each in (tokens_A, experts_A, weights_A.float())
    )
    experts = experts_of(packed)
    _done(
        library().moestro_mixture(
            ctypes.byref(experts), _DTYPES[x_TD.dtype], x_TD.data_ptr(), len(x_TD),
            tokens_A.data_ptr(), experts_A.data_ptr(), weights_A.data_ptr(), len(tokens_A),
            y_TD.data_ptr(),
        )
    )  # fmt: skip
    return y_TD


def plain_matrix(w_OI: Tensor) -> PackedMatrix:
    """A matrix of a model as it is, not copied: fp32 or bf16 on CPU.

    bf16 weights multiply rows rounded to bf16, fp32 weights multiply in fp32.

    Raises:
        ShapeError: it is no such matrix, or bf16 with an odd number of columns.
    """
    w_OI = _plain(w_OI)
    return PackedMatrix(w_OI, w_OI.shape[0], w_OI.shape[1], PLAIN)


def plain_experts(
    up_EHD: Tensor,
    down_EDF: Tensor,
    activation: str,
    up_bias_EH: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
) -> PackedExperts:
    """Stacked experts as they are, not copied; see `plain_matrix`. Biases are taken as fp32.

    Raises:
        ShapeError: see `plain_matrix`; or up and down do not fit each other.
    """
    up_EHD, down_EDF = _plain(up_EHD), _plain(down_EDF)
    dim, hidden = _sizes(up_EHD, down_EDF, activation)
    num_experts = len(down_EDF)
    if up_EHD.dtype != down_EDF.dtype:
        raise ShapeError(f"up is {up_EHD.dtype} and down {down_EDF.dtype}; both must be the same")
    up_bias, down_bias = (
        None if each is None else each.detach().float().contiguous()
        for each in (up_bias_EH, down_bias_ED)
    )
    return PackedExperts(
        up_EHD, num_experts, dim, hidden, activation, PLAIN, up_bias, down_bias, down_EDF
    )


def _plain(weight: Tensor) -> Tensor:
    odd = weight.dtype == torch.bfloat16 and weight.shape[-1] % 2
    if weight.dtype not in _DTYPES or weight.device.type != "cpu" or odd:
        raise ShapeError(
            f"plain weights are fp32, or bf16 with an even width, on CPU; given {weight.dtype} "
            f"{list(weight.shape)} on {weight.device}"
        )
    return weight.detach().contiguous()


def matrix_of(packed: PackedMatrix) -> Matrix:
    """The C structure; the tensor must outlive it."""
    kind = _kind(packed.format, packed.data)
    return Matrix(packed.data.data_ptr(), packed.rows, packed.columns, kind, packed.format.group)


def experts_of(packed: PackedExperts) -> Experts:
    """The C structure; the tensors must outlive it."""
    down, biases = packed.down, (packed.up_bias, packed.down_bias)
    return Experts(
        packed.data.data_ptr(), None if down is None else down.data_ptr(), packed.slab_bytes,
        packed.num_experts, packed.dim, packed.hidden_dim, _kind(packed.format, packed.data),
        packed.format.group, ACTIVATIONS.index(packed.activation), 0,
        *(None if each is None else each.data_ptr() for each in biases),
    )  # fmt: skip


def read(data: Tensor) -> int:
    """Read memory once with all threads, as fast as it goes: what bandwidth is measured by."""
    return int(library().moestro_read(data.data_ptr(), data.numel() * data.element_size()))


def _code(format: Format) -> tuple[int, int]:
    return KINDS.index(format.kind), format.group


def _kind(format: Format, data: Tensor) -> int:
    """The number in moestro.h; plain bf16 comes before plain fp32."""
    return KINDS.index(format.kind) + (format.kind == "plain" and data.dtype == torch.float32)


def _sizes(up: Tensor, down: Tensor, activation: str) -> tuple[int, int]:
    """(D, F) of one expert, up [H, D] and down [D, F], or of stacked ones.

    Raises:
        ShapeError: they do not fit each other.
    """
    *experts, dim, hidden = down.shape
    wanted = (*experts, hidden * (1 if activation in UNGATED else 2), dim)
    if activation not in ACTIVATIONS or tuple(up.shape) != wanted:
        raise ShapeError(
            f"{activation} experts with down {list(down.shape)} have up {list(wanted)}; given "
            f"{list(up.shape)} (activations: {', '.join(ACTIVATIONS)})"
        )
    return dim, hidden


def _check(
    tensor: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype, contiguous: bool = True
) -> None:
    """Refuse what native code would read wrongly."""
    fits = tuple(tensor.shape) == shape and tensor.dtype == dtype and tensor.device.type == "cpu"
    if not fits or (contiguous and not tensor.is_contiguous()):
        raise ShapeError(
            f"{name} must be {dtype} {list(shape)} on CPU; given {tensor.dtype} "
            f"{list(tensor.shape)} on {tensor.device}"
        )


def _rows(x_TI: Tensor, columns: int) -> Tensor:
    if x_TI.dim() != 2 or x_TI.shape[1] != columns or x_TI.dtype not in _DTYPES:
        raise ShapeError(
            f"packed weights take fp32 or bf16 rows [T, {columns}]; given {x_TI.dtype} "
            f"{list(x_TI.shape)}"
        )
    if x_TI.device.type != "cpu":
        raise ShapeError(f"packed weights compute on CPU; the rows are on {x_TI.device}")
    return x_TI.detach().contiguous()


def _pack(w_OI: Tensor, format: Format, address: int, step: int) -> None:
    if w_OI.dim() != 2 or w_OI.dtype not in _DTYPES or w_OI.device.type != "cpu":
        raise ShapeError(
            f"what is packed is an fp32 or bf16 matrix on CPU; given {w_OI.dtype} "
            f"{list(w_OI.shape)} on {w_OI.device}"
        )
    w_OI = w_OI.detach().contiguous()
    code = library().moestro_pack(
        *_code(format), _DTYPES[w_OI.dtype], w_OI.data_ptr(), *w_OI.shape, w_OI.shape[1],
        address, step,
    )  # fmt: skip
    if code:
        raise ShapeError(
            "the weights hold NaN or infinity, or (for int8 and int4) a size above 65504; "
            "they cannot be packed"
        )


def _unpack(address: int, rows: int, columns: int, format: Format, step: int) -> Tensor:
    w_OI = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
    _done(library().moestro_unpack(*_code(format), address, rows, columns, step, w_OI.data_ptr()))
    return w_OI


def _done(code: int) -> None:
    if code == -2:
        raise MemoryError("not enough memory for the native kernels' buffers")
    if code:
        raise ShapeError(
            "the native kernel refused its arguments: an expert or token is out of range, or the "
            "assignments are not in the order of their tokens"
        )
