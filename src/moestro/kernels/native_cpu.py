"""Linear maps and mixtures by the native CPU kernels, over packed weights or plain ones.

All paths (amx, avx512, avx2, portable) give the same bits, whatever the number of rows, the other
rows of the batch and the threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from moestro.errors import ShapeError
from moestro.kernels.addresses import CPU, FP32, INT64, ROWS, UINT8, address, check, piece
from moestro.kernels.native_library import CExperts, CMatrix, call
from moestro.kernels.native_library import available as available
from moestro.kernels.native_library import library as library
from moestro.kernels.native_library import path as path
from moestro.kernels.packing import (
    ACTIVATIONS,
    COLUMNS,
    KINDS,
    PAGE,
    UNGATED,
    ExpertSlabs,
    Format,
    PackedMatrix,
    blank_experts,
    blank_matrix,
)
from moestro.kernels.packing import matrix_bytes as matrix_bytes
from moestro.kernels.packing import slab_bytes as slab_bytes
from moestro.kernels.reference import Biases

PLAIN = Format("plain")
_LINE = 64  # what packed weights begin at a multiple of, in bytes


def aligned(nbytes: int) -> Tensor:
    """Uninitialised uint8 memory that starts on a page."""
    memory = torch.empty(nbytes + PAGE, dtype=torch.uint8, device=CPU)
    start = -memory.data_ptr() % PAGE
    return memory[start : start + nbytes]


def pack_matrix(w_OI: Tensor, format: Format, bias_O: Tensor | None = None) -> PackedMatrix:
    """Pack one matrix; a bias beside it becomes fp32.

    Raises:
        ShapeError: it is not an fp32 or bf16 matrix, or holds values that cannot be packed.
    """
    w_OI = _packable(w_OI)
    blank = blank_matrix(w_OI, format, bias_O)
    data = aligned(blank.data.numel())
    _pack(w_OI, format, data.data_ptr(), 1)
    return blank._replace(data=data)


def pack_experts(
    up_EHD: Tensor,
    down_EDF: Tensor,
    activation: str,
    format: Format,
    up_bias_EH: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
    interleaved: bool = False,
) -> ExpertSlabs:
    """Pack stacked experts of any strides, in as many threads as torch has.

    fp16 and fp64 go through fp32, an expert at a time; biases become fp32. Rows of the gate come
    before those of up, or (`interleaved`) in turn with them.

    Raises:
        ShapeError: see `pack_matrix`; names the expert.
    """
    if interleaved:
        up_EHD = up_EHD.unflatten(1, (-1, 2)).transpose(1, 2)  # [E, 2, F, D], not copied
        if up_bias_EH is not None:
            up_bias_EH = up_bias_EH.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1)
    blank = blank_experts(down_EDF, activation, format, up_bias_EH, down_bias_ED)
    data = aligned(blank.data.numel())
    slabs = data.view(blank.num_experts, -1)

    def pack(expert: int) -> None:
        up_HD, down_DF = (
            each.detach() if each.dtype in ROWS else each.detach().float()
            for each in (up_EHD[expert].flatten(0, -2), down_EDF[expert])
        )
        try:
            pack_expert(up_HD, down_DF, activation, format, slabs[expert])
        except ShapeError as error:
            raise ShapeError(f"expert {expert}: {error}") from error

    with ThreadPoolExecutor(torch.get_num_threads()) as packers:
        list(packers.map(pack, range(blank.num_experts)))
    return blank._replace(data=data)


def pack_expert(
    up_HD: Tensor, down_DF: Tensor, activation: str, format: Format, slab: Tensor
) -> None:
    """Pack one expert into its slab (uint8, `slab_bytes` long, on a multiple of 64 bytes).

    Raises:
        ShapeError: see `pack_matrix`.
    """
    up_HD, down_DF = _packable(up_HD), _packable(down_DF)
    dim, hidden = _sizes(up_HD, down_DF, activation)
    at = _packed_at(slab, slab_bytes(dim, hidden, activation, format), "slab")
    ups, step, down = _within(dim, hidden, activation, format)
    for offset, part_FD in zip(ups, up_HD.split(hidden), strict=True):
        _pack(part_FD, format, at + offset, step)
    _pack(down_DF, format, at + down, 1)


def unpack_matrix(packed: PackedMatrix) -> Tensor:
    """The fp32 matrix [rows, columns] that a packed one stands for.

    Raises:
        ShapeError: it is plain, or its data is not what it says.
    """
    data, rows, columns, format, _ = packed
    return _unpack(_packed_at(data, matrix_bytes(rows, columns, format)), rows, columns, format, 1)


def unpack_expert(packed: ExpertSlabs, expert: int) -> tuple[Tensor, Tensor]:
    """(up [H, D], down [D, F]) in fp32 of one expert.

    Raises:
        ShapeError: see `unpack_matrix`; or there is no such expert.
    """
    dim, hidden, format = packed.dim, packed.hidden_dim, packed.format
    size = slab_bytes(dim, hidden, packed.activation, format)
    if not 0 <= expert < packed.num_experts:
        raise ShapeError(f"experts are 0 to {packed.num_experts - 1}; given {expert}")
    at = _packed_at(packed.data, packed.num_experts * size) + expert * size
    ups, step, down = _within(dim, hidden, packed.activation, format)
    up_HD = torch.cat([_unpack(at + offset, hidden, dim, format, step) for offset in ups])
    return up_HD, _unpack(at + down, dim, hidden, format, 1)


def _within(dim: int, hidden: int, activation: str, format: Format) -> tuple[list[int], int, int]:
    """Where gate and up begin in a slab, how many blocks apart theirs are, where down begins."""
    up_bytes = matrix_bytes(hidden, dim, format)
    if activation in UNGATED:
        return [0], 1, up_bytes
    return [0, up_bytes // -(-hidden // COLUMNS)], 2, 2 * up_bytes


def linear(packed: PackedMatrix, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Multiply rows by a packed matrix: x · wᵀ + bias, [T, I] → [T, O] in x's dtype.

    bf16 weights multiply x rounded to bf16; int8 and int4 weights multiply x rounded to 8 bits,
    with a scale for each group. Sums are fp32, in a fixed order.

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
    """
    experts, (size,) = experts_of(packed), (tokens_A.numel(),)
    x_TD, x_at = piece(x_TD, "rows", (*x_TD.shape[:1], packed.dim), ROWS)
    tokens_A, tokens_at = piece(tokens_A, "tokens", (size,), INT64)
    experts_A, experts_at = piece(experts_A, "experts", (size,), INT64)
    weights_A, weights_at = piece(weights_A, "weights", (size,), FP32, torch.float32)
    y_TD = torch.empty_like(x_TD)
    call(
        "mixture", ctypes.byref(experts), ROWS[x_TD.dtype], x_at, len(x_TD), tokens_at, experts_at,
        weights_at, size, y_TD.data_ptr(),
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
    up_EHD: Tensor,
    down_EDF: Tensor,
    activation: str,
    up_bias_EH: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
) -> ExpertSlabs:
    """Stacked experts as they are, not copied; see `plain_matrix`. Biases are taken as fp32.

    Raises:
        ShapeError: see `plain_matrix`; or up and down do not fit each other.
    """
    up_EHD = check(up_EHD, "up", (None, None, None), ROWS).detach().contiguous()
    down_EDF = check(down_EDF, "down", (None, None, None), (up_EHD.dtype,)).detach().contiguous()
    up_bias, down_bias = (
        None if each is None else each.detach().float().contiguous()
        for each in (up_bias_EH, down_bias_ED)
    )
    dim, hidden = _sizes(up_EHD, down_EDF, activation)
    return ExpertSlabs(
        up_EHD, len(down_EDF), dim, hidden, activation, PLAIN, up_bias, down_bias, down_EDF
    )


