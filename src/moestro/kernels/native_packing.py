"""Packing weights by the native library, and back; `moestro.kernels.packing` is the definition."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

from moestro.errors import ShapeError
from moestro.kernels.addresses import CPU, ROWS, UINT8, address, check
from moestro.kernels.formats import packed_at_once
from moestro.kernels.native_library import call
from moestro.kernels.packing import (
    ACTIVATIONS,
    COLUMNS,
    EXACT,
    KINDS,
    PAGE,
    TABLES,
    UNGATED,
    BlockRows,
    ExpertSlabs,
    Format,
    PackedMatrix,
    StoredRows,
    blank_experts,
    blank_matrix,
    block_row_bytes,
    matrix_bytes,
    slab_bytes,
)

ROWS_BLOCKS = 256  # as native/moestro.h has it
_LARGE_BYTES = 1 << 21
_LINE = 64  # what packed weights begin at a multiple of, in bytes


def aligned(nbytes: int) -> Tensor:
    """Uninitialised uint8 memory that starts on a page; see `of_the_system`."""
    if (large := of_the_system(nbytes)) is not None:
        return large
    memory = torch.empty(nbytes + PAGE, dtype=torch.uint8, device=CPU)
    start = -memory.data_ptr() % PAGE
    return memory[start : start + nbytes]


def private_memory(nbytes: int) -> mmap.mmap:
    """Memory of its own, in huge pages where the system has them.

    Half the time of loading a model is the system handing out its memory in 4 KiB pages; a disk
    that is read past the page cache is half as fast into such.

    Raises:
        MemoryError: there is not so much.
    """
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError(f"not enough memory for {-(-nbytes >> 20)} MiB") from None
        raise
    huge = getattr(mmap, "MADV_HUGEPAGE", None)
    if huge is not None:
        with suppress(OSError):  # a kernel without huge pages: slower, and nothing else
            memory.madvise(huge)
    return memory


def of_the_system(nbytes: int) -> Tensor | None:
    """Much memory, in huge pages, which goes back at once when it is let go; None: it is little.

    What an allocator takes back from packed modules it cannot always use for the next ones.
    """
    if nbytes < _LARGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    return torch.frombuffer(private_memory(nbytes), dtype=torch.uint8)


def pack_matrix(
    w_OI: Tensor,
    format: Format,
    bias_O: Tensor | None = None,
    stored: StoredRows | None = None,
) -> PackedMatrix:
    """Pack one matrix; a bias beside it becomes fp32.

    Args:
        w_OI: the matrix; with `stored` only its shape counts.
        format: of the packed matrix.
        bias_O: beside it.
        stored: what holds it as its "weight".

    Raises:
        ShapeError: it is not an fp32 or bf16 matrix, or holds values that cannot be packed.
    """
    parts: Iterable[Tensor | BlockRows]
    parts = [_packable(w_OI)] if stored is None else stored.rows("weight")
    blank = blank_matrix(w_OI, format, bias_O)
    data = aligned(blank.data.numel())
    rounding = None if stored is None else stored.rounding
    _pack(parts, w_OI.shape, format, data.data_ptr(), 1, rounding)
    return blank._replace(data=data)


def pack_experts(
    up_EHD: Tensor,
    down_EDF: Tensor,
    activation: str,
    format: Format,
    up_bias_EH: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
    interleaved: bool = False,
    stored: StoredRows | None = None,
) -> ExpertSlabs:
    """Pack stacked experts of any strides, in as many threads as torch has.

    fp16 and fp64 go through fp32, an expert at a time; biases become fp32. Rows of the gate come
    before those of up, or (`interleaved`) in turn with them. With `stored`, which holds them as
    "gate_up" and "down", only the shapes of the first two count.

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
    # Each has its own, added in the experts' order: threads neither wait nor change the sum.
    added_E2 = torch.zeros(blank.num_experts, 2, dtype=torch.float64, device=CPU)

    @torch.inference_mode(data.is_inference())  # a thread does not have the caller's mode
    def pack(expert: int) -> None:
        try:
            if stored is not None:
                ups, down = (list(stored.rows(name, expert)) for name in ("gate_up", "down"))
                sizes = (blank.dim, blank.hidden_dim)
                _pack_slab(ups, down, sizes, activation, format, slabs[expert], added_E2[expert])
                return
            up_HD, down_DF = (
                each.detach() if each.dtype in ROWS else each.detach().float()
                for each in (up_EHD[expert].flatten(0, -2), down_EDF[expert])
            )
            pack_expert(up_HD, down_DF, activation, format, slabs[expert])
        except ShapeError as error:
            raise ShapeError(f"expert {expert}: {error}") from error

    numbers = up_EHD[0].numel() + down_EDF[0].numel()
    with ThreadPoolExecutor(packed_at_once(numbers, torch.get_num_threads())) as packers:
        list(packers.map(pack, range(blank.num_experts)))
    if stored is not None:
        stored.rounding += added_E2.sum(0)
    return blank._replace(data=data)


