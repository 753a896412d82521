"""The tensors of a GGUF file as sources for a model: plain ones as they are, blocks dequantised."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moestro.checkpoints.gguf.header import Header, Kind, TensorInfo
from moestro.checkpoints.tensor_files import BUFFER_BYTES, DTYPES, Source, Stored
from moestro.errors import CheckpointError
from moestro.kernels import native_cpu
from moestro.kernels.packing import BLOCKS, BlockRows

INSTALL = "pip install 'moestro[gguf]'"
# What stands in a file as one tensor for all experts of a layer.
_STACK = "_exps."
# Vectors that are matrices of one row to us.
_ONE_ROW = ".ffn_gate_inp_shexp.weight"


@dataclass(frozen=True)
class Blocks(Source):
    """A tensor in blocks of integers with scales, whose bytes begin at `offset`."""

    kind: Kind
    offset: int

    @property
    def blocks(self) -> int | None:
        """See `Source`: those of the file, where native code reads them."""
        return self.kind.number if self.kind.number in BLOCKS else None

    @property
    def is_of_blocks(self) -> bool:
        """See `Source`."""
        return True

    @property
    def stored_in(self) -> str:
        """The kind's name."""
        return self.kind.name

    def entry(self, index: int) -> Blocks:
        """Entry `index` of the first axis, as a tensor of its own."""
        size = self.bytes // self.shape[0]
        at = self.offset + index * size
        return replace(self, shape=self.shape[1:], bytes=size, offset=at)

    def part(self, start: int, stop: int) -> Blocks:
        """Rows [start, stop) of the first axis, as a tensor of its own."""
        size = self.bytes // self.shape[0]
        shape, at = (stop - start, *self.shape[1:]), self.offset + start * size
        return replace(self, shape=shape, bytes=(stop - start) * size, offset=at)

    def load_into(self, target: Tensor) -> None:
        """See `Source`; of a matrix, at most `BUFFER_BYTES` of numbers are in memory at a time."""
        if len(self.shape) != 2:
            super().load_into(target)
            return
        step = max(1, BUFFER_BYTES // (4 * self.shape[1]))
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            target[start:stop].copy_(self.part(start, stop).load(target.dtype))

    def rows(self) -> tuple[BlockRows, tuple[float, float]]:
        """A matrix as it is in the file, which adds no error.

        Raises:
            CheckpointError: the file cannot be read, or ends before its tensor does.
        """
        count, columns = math.prod(self.shape[:-1]), self.shape[-1]
        raw = Stored(self.file, self.key, torch.uint8, (self.bytes,), self.bytes, self.offset)
        return BlockRows(raw.load().view(count, -1), self.kind.number, columns), (0.0, 0.0)

    def load(self, dtype: torch.dtype) -> Tensor:
        """The numbers in `dtype`.

        Raises:
            CheckpointError: see `rows`; or there is nothing here that reads such blocks.
        """
        rows, _ = self.rows()
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
        except NotImplementedError:  # so gguf says that it does not know a kind
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
