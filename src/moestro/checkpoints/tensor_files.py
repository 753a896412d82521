"""Safetensors files, one or many: read straight into place, written one tensor at a time.

The safetensors library checks every header. The bytes are then read by position into the memory
they are for, so that nothing of a file stays mapped and no second copy of a model ever exists.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moestro.errors import CheckpointError
from moestro.kernels.packing import BlockRows
from moestro.strictjson import parse, read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BUFFER_BYTES = 1 << 24
_ALIGNMENT = 8

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class LeftOut(UserWarning):
    """A part of a checkpoint is not read."""


@dataclass(frozen=True)
class Source:
    """Where a tensor comes from; each kind says how it is loaded.

    Attributes:
        file: that it is in.
        key: its name there.
        dtype: as it is stored; None: quantised, and made in the dtype that is asked for.
        shape: of the tensor, however it is stored.
        bytes: on disk.
    """

    file: Path
    key: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    bytes: int

    @property
    def blocks(self) -> int | None:
        """The number of ggml's blocks that `rows` gives; None: it has none."""
        return None

    @property
    def is_of_blocks(self) -> bool:
        """Whether the file has those blocks, so that all forms are best made from them."""
        return False

    @property
    def stored_in(self) -> str:
        """What it is quantised in, for people; empty: it has plain numbers."""
        return ""

    def rows(self) -> tuple[BlockRows, tuple[float, float]]:
        """A matrix as rows of blocks, and the squared error that making them adds, with squares."""
        raise NotImplementedError  # each kind of source has its own

    def entry(self, index: int) -> Source:
        """Entry `index` of the first axis, as a tensor of its own."""
        raise NotImplementedError  # each kind of source has its own

    def part(self, start: int, stop: int) -> Source:
        """Rows [start, stop) of the first axis, as a tensor of its own."""
        raise NotImplementedError  # each kind of source has its own

    def load(self, dtype: torch.dtype) -> Tensor:
        """The tensor on the CPU: a quantised one in `dtype`, another as it is stored."""
        raise NotImplementedError  # each kind of source has its own

    def load_into(self, target: Tensor) -> None:
        """Fill a tensor of this shape, converted to its dtype; a stack entry by entry."""
        if len(self.shape) < 3:
            target.copy_(self.load(target.dtype))
            return
        for index, entry in enumerate(target):
            self.entry(index).load_into(entry)


@dataclass(frozen=True)
class Stored(Source):
    """One tensor of a safetensors file, whose bytes begin at `offset`."""

    dtype: torch.dtype
    offset: int

    def entry(self, index: int) -> Stored:
        """Entry `index` of the first axis, as a tensor of its own."""
        size = self.bytes // self.shape[0]
        at = self.offset + index * size
        return replace(self, shape=self.shape[1:], bytes=size, offset=at)

    def part(self, start: int, stop: int) -> Stored:
        """Rows [start, stop) of the first axis, as a tensor of its own."""
        size = self.bytes // self.shape[0]
        shape = (stop - start, *self.shape[1:])
        return replace(
            self, shape=shape, bytes=(stop - start) * size, offset=self.offset + start * size
        )

    def load(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on the CPU as it is stored, whatever `dtype`.

        Raises:
            CheckpointError: the file cannot be read, or ends before its tensor does.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        self._fill(tensor.view(-1), 0)
        return tensor

    def load_into(self, target: Tensor) -> None:
        """Fill a tensor of this shape, converted to its dtype.

        Bytes go straight to the target's memory if it is contiguous, on the CPU and of the stored
        dtype; else they pass through a buffer of at most `BUFFER_BYTES`, or of the tensor if the
        target is not contiguous.

        Raises:
            CheckpointError: see `load`.
        """
        if not target.is_contiguous():
            target.copy_(self.load())
            return
        flat = target.detach().view(-1)
        if target.device.type == "cpu" and target.dtype == self.dtype:
            self._fill(flat, 0)
            return
        step = BUFFER_BYTES // self.dtype.itemsize
        buffer = torch.empty(min(step, flat.numel()), dtype=self.dtype, device="cpu")
        for start in range(0, flat.numel(), step):
            part = buffer[: flat.numel() - start]
            self._fill(part, start * self.dtype.itemsize)
            flat[start : start + step].copy_(part)

    def _fill(self, flat: Tensor, skip: int) -> None:
        """Read bytes from `skip` of the tensor on into a contiguous vector on the CPU."""
        if not flat.numel():
            return
        memory = flat.view(torch.uint8).numpy().data
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.offset + skip)
                while memory:
                    count = file.readinto(memory[:BUFFER_BYTES])
                    if not count:
                        raise CheckpointError(
                            f"{self.file} ends inside {self.key}: it is truncated; copy it again"
                        )
                    memory = memory[count:]
        except OSError as error:
            raise CheckpointError(f"cannot read {self.key} of {self.file}: {error}") from None