def pack_expert(
    up_HD: Tensor, down_DF: Tensor, activation: str, format: Format, slab: Tensor
) -> None:
    """Pack one expert into its slab (uint8, `slab_bytes` long, on a multiple of 64 bytes).

    Raises:
        ShapeError: see `pack_matrix`.
    """
    up_HD, down_DF = _packable(up_HD), _packable(down_DF)
    sizes = expert_sizes(up_HD.shape, down_DF.shape, activation)
    _pack_slab(list(up_HD.split(sizes[1])), [down_DF], sizes, activation, format, slab)


def _pack_slab(
    ups: Sequence[Tensor | BlockRows],
    down: Sequence[Tensor | BlockRows],
    sizes: tuple[int, int],
    activation: str,
    format: Format,
    slab: Tensor,
    rounding: Tensor | None = None,
) -> None:
    """Pack gate and up, or up alone, and the parts of down."""
    dim, hidden = sizes
    at = packed_at(slab, slab_bytes(dim, hidden, activation, format), "slab")
    slab[-PAGE:] = 0  # what follows the weights is written to files too
    places, step, down_at = _within(dim, hidden, activation, format)
    if len(ups) < len(places):
        ups = _halves(ups[0])
    for offset, part in zip(places, ups, strict=True):
        _pack([part], (hidden, dim), format, at + offset, step, rounding)
    _pack(down, (dim, hidden), format.of_down, at + down_at, 1, rounding)


def _halves(part: Tensor | BlockRows) -> Sequence[Tensor | BlockRows]:
    """Gate and up of both in one."""
    if isinstance(part, Tensor):
        return part.chunk(2)
    return [part._replace(data=half) for half in part.data.chunk(2)]


def unpack_matrix(packed: PackedMatrix) -> Tensor:
    """The fp32 matrix [rows, columns] that a packed one stands for.

    Raises:
        ShapeError: it is plain, or its data is not what it says.
    """
    data, rows, columns, format, _ = packed
    at = packed_at(data, matrix_bytes(rows, columns, format))
    w_OI = torch.empty(rows, columns, dtype=torch.float32, device=CPU)
    _unpack_into(w_OI, at, format, 1)
    return w_OI


def unpack_expert(packed: ExpertSlabs, expert: int) -> tuple[Tensor, Tensor]:
    """(up [H, D], down [D, F]) in fp32 of one expert.

    Raises:
        ShapeError: see `unpack_matrix`; or there is no such expert.
    """
    return unpack_up(packed, expert), unpack_down(packed, expert)


def unpack_up(packed: ExpertSlabs, expert: int) -> Tensor:
    """The fp32 matrix [H, D] of one expert; raises as `unpack_expert` does."""
    at, (places, step, _) = _slab_at(packed, expert)
    up_NFD = torch.empty(
        len(places), packed.hidden_dim, packed.dim, dtype=torch.float32, device=CPU
    )
    for offset, up_FD in zip(places, up_NFD, strict=True):
        _unpack_into(up_FD, at + offset, packed.format, step)
    return up_NFD.flatten(0, 1)


def unpack_down(packed: ExpertSlabs, expert: int) -> Tensor:
    """The fp32 matrix [D, F] of one expert; raises as `unpack_expert` does."""
    at, (_, _, offset) = _slab_at(packed, expert)
    down_DF = torch.empty(packed.dim, packed.hidden_dim, dtype=torch.float32, device=CPU)
    _unpack_into(down_DF, at + offset, packed.format.of_down, 1)
    return down_DF


def _slab_at(packed: ExpertSlabs, expert: int) -> tuple[int, tuple[Sequence[int], int, int]]:
    """Address of an expert's slab, and where in it its matrices are."""
    sizes = (packed.dim, packed.hidden_dim, packed.activation, packed.format)
    if not 0 <= expert < packed.num_experts:
        raise ShapeError(f"experts are 0 to {packed.num_experts - 1}; given {expert}")
    size = slab_bytes(*sizes)
    return packed_at(packed.data, packed.num_experts * size) + expert * size, _within(*sizes)


