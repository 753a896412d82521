"""Addresses of tensors for native code, given away only where the memory is what it must be.

Native code trusts every address; what a function has not just made itself goes through here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from moestro.errors import ShapeError

CPU = torch.device("cpu")
ROWS = {torch.float32: 0, torch.bfloat16: 1}  # as native/moestro.h numbers them
FP32 = (torch.float32,)
INT64 = (torch.int64,)
UINT8 = (torch.uint8,)
FLOATS = (*ROWS, torch.float16, torch.float64)
Shape = tuple[int | None, ...]


def check(tensor: Tensor | None, name: str, shape: Shape, dtypes: Iterable[torch.dtype]) -> Tensor:
    """The tensor itself, if it is a dense one on CPU.

    Args:
        tensor: what was given.
        name: what it is to the person who gave it.
        shape: what it must have; None: any size.
        dtypes: one of which it must have.

    Raises:
        ShapeError: it is something else.
    """
    if (
        isinstance(tensor, Tensor)
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.dtype in dtypes
        and (tensor.shape == shape or _fits(tensor.shape, shape))
    ):
        return tensor
    raise _refusal(tensor, name, shape, dtypes)


def address(
    tensor: Tensor | None, name: str, shape: Shape, dtypes: Iterable[torch.dtype], multiple: int = 1
) -> int:
    """Where the memory of a tensor begins that `check` accepts, all of it in one piece.

    It begins at a multiple of `multiple` bytes.

    Raises:
        ShapeError: it is something else, strided (`.contiguous()` makes a copy that is not), or
            its memory is missing or was freed.
    """
    tensor = check(tensor, name, shape, dtypes)
    if tensor.is_contiguous():
        try:
            at, room = tensor.data_ptr(), tensor.untyped_storage().nbytes()
        except RuntimeError:  # a tensor of torch.func or of another wrapper
            at = room = -1
        size = tensor.element_size()
        whole = tensor.storage_offset() * size + tensor.nbytes <= room
        if whole and (at or not tensor.nbytes) and not at % multiple and not at % size:
            return at
    raise _refusal(tensor, name, shape, dtypes, f"in one piece at a multiple of {multiple} bytes, ")


def spread(
    tensor: Tensor | None, name: str, shape: Shape, dtypes: Iterable[torch.dtype]
) -> tuple[int, tuple[int, ...]]:
    """Where the memory of a tensor begins that `check` accepts, and its strides, whatever they are.

    Raises:
        ShapeError: it is something else, or its memory is missing or was freed.
    """
    tensor = check(tensor, name, shape, dtypes)
    try:
        at, room = tensor.data_ptr(), tensor.untyped_storage().nbytes()
    except RuntimeError:  # a tensor of torch.func or of another wrapper
        at = room = -1
    size, steps = tensor.element_size(), tensor.stride()
    last = sum((count - 1) * step for count, step in zip(tensor.shape, steps, strict=True))
    whole = (tensor.storage_offset() + last + 1) * size <= room
    if whole and tensor.numel() and at and not at % size:
        return at, steps
    raise _refusal(tensor, name, shape, dtypes, "not empty, in memory of its own, ")


def piece(
    tensor: Tensor,
    name: str,
    shape: Shape,
    dtypes: Iterable[torch.dtype],
    to: torch.dtype | None = None,
) -> tuple[Tensor, int]:
    """The tensor in one piece, copied where it is strided, and its `address`.

    Other float types are converted to `to` first, if that is given.
    """
    if to is not None and tensor.dtype != to:
        tensor = check(tensor, name, shape, FLOATS).to(to)
    tensor = tensor.contiguous()
    return tensor, address(tensor, name, shape, dtypes)


def _fits(shape: tuple[int, ...], wanted: Shape) -> bool:
    pairs = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and all(want in (None, size) for size, want in pairs)


def _refusal(
    tensor: object, name: str, shape: Shape, dtypes: Iterable[torch.dtype], place: str = ""
) -> ShapeError:
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    given = type(tensor).__name__
    if isinstance(tensor, Tensor):
        given = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}".removeprefix("torch.")
        given += f", strides {tensor.stride()}" if place else ""
    return ShapeError(f"{name} must be {kinds} [{sizes}], dense, {place}on CPU; given {given}")