def open_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by key, in the order of files and bytes.

    Only headers are read. A folder holds `model.safetensors`, or `model.safetensors.index.json`
    and the files it names.

    Raises:
        CheckpointError: a file is missing, truncated, no safetensors or outside the folder; a key
            is not where the index says, or in two files; or there is only pickle. Names file and
            key.
    """
    if (folder / SINGLE).is_file():
        return open_file(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise CheckpointError(_nothing_to_read(folder))
    index = _read_index(folder / INDEX)
    stored: dict[str, Stored] = {}
    for name in sorted(set(index.values())):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name} is missing, and {INDEX} says that it holds "
                f"{some(key for key, file in index.items() if file == name)}; download it again"
            )
        found = open_file(folder / name)
        strange = [key for key in found if index.get(key) != name]
        if strange:
            raise CheckpointError(f"{folder / name} holds {some(strange)}, unlike {INDEX} says")
        stored |= found
    lacking = [key for key in index if key not in stored]
    if lacking:
        raise CheckpointError(f"{folder / index[lacking[0]]} lacks {some(lacking)}")
    return stored


def open_file(path: Path) -> dict[str, Stored]:
    """Every tensor of one safetensors file by key, in the order of its bytes.

    Raises:
        CheckpointError: it is missing, truncated, of an unknown dtype, or no safetensors.
    """
    try:
        with safe_open(path, "pt") as checked:
            keys = checked.keys()
            shapes = {key: tuple(checked.get_slice(key).get_shape()) for key in keys}
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = parse(file.read(size))
    except (OSError, SafetensorError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"cannot read {path} as safetensors: {error}. It is truncated or altered, or not "
            "safetensors; only safetensors is read, never pickle"
        ) from None
    stored = []
    for key, shape in shapes.items():
        kind, (start, end) = header[key]["dtype"], header[key]["data_offsets"]
        if kind not in DTYPES:
            raise CheckpointError(f"{path}: {key} is {kind}; read are {', '.join(DTYPES)}")
        stored.append(Stored(path, key, DTYPES[kind], shape, end - start, 8 + size + start))
    return {one.key: one for one in sorted(stored, key=lambda one: one.offset)}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file, in memory of its own.

    Raises:
        CheckpointError: see `open_file`.
    """
    return {key: stored.load() for key, stored in open_file(path).items()}


class Written(NamedTuple):
    """One tensor to write: its key, what it will be, and a function that makes it."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, key: str, tensor: Tensor) -> Written:
        """A tensor as it will be when it is written."""
        return cls(key, tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def bytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize

    def copied(self) -> Written:
        """The same with its numbers of now, in memory of its own on the CPU."""
        layout = torch.contiguous_format
        now = self.make().detach().to("cpu", self.dtype, copy=True, memory_format=layout)
        return Written.of(self.key, now)


class TensorFile(NamedTuple):
    """One safetensors file to write: its name in a folder, its tensors, and its own metadata."""

    name: str
    tensors: Sequence[Written]
    metadata: Mapping[str, str] = MappingProxyType({})

    def copied(self) -> TensorFile:
        """The same with the numbers of now; see `Written.copied`."""
        return self._replace(tensors=[tensor.copied() for tensor in self.tensors])

    def write(self, folder: Path) -> Path:
        """Write it by `write_file`; its path."""
        write_file(folder / self.name, self.tensors, self.metadata)
        return folder / self.name


def write_folder(folder: Path, tensors: Iterable[Written], shard_bytes: int) -> None:
    """Write tensors into an existing folder: one file, or shards and an index.

    Each tensor is made, written and let go before the next.

    Args:
        folder: where to.
        tensors: in the order to write.
        shard_bytes: most bytes of tensors in one file; a tensor larger than that has its own.

    Raises:
        OSError: the disk is full or the place cannot be written.
    """
    shards: list[list[Written]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.bytes
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0])
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard)
        places |= {tensor.key: name for tensor in shard}
    total = sum(tensor.bytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(
    path: Path, tensors: Iterable[Written], metadata: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write one safetensors file, holding one tensor in memory at a time.

    Wide dtypes come first, so that every tensor is aligned. The library reads the header back.

    Raises:
        OSError: the disk is full or the place cannot be written.
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    start = 0
    for tensor in ordered:
        header[tensor.key] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.bytes],
        }
        start += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in ordered:
            made = tensor.make().detach().to("cpu", tensor.dtype).contiguous()
            assert tuple(made.shape) == tensor.shape, tensor.key
            file.write(made.view(-1).view(torch.uint8).numpy().data)
            del made  # before the next is made
    open_file(path)


def _read_index(path: Path) -> dict[str, str]:
    """Key → file name, every name a plain one inside the folder."""
    places = read_object(path, CheckpointError, "fetch it again").get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path} has no weight_map of keys and files; download it again")
    for key, name in places.items():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or len(name) > 255:
            raise CheckpointError(f"{path} puts {key} into {name!r}, which is not in the folder")
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{path} puts {key} into {name!r}; only safetensors is read")
    return places


def _nothing_to_read(folder: Path) -> str:
    kinds = (".bin", ".pt", ".pth", ".ckpt")
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in kinds)
    if pickles:
        return (
            f"{folder} has its weights in {some(pickles)}: pickle, which can run code when it is "
            "read. Only safetensors is read; convert it where you trust it: AutoModelForCausalLM"
            ".from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) in transformers"
        )
    return f"{folder} holds neither {SINGLE} nor {INDEX}"


def some(names: Iterable[str], most: int = 8) -> str:
    """The first names, and how many there are beside them."""
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more