def matrix_of(packed: PackedMatrix) -> CMatrix:
    """The C structure; the tensor must outlive it.

    Raises:
        ShapeError: the data is not what the matrix says of it.
    """
    data, rows, columns, format, _ = packed
    if format.kind == "plain":
        at = _plain_at(data, (rows, columns))
    else:
        at = _packed_at(data, matrix_bytes(rows, columns, format))
    return CMatrix(at, rows, columns, _kind(format, data), format.group)


def experts_of(packed: ExpertSlabs) -> CExperts:
    """The C structure; the tensors must outlive it.

    Raises:
        ShapeError: the tensors are not what the experts say of them.
    """
    data, num_experts, dim, hidden, activation, format, up_bias, down_bias, down = packed
    if activation not in ACTIVATIONS or num_experts < 1:
        raise ShapeError(
            f"experts are at least one, of {', '.join(ACTIVATIONS)}; given {num_experts} of "
            f"{activation!r}"
        )
    width, slab, down_at = hidden * (1 if activation in UNGATED else 2), 0, None
    if format.kind == "plain":
        at = _plain_at(data, (num_experts, width, dim))
        down_at = _plain_at(down, (num_experts, dim, hidden), (data.dtype,))
    else:
        slab = slab_bytes(dim, hidden, activation, format)
        at = _packed_at(data, num_experts * slab)
    biases = (
        None if bias is None else address(bias, "bias", (num_experts, size), FP32)
        for bias, size in ((up_bias, width), (down_bias, dim))
    )
    return CExperts(
        at, down_at, slab, num_experts, dim, hidden, _kind(format, data), format.group,
        ACTIVATIONS.index(activation), 0, *biases,
    )  # fmt: skip


