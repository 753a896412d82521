"""The matrices of modules as files have them, read when they are packed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from moestro.checkpoints.families.slices import TensorSlice
from moestro.checkpoints.families.table import LAYOUTS, ROWS
from moestro.checkpoints.tensor_files import Source
from moestro.kernels.packing import COLUMNS, EXACT, Q4_K, TABLES, BlockRows, Format

# The matrices of modules that can be packed.
_MATRICES = ("weight", "gate_up", "down")
_PIECE = 1 << 20  # numbers of a matrix that are read at once

Part = tuple[Source, str]
Parts = dict[str, dict[int | None, list[Part]]]


class StoredModule:
    """The matrices of a module in their files; see `packing.StoredRows`.

    Args:
        parts: name of a tensor → index of its first axis, or None for all of it → the sources that
            its rows consist of, and their layouts.
        cfg: the model's settings.
        format: of the packed module; None: what keeps the numbers, exactly, as in `format`, or as 8
            bits in groups of 32.
        dtype: that plain numbers are rounded to first; None: they are taken as they are.

    Attributes:
        format: of the packed module. Down projections have one of their own where it is chosen
            here: most files give them more bits in some layers.
        rounding: see `packing.StoredRows`.
    """

    def __init__(
        self,
        parts: Parts,
        cfg: Any,
        format: Format | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._parts, self._cfg, self._dtype, self._adding = parts, cfg, dtype, Lock()
        self.rounding = torch.zeros(2, dtype=torch.float64, device="cpu")
        if format is None:
            kind, down = (self._kind(names) for names in ({*parts} - {"down"}, {"down"}))
            format = Format(kind or "bfloat16", 32, down if down != kind else None)
        self.format = format

    def rows(self, name: str, entry: int | None = None) -> Iterable[BlockRows | Tensor]:
        """See `packing.StoredRows`."""
        entries = self._parts[name]
        if entry in entries:
            parts = entries[entry]
        else:  # of a stack in one tensor
            assert entry is not None
            parts = [(source.entry(entry), layout) for source, layout in entries[None]]
        whole = _whole(name, parts)
        format = self.format.of_down if name == "down" else self.format
        if whole and name == "weight":
            parts = [piece for part in parts for piece in _pieces(*part)]
        found = (self._part(source, layout, format if whole else None) for source, layout in parts)
        if whole:
            return found
        return [torch.cat([each for each in found if isinstance(each, Tensor)])]

    def _part(self, source: Source, layout: str, format: Format | None) -> BlockRows | Tensor:
        """One part, as blocks where a format is given that takes them."""
        if format is not None and source.blocks is not None and layout in ROWS:
            kept = format.group == 32 and source.blocks in EXACT.get(format.kind, ())
            if kept or source.is_of_blocks:
                rows, added = source.rows()
                with self._adding:
                    self.rounding += torch.tensor(added, dtype=torch.float64, device="cpu")
                return rows._replace(data=ROWS[layout](rows.data, self._cfg).contiguous())
        numbers = source.load(torch.float32)
        if self._dtype is not None and source.dtype is not None:
            numbers = numbers.to(self._dtype)
        if numbers.dtype != torch.bfloat16:  # what the kernels pack, beside fp32
            numbers = numbers.float()
        return LAYOUTS[layout].load(numbers, self._cfg).contiguous()

    def kinds(self) -> Counter[str]:
        """How many bytes are stored in each quantised form."""
        found: Counter[str] = Counter()
        for source, _ in self._sources(self._parts):
            if source.stored_in:
                found[source.stored_in] += source.bytes
        return found

    def _sources(self, names: Iterable[str]) -> Iterator[Part]:
        for name in names:
            for parts in self._parts.get(name, {}).values():
                yield from parts

    def _kind(self, names: set[str]) -> str | None:
        """The kind that keeps the numbers of some tensors; None: the module has none of these."""
        found = list(self._sources(names))
        if not any(source.stored_in for source, _ in found):
            return "bfloat16" if found else None
        numbers = {source.blocks if layout in ROWS else None for source, layout in found}
        kinds = {**EXACT, "uint4": (*EXACT["uint4"], Q4_K)}
        if not all(
            _whole(name, parts) for name in names for parts in self._parts.get(name, {}).values()
        ):
            # Packed as numbers, which these kinds do not take.
            kinds = {kind: blocks for kind, blocks in kinds.items() if kind not in TABLES}
        return next((kind for kind in kinds if numbers <= {*kinds[kind]}), "int8")


def _pieces(source: Source, layout: str) -> list[Part]:
    """Blocks of a plain matrix's rows, of `_PIECE` numbers at most, if these keep their order."""
    rows = max(1, _PIECE // COLUMNS // max(1, source.shape[-1])) * COLUMNS
    if (
        layout != "same"
        or source.dtype is None
        or len(source.shape) != 2
        or source.shape[0] <= rows
    ):
        return [(source, layout)]
    starts = range(0, source.shape[0], rows)
    return [(source.part(at, min(at + rows, source.shape[0])), layout) for at in starts]


def _whole(name: str, parts: Sequence[Part]) -> bool:
    """Whether a matrix can be packed part by part, since each ends where a block of rows does."""
    return name != "weight" or all(source.shape[0] % COLUMNS == 0 for source, _ in parts[:-1])


def stored_module(
    found: Iterable[tuple[TensorSlice, Source]],
    path: str,
    cfg: Any,
    format: Format | None,
    dtype: torch.dtype | None = None,
) -> tuple[StoredModule, list[str]]:
    """The matrices of a module among what fills a model's tensors, and what is not among them.

    Args:
        found: slices of the module's tensors and their sources.
        path: of the module.
        cfg: the model's settings.
        format: see `StoredModule`.
        dtype: see there too.

    Returns:
        The matrices, and the full names of the module's vectors.
    """
    parts: dict[str, dict[int | None, list[tuple[int, Part]]]] = {}
    others: dict[str, None] = {}
    for place, source in found:
        name = place.ours.removeprefix(f"{path}.")
        if name not in _MATRICES:
            others[place.ours] = None
            continue
        start = place.rows[0] if place.rows else 0
        entries = parts.setdefault(name, {})
        entries.setdefault(place.entry, []).append((start, (source, place.layout)))
    ordered = {
        name: {
            entry: [part for _, part in sorted(each, key=lambda part: part[0])]
            for entry, each in entries.items()
        }
        for name, entries in parts.items()
    }
    return StoredModule(ordered, cfg, format, dtype), list(others)
