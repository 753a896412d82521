"""The tensors of a GGUF file as sources for a model: plain ones as they are, blocks dequantised."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moestro.checkpoints.families.slices import TensorSlice
from moestro.checkpoints.families.table import LAYOUTS, OF_ROWS, Layout
from moestro.checkpoints.gguf.header import Header, Kind, TensorInfo
from moestro.checkpoints.tensor_files import DTYPES, Source, Stored
from moestro.errors import CheckpointError
from moestro.kernels import native_cpu
from moestro.kernels.packing import BLOCKS, COLUMNS, BlockRows, Format

INSTALL = "pip install 'moestro[gguf]'"
# What stands in a file as one tensor for all experts of a layer.
_STACK = "_exps."
# The matrices of modules that can be packed.
_MATRICES = ("weight", "gate_up", "down")
# Blocks of four bits, less 8 or with a minimum for each 32.
_NIBBLES = {"Q4_0", "Q4_1", "Q4_K"}
# Vectors that are matrices of one row to us.
_ONE_ROW = ".ffn_gate_inp_shexp.weight"


@dataclass(frozen=True)
class Blocks(Source):
    """A tensor in blocks of integers with scales, whose bytes begin at `offset`."""

    kind: Kind
    offset: int

    def entry(self, index: int) -> Blocks:
        """Entry `index` of the first axis, as a tensor of its own."""
        size = self.bytes // self.shape[0]
        at = self.offset + index * size
        return replace(self, shape=self.shape[1:], bytes=size, offset=at)

    def rows(self) -> BlockRows:
        """A matrix as it is in the file.

        Raises:
            CheckpointError: the file cannot be read, or ends before its tensor does.
        """
        count, columns = math.prod(self.shape[:-1]), self.shape[-1]
        raw = Stored(self.file, self.key, torch.uint8, (self.bytes,), self.bytes, self.offset)
        return BlockRows(raw.load().view(count, -1), self.kind.number, columns)

    def load(self, dtype: torch.dtype) -> Tensor:
        """The numbers in `dtype`.

        Raises:
            CheckpointError: see `rows`; or there is nothing here that reads such blocks.
        """
        rows = self.rows()
        if self.kind.number in BLOCKS and native_cpu.available() is None:
            numbers = native_cpu.read_rows(rows)
        else:
            numbers = self._by_library(rows)
        return numbers.to(dtype).view(self.shape)

    def _by_library(self, rows: BlockRows) -> Tensor:
        try:
            import gguf
        except ImportError:
            raise CheckpointError(
                f"{self.file}: {self.key} is in {self.kind.name}, which the gguf package reads: "
                f"{INSTALL}"
            ) from None
        kind = gguf.GGMLQuantizationType(self.kind.number)
        try:
            found = gguf.dequantize(rows.data.numpy(), kind)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.file}: {self.key} is in {self.kind.name}, which the installed gguf "
                "package does not read; update it"
            ) from None
        return torch.from_numpy(np.ascontiguousarray(found, dtype=np.float32))


@dataclass(frozen=True)
class JoinedHeads(Source):
    """Latent attention's keys and values in one matrix, [H · (nope + value), rank], of two stacks.

    llama.cpp keeps keys [H, rank, nope], the other way round, and values [H, value, rank].
    """

    keys: Source
    values: Source

    @classmethod
    def of(cls, key: str, keys: Source, values: Source) -> JoinedHeads:
        """The matrix of these two."""
        heads, rank, width = keys.shape
        if len(values.shape) != 3 or values.shape[0] != heads or values.shape[2] != rank:
            raise CheckpointError(
                f"{keys.file}: {keys.key} {list(keys.shape)} and {values.key} "
                f"{list(values.shape)} do not fit each other"
            )
        shape = (heads * (width + values.shape[1]), rank)
        return cls(keys.file, key, None, shape, keys.bytes + values.bytes, keys, values)

    def load(self, dtype: torch.dtype) -> Tensor:
        """The numbers in `dtype`."""
        keys = self.keys.load(dtype).to(dtype).mT
        return torch.cat([keys, self.values.load(dtype).to(dtype)], dim=1).flatten(0, 1)

    def load_into(self, target: Tensor) -> None:
        """See `Source`."""
        target.copy_(self.load(target.dtype))


def sources(headers: Iterable[Header]) -> dict[str, Source]:
    """Every tensor of a model's files by key; stacked experts one by one, `NAME[E]`.

    Raises:
        CheckpointError: two tensors do not fit each other.
    """
    found: dict[str, Source] = {}
    for header in headers:
        for info in header.tensors:
            one = _source(header.file, info)
            if _STACK in info.name:
                found |= {
                    f"{info.name}[{index}]": one.entry(index) for index in range(info.shape[0])
                }
            else:
                found[info.name] = one
    for key in [key for key in found if key.endswith(".attn_k_b.weight")]:
        other, joined = (key.replace("_k_b.", by) for by in ("_v_b.", "_kv_b."))
        if other in found and joined not in found and len(found[key].shape) == 3:
            found[joined] = JoinedHeads.of(joined, found.pop(key), found.pop(other))
    return found


def _source(file: Path, info: TensorInfo) -> Source:
    shape, name = info.shape, info.name
    if name.endswith(_ONE_ROW) and len(shape) == 1:
        shape = (1, *shape)
    if info.kind.name in DTYPES:
        return Stored(file, name, DTYPES[info.kind.name], shape, info.bytes, info.offset)
    return Blocks(file, name, None, shape, info.bytes, info.kind, info.offset)


Part = tuple[Source, Layout]
Parts = dict[str, dict[int | None, list[Part]]]


class StoredModule:
    """The matrices of a module in their file; see `packing.StoredRows`.

    Args:
        parts: name of a tensor → index of its first axis, or None → what its rows consist of.
        cfg: the model's settings.
    """

    def __init__(self, parts: Parts, cfg: Any) -> None:
        self._parts, self._cfg = parts, cfg
        self.rounding = torch.zeros(2, dtype=torch.float64, device="cpu")

    def rows(self, name: str, entry: int | None = None) -> list[BlockRows | Tensor]:
        """See `packing.StoredRows`."""
        parts = self._parts[name][entry]
        whole = all(source.shape[0] % COLUMNS == 0 for source, _ in parts[:-1])
        found = [self._part(source, layout, whole) for source, layout in parts]
        if whole or name != "weight":
            return found
        return [torch.cat([each for each in found if isinstance(each, Tensor)])]

    def _part(self, source: Source, layout: Layout, whole: bool) -> BlockRows | Tensor:
        if whole and isinstance(source, Blocks) and source.kind.number in BLOCKS:
            rows = source.rows()
            return rows._replace(data=layout.load(rows.data, self._cfg).contiguous())
        numbers = source.load(torch.float32).float()
        return layout.load(numbers, self._cfg).contiguous()

    def kinds(self, names: Iterable[str] = _MATRICES) -> Counter[str]:
        """How many bytes of some tensors are in blocks of each kind, in plain numbers as ""."""
        found: Counter[str] = Counter()
        for entries in (self._parts[name] for name in names if name in self._parts):
            for source, _ in (part for parts in entries.values() for part in parts):
                found[source.kind.name if isinstance(source, Blocks) else ""] += source.bytes
        return found

    def format(self) -> Format:
        """The packed form that keeps the numbers: exactly, or as 8 bits in groups of 32.

        Down projections have one of their own: most files give them more bits in some layers.
        """
        kind, down = (self._kind(names) for names in (set(self._parts) - {"down"}, {"down"}))
        return Format(kind or "bfloat16", 32, down if down != kind else None)

    def _kind(self, names: Iterable[str]) -> str | None:
        """See `format`; None: the module has none of these tensors."""
        kinds = set(self.kinds(names))
        if kinds <= {""}:
            return "bfloat16" if kinds else None
        if kinds == {"Q4_0"}:
            return "int4"
        return "uint4" if kinds <= _NIBBLES else "int8"


def stored_module(
    found: Iterable[tuple[TensorSlice, Source]], path: str, cfg: Any
) -> tuple[StoredModule, list[str]]:
    """The matrices of a module among what fills a model's tensors, and what is not among them.

    Args:
        found: slices of the module's tensors and their sources.
        path: of the module.
        cfg: the model's settings.

    Returns:
        The matrices, and the full names of the module's vectors.
    """
    parts: dict[str, dict[int | None, list[Any]]] = {}
    others: dict[str, None] = {}
    for place, source in found:
        name = place.ours.removeprefix(f"{path}.")
        if name not in _MATRICES:
            others[place.ours] = None
            continue
        assert place.layout in OF_ROWS, place.layout
        parts.setdefault(name, {}).setdefault(place.entry, []).append(
            (place.rows or (0, 0), source, LAYOUTS[place.layout])
        )
    ordered = {
        name: {
            entry: [part[1:] for part in sorted(each, key=lambda part: part[0])]
            for entry, each in entries.items()
        }
        for name, entries in parts.items()
    }
    return StoredModule(ordered, cfg), list(others)