def _packed_at(data: Tensor, nbytes: int, name: str = "packed weights") -> int:
    return address(data, name, (nbytes,), UINT8, _LINE)


def _plain_at(
    weight: Tensor | None, shape: tuple[int, ...], dtypes: Iterable[torch.dtype] = ROWS
) -> int:
    at = address(weight, "plain weights", shape, dtypes)
    odd = shape[-1] % 2 and weight is not None and weight.dtype == torch.bfloat16
    if odd or min(shape) < 1:
        raise ShapeError(
            f"plain weights are not empty, and have an even width in bfloat16; given {list(shape)}"
        )
    return at


def read(data: Tensor) -> int:
    """Read memory once with all threads, as fast as it goes: what bandwidth is measured by."""
    at = address(data, "data", data.shape, (data.dtype,))
    return int(library().moestro_read(at, data.nbytes))


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


def _range(name: str, given_A: Tensor, count: int) -> str:
    """Which indices are allowed and which were given."""
    ids = given_A.tolist()
    return f"{name} from 0 to {count - 1}, given {min(ids, default=0)} to {max(ids, default=0)}"


def _packable(w_OI: Tensor) -> Tensor:
    return check(w_OI, "the matrix to pack", (None, None), ROWS).detach().contiguous()


def _pack(w_OI: Tensor, format: Format, at: int, step: int) -> None:
    given = (ROWS[w_OI.dtype], address(w_OI, "weights", w_OI.shape, ROWS), *w_OI.shape)
    call(
        "pack", KINDS.index(format.kind), format.group, *given, w_OI.shape[1], at, step,
        takes="weights without NaN or infinity, and for int8 and int4 of magnitude up to 65504",
    )  # fmt: skip


def _unpack(at: int, rows: int, columns: int, format: Format, step: int) -> Tensor:
    w_OI = torch.empty(rows, columns, dtype=torch.float32, device=CPU)
    kind = KINDS.index(format.kind)
    call("unpack", kind, format.group, at, rows, columns, step, w_OI.data_ptr())
    return w_OI
