"""Tensors in pieces: each rank's blocks in a safetensors file of its own.

    model-rank-00001-of-00004.safetensors     the first rank's blocks of the model's tensors

A piece is a block of the first two axes. Where it begins stands in the file's header as
torch.distributed.checkpoint's safetensors form has it (`DCP_SHARDING_INFO`), so its
HuggingFaceStorageReader reads such a folder too. Here a tensor in pieces is one more source, so
whatever reads a checkpoint reads these, and any rows of it, whoever wrote them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from moestro.checkpoints.tensor_files import Source, Stored, TensorFile, Written, open_file, some
from moestro.errors import CheckpointError
from moestro.strictjson import parse

WEIGHTS = "model"  # the stem of the model's own tensors
_INFO, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
_NAME = re.compile(r"(?P<stem>[a-z]+)-rank-(?P<rank>\d{5})-of-(?P<ranks>\d{5})\.safetensors")


class Piece(NamedTuple):
    """A block of a tensor, and where it begins on the first axis and the second."""

    key: str
    block: Tensor
    first: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Pieced(Source):
    """A tensor of several files; `parts` are (where the block begins, the block)."""

    parts: tuple[tuple[tuple[int, ...], Stored], ...]

    def entry(self, index: int) -> Source:
        """Entry `index` of the first axis, as a tensor of its own."""
        inside = [
            (at[1:], part.entry(index - at[0]))
            for at, part in self.parts
            if at[0] <= index < at[0] + part.shape[0]
        ]
        size = sum(part.bytes for _, part in inside)
        return replace(self, shape=self.shape[1:], bytes=size, parts=tuple(inside))

    def load(self, dtype: torch.dtype) -> Tensor:
        """The tensor on the CPU as it is stored, whatever `dtype`."""
        tensor = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        self.load_into(tensor)
        return tensor

    def load_into(self, target: Tensor) -> None:
        """Fill a tensor of this shape, converted to its dtype."""
        load_block(self, (0, 0), target)


def load_block(source: Source, first: tuple[int, int], target: Tensor) -> None:
    """Fill `target` with the block of a tensor that begins at `first` on its first two axes.

    Raises:
        CheckpointError: a file cannot be read.
    """
    parts = source.parts if isinstance(source, Pieced) else (((0,) * target.dim(), source),)
    for at, part in parts:
        assert isinstance(part, Stored)
        sizes = zip(at[:2], part.shape, first, target.shape, strict=False)
        # On each of the two axes: the overlap, from the start of the part and of the target.
        spans = [(max(a, f), min(a + n, f + m), a, f) for a, n, f, m in sizes]
        if any(low >= high for low, high, _, _ in spans):
            continue
        low, high, a, f = spans[0]
        if len(spans) == 1 or part.shape[1:] == target.shape[1:]:
            part.part(low - a, high - a).load_into(target[low - f : high - f])
            continue
        left, right, b, g = spans[1]
        for row in range(low, high):
            piece = part.entry(row - a).part(left - b, right - b)
            piece.load_into(target[row - f, left - g : right - g])


def file_of_pieces(stem: str, pieces: Sequence[Piece], rank: int, ranks: int) -> TensorFile:
    """What a rank writes, be it empty: every rank has a file."""
    offsets = {
        key: {_OFFSETS: [*first, *[0] * block.dim()][: block.dim()]} for key, block, first in pieces
    }
    tensors = [Written.of(key, block) for key, block, _ in pieces]
    name = f"{stem}-rank-{rank + 1:05d}-of-{ranks:05d}.safetensors"
    return TensorFile(name, tensors, {_INFO: json.dumps(offsets)})


def in_pieces(folder: Path, stem: str) -> bool:
    """Whether a folder holds a rank's file of this stem."""
    return bool(_files(folder, stem))


def open_pieces(folder: Path, stem: str) -> dict[str, Source]:
    """Every tensor by key, from all ranks' files.

    Raises:
        CheckpointError: a file or block is missing, or pieces do not fit together; names them.
    """
    files = _files(folder, stem)
    ranks = {int(match["ranks"]) for match in files.values()}
    if len(ranks) != 1 or len(files) != next(iter(ranks)):
        raise CheckpointError(
            f"{folder} holds {some(path.name for path in files)}, not one file of each rank; "
            "use another checkpoint"
        )
    parts: dict[str, list[tuple[tuple[int, ...], Stored]]] = {}
    for path in files:
        starts = _starts(path)
        for key, stored in open_file(path).items():
            start = starts.get(key, ())
            if len(start) != len(stored.shape) or not all(
                isinstance(each, int) and each >= 0 for each in start
            ):
                raise CheckpointError(
                    f"{path} does not say where {key!r} {tuple(stored.shape)} lies; use another "
                    "checkpoint"
                )
            parts.setdefault(key, []).append((start, stored))
    return {key: _joined(folder, key, found) for key, found in parts.items()}


def _files(folder: Path, stem: str) -> dict[Path, re.Match[str]]:
    found = {path: _NAME.fullmatch(path.name) for path in sorted(folder.glob(f"{stem}-rank-*"))}
    return {path: match for path, match in found.items() if match and match["stem"] == stem}


def _starts(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, "pt") as file:
            info = parse((file.metadata() or {})[_INFO])
        return {key: tuple(value[_OFFSETS]) for key, value in info.items()}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} does not say which blocks it holds ({error!r}); use another checkpoint"
        ) from None


def _joined(folder: Path, key: str, found: list[tuple[tuple[int, ...], Stored]]) -> Source:
    """One source of the blocks of a tensor."""
    stored = found[0][1]
    ends = [[a + n for a, n in zip(at, part.shape, strict=True)] for at, part in found]
    shape = tuple(map(max, zip(*ends, strict=True)))
    held = sum(math.prod(part.shape) for _, part in found)
    if held != math.prod(shape) or any(part.dtype != stored.dtype for _, part in found):
        raise CheckpointError(
            f"{folder}: the blocks of {key} hold {held:,} numbers of {list(shape)}; use another "
            "checkpoint"
        )
    if len(found) == 1:
        return stored
    size = sum(part.bytes for _, part in found)
    return Pieced(stored.file, key, stored.dtype, shape, size, tuple(found))