def read_rows(rows: BlockRows) -> Tensor:
    """The fp32 numbers [O, I] of rows of blocks.

    Raises:
        ShapeError: the blocks are not known here (`packing.BLOCKS`), or do not fit.
    """
    count, dtype, place = _rows_of(rows, rows.columns)
    out_OI = torch.empty(count, rows.columns, dtype=torch.float32, device=CPU)
    call("read_rows", dtype, place, count, rows.columns, out_OI.data_ptr())
    return out_OI


def packed_at(data: Tensor, nbytes: int, name: str = "packed weights") -> int:
    """The address of packed weights, so many bytes on a multiple of 64.

    Raises:
        ShapeError: they are something else.
    """
    return address(data, name, (nbytes,), UINT8, _LINE)


def _within(dim: int, hidden: int, activation: str, format: Format) -> tuple[list[int], int, int]:
    """Where gate and up begin in a slab, how many blocks apart theirs are, where down begins."""
    up_bytes = matrix_bytes(hidden, dim, format)
    if activation in UNGATED:
        return [0], 1, up_bytes
    return [0, up_bytes // -(-hidden // COLUMNS)], 2, 2 * up_bytes


def expert_sizes(up: Sequence[int], down: Sequence[int], activation: str) -> tuple[int, int]:
    """(D, F) of one expert with up of shape [H, D] and down of [D, F], or of stacked ones.

    Raises:
        ShapeError: they do not fit each other.
    """
    *experts, dim, hidden = down
    wanted = (*experts, hidden * (1 if activation in UNGATED else 2), dim)
    if activation not in ACTIVATIONS or tuple(up) != wanted:
        raise ShapeError(
            f"{activation} experts with down {list(down)} have up {list(wanted)}; given "
            f"{list(up)} (activations: {', '.join(ACTIVATIONS)})"
        )
    return dim, hidden


def _packable(w_OI: Tensor) -> Tensor:
    return check(w_OI, "the matrix to pack", (None, None), ROWS).detach().contiguous()


def _pack(
    parts: Iterable[Tensor | BlockRows],
    shape: Sequence[int],
    format: Format,
    at: int,
    step: int,
    rounding: Tensor | None = None,
) -> None:
    """Pack a matrix of this shape, which comes in parts of whole blocks of rows."""
    kind, done = KINDS.index(format.kind), 0
    block = matrix_bytes(COLUMNS, shape[1], format) * step
    sums = None if rounding is None else address(rounding, "sums", (2,), (torch.float64,))
    for part in parts:
        number = part.number if isinstance(part, BlockRows) else None
        if format.kind in TABLES and number not in EXACT[format.kind]:
            raise ShapeError(f"{format.kind} holds its own blocks alone; take int8 for others")
        rows, dtype, place = _rows_of(part, shape[1])
        if done % COLUMNS or done + rows > shape[0]:
            raise ShapeError(f"{list(shape)} is packed from parts that do not fit: {rows} rows")
        to = at + done // COLUMNS * block
        call(
            "pack", kind, format.group, dtype, place, rows, shape[1], to, step, sums,
            takes="weights without NaN or infinity, and for integers of magnitude up to 65504",
        )  # fmt: skip
        done += rows
    if done != shape[0]:
        raise ShapeError(f"{list(shape)} is packed from {done} rows")


def _rows_of(part: Tensor | BlockRows, columns: int) -> tuple[int, int, int]:
    """(rows, dtype as native/moestro.h numbers it, address) of what is packed or read."""
    if isinstance(part, Tensor):
        place = address(part, "weights", (None, columns), ROWS)
        return len(part), ROWS[part.dtype], place
    if part.columns != columns or part.data.shape[1] != block_row_bytes(part.number, columns):
        raise ShapeError(f"rows of {columns} numbers are given as {list(part.data.shape)} bytes")
    place = address(part.data, "blocks", part.data.shape, UINT8)
    return len(part.data), ROWS_BLOCKS + part.number, place


def _unpack_into(w_OI: Tensor, at: int, format: Format, step: int) -> None:
    kind = KINDS.index(format.kind)
    call("unpack", kind, format.group, at, *w_OI.shape, step, w_OI.data_ptr())
