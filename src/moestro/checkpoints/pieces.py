"""Tensors in pieces: each rank's rows in a safetensors file of its own.

    model-rank-00001-of-00004.safetensors     the first rank's rows of the model's tensors

A piece is a range of the first axis. Where it begins stands in the file's header as
torch.distributed.checkpoint's safetensors form has it (`DCP_SHARDING_INFO`), so its
HuggingFaceStorageReader reads such a folder too. Here a tensor in pieces is one more source, so
whatever reads a checkpoint reads these, and any rows of it, whoever wrote them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from moestro.checkpoints.tensor_files import Source, Stored, Written, open_file, some, write_file
from moestro.errors import CheckpointError
from moestro.strictjson import parse

WEIGHTS = "model"  # the stem of the model's own tensors
_INFO, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
_NAME = re.compile(r"(?P<stem>[a-z]+)-rank-(?P<rank>\d{5})-of-(?P<ranks>\d{5})\.safetensors")


class Piece(NamedTuple):
    """Rows of a tensor: those from `first` on; a scalar is one row."""

    key: str
    rows: Tensor
    first: int


@dataclass(frozen=True)
class Pieced(Source):
    """A tensor of several files; `parts` are (its first row, where the rows are), in order."""

    parts: tuple[tuple[int, Stored], ...]

    def entry(self, index: int) -> Source:
        """Entry `index` of the first axis, as a tensor of its own."""
        first, part = next(p for p in reversed(self.parts) if p[0] <= index)
        return part.entry(index - first)

    def part(self, start: int, stop: int) -> Pieced:
        """Rows [start, stop)."""
        found = []
        for first, part in self.parts:
            low, high = max(start, first), min(stop, first + part.shape[0])
            if low < high:
                found.append((low - start, part.part(low - first, high - first)))
        size = sum(part.bytes for _, part in found)
        return replace(self, shape=(stop - start, *self.shape[1:]), bytes=size, parts=tuple(found))

    def load(self, dtype: torch.dtype) -> Tensor:
        """The tensor on the CPU as it is stored, whatever `dtype`."""
        assert self.dtype is not None
        tensor = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        self.load_into(tensor)
        return tensor

    def load_into(self, target: Tensor) -> None:
        """Fill a tensor of this shape, converted to its dtype."""
        for first, part in self.parts:
            part.load_into(target[first : first + part.shape[0]])


def write_pieces(folder: Path, stem: str, pieces: Sequence[Piece], rank: int, ranks: int) -> None:
    """Write this rank's file; every rank has one, be it empty.

    Raises:
        OSError: the disk is full or the place cannot be written.
    """
    offsets = {
        key: {_OFFSETS: [first, *[0] * (rows.dim() - 1)][: rows.dim()]}
        for key, rows, first in pieces
    }
    tensors = [
        Written(key, rows.dtype, tuple(rows.shape), lambda rows=rows: rows)  # type: ignore[misc]
        for key, rows, _ in pieces
    ]
    path = folder / f"{stem}-rank-{rank + 1:05d}-of-{ranks:05d}.safetensors"
    write_file(path, tensors, {_INFO: json.dumps(offsets)})


def in_pieces(folder: Path, stem: str) -> bool:
    """Whether a folder holds a rank's file of this stem."""
    return bool(_files(folder, stem))


def open_pieces(folder: Path, stem: str) -> dict[str, Source]:
    """Every tensor by key, from all ranks' files.

    Raises:
        CheckpointError: a file or rows are missing, or pieces do not fit together; names them.
    """
    files = _files(folder, stem)
    ranks = {int(match["ranks"]) for match in files.values()}
    if len(ranks) != 1 or len(files) != next(iter(ranks)):
        raise CheckpointError(
            f"{folder} holds {some(path.name for path in files)}, not one file of each rank; "
            "use another checkpoint"
        )
    parts: dict[str, list[tuple[int, Stored]]] = {}
    for path in files:
        firsts = _first_rows(path)
        for key, stored in open_file(path).items():
            parts.setdefault(key, []).append((firsts[key], stored))
    return {key: _joined(folder, key, found) for key, found in parts.items()}


def _files(folder: Path, stem: str) -> dict[Path, re.Match[str]]:
    found = {path: _NAME.fullmatch(path.name) for path in sorted(folder.glob(f"{stem}-rank-*"))}
    return {path: match for path, match in found.items() if match and match["stem"] == stem}


def _first_rows(path: Path) -> dict[str, int]:
    try:
        with safe_open(path, "pt") as file:
            info = parse((file.metadata() or {})[_INFO])
        return {key: (value[_OFFSETS] or [0])[0] for key, value in info.items()}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} does not say which rows it holds ({error!r}); use another checkpoint"
        ) from None


def _joined(folder: Path, key: str, found: list[tuple[int, Stored]]) -> Source:
    """One source of the pieces of a tensor."""
    found.sort(key=lambda part: part[0])
    stored = found[0][1]
    if len(found) == 1 and found[0][0] == 0:
        return stored
    row = 0
    for first, part in found:
        if first != row or part.shape[1:] != stored.shape[1:] or part.dtype != stored.dtype:
            raise CheckpointError(
                f"{folder}: the pieces of {key} do not fit together at row {row}; use another "
                "checkpoint"
            )
        row += part.shape[0]
    size = sum(part.bytes for _, part in found)
    shape = (row, *stored.shape[1:])
    return Pieced(stored.file, key, stored.dtype, shape, size, tuple(found))
