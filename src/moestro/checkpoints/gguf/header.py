"""The header of a GGUF file: its fields, and where its tensors lie.

Format (ggml, docs/gguf.md): magic, version, counts, fields, tensors, padding, data; little-endian.
A file is not trusted. Sizes, counts and offsets are checked before anything as large as they say is
made, so a damaged or hostile file costs no more memory than it has bytes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import numpy as np

from moestro.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

_MOST_FIELDS, _MOST_TENSORS, _MOST_NAME = 1 << 14, 1 << 16, 1 << 10
_MOST_STRINGS = 1 << 20  # in all arrays of a file
_NUMBERS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8",
    11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_SIZES = {"I": 4, "Q": 8}  # of whole numbers
_LENGTH = Struct("<Q")
_PIECE_BYTES = 1 << 20


class Kind(NamedTuple):
    """A kind of numbers: blocks of `length` in `bytes`."""

    name: str
    number: int
    length: int
    bytes: int


# ggml's numbers of kinds (ggml.h); blocks as in ggml-common.h.
KINDS = {
    number: Kind(name, number, length, size)
    for number, name, length, size in (
        (0, "F32", 1, 4), (1, "F16", 1, 2), (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22), (7, "Q5_1", 32, 24), (8, "Q8_0", 32, 34), (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110), (12, "Q4_K", 256, 144), (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210), (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98), (19, "IQ1_S", 256, 50), (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110), (22, "IQ2_S", 256, 82), (23, "IQ4_XS", 256, 136),
        (28, "F64", 1, 8), (29, "IQ1_M", 256, 56), (30, "BF16", 1, 2), (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66), (39, "MXFP4", 32, 17),
    )
}  # fmt: skip


class TensorInfo(NamedTuple):
    """One tensor of a file.

    Attributes:
        name: as llama.cpp calls it.
        shape: the last axis is contiguous, and made of whole blocks.
        kind: of its numbers.
        offset: of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    offset: int

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) // self.kind.length * self.kind.bytes


@dataclass(frozen=True)
class Header:
    """What a file says of itself: fields by name, and tensors in the order of their bytes."""

    file: Path
    fields: dict[str, Any]
    tensors: tuple[TensorInfo, ...]

    def get(self, key: str, default: Any = None) -> Any:
        """A field, of whatever type the file gives it; `fields.py` reads those of one type."""
        return self.fields.get(self.name(key), default)

    def name(self, key: str) -> str:
        """A field's name: where it begins with a dot, that of the file's architecture."""
        return f"{self.architecture}{key}" if key.startswith(".") else key

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the network; "None" where the file has no such text."""
        name = self.fields.get("general.architecture")
        return name if isinstance(name, str) else "None"


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF does, or is called so."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(4) == MAGIC


def read(path: Path, texts: bool = True) -> Header:
    """The header of a file.

    Args:
        path: of the file.
        texts: whether arrays of texts are wanted, which are nearly all of a header: tokens and
            merges. They are empty lists otherwise.

    Raises:
        CheckpointError: it cannot be read, is truncated, big-endian, of another version, or says
            what cannot be; names the field or tensor.
    """
    try:
        with path.open("rb") as file:
            return _Reader(path, file, texts).header()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None


class _Reader:
    def __init__(self, path: Path, file: BufferedReader, texts: bool) -> None:
        self.path, self.file, self.texts = path, file, texts
        self.size = path.stat().st_size
        self.strings = 0
        # What is read of the file: where it begins there, and how much of it is taken.
        self.piece, self.start, self.at = b"", 0, 0

    @property
    def left(self) -> int:
        """Bytes of the file that are not taken."""
        return self.size - self.start - self.at

    def header(self) -> Header:
        self._check_start()
        num_tensors, num_fields = self.number("Q"), self.number("Q")
        if num_tensors > _MOST_TENSORS or num_fields > _MOST_FIELDS:
            raise self.broken(f"it says that it has {num_tensors} tensors and {num_fields} fields")
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self.string(_MOST_NAME)
            if key in fields:
                raise self.broken(f"the field {key!r} is there twice")
            fields[key] = self.value(key, self.number("I"))
        infos = [self.tensor() for _ in range(num_tensors)]
        alignment = fields.get("general.alignment", ALIGNMENT)
        if (
            type(alignment) is not int
            or not 8 <= alignment <= 1 << 20
            or alignment & (alignment - 1)
        ):
            raise self.broken(f"general.alignment is {alignment!r}")
        start = -(-(self.size - self.left) // alignment) * alignment
        return Header(self.path, fields, self._placed(infos, start, alignment))

    def _check_start(self) -> None:
        if self.size < 4 or self.take(4) != MAGIC:
            raise CheckpointError(f"{self.path} is not GGUF: it does not begin with the letters")
        version = self.number("I")
        if version & 0xFFFF == 0 and version:
            raise CheckpointError(
                f"{self.path} is big-endian GGUF; only little-endian files are read. Convert the "
                "model again on this machine"
            )
        if version not in VERSIONS:
            raise CheckpointError(
                f"{self.path} is GGUF version {version}; read are 2 and 3. Convert the model again "
                "with a current llama.cpp"
            )

    def _placed(
        self, infos: list[TensorInfo], start: int, alignment: int
    ) -> tuple[TensorInfo, ...]:
        """The tensors by their place in the file, none outside it or over another."""
        found = sorted(
            (each._replace(offset=start + each.offset) for each in infos),
            key=lambda each: each.offset,
        )
        names = {each.name for each in found}
        if len(names) < len(found):
            raise self.broken("two of its tensors have one name")
        for each in found:
            if (each.offset - start) % alignment or each.offset + each.bytes > self.size:
                raise self.broken(
                    f"{each.name} is said to be at {each.offset} to {each.offset + each.bytes} of "
                    f"its {self.size} bytes"
                )
        for one, two in pairwise(found):
            if one.offset + one.bytes > two.offset:
                raise self.broken(f"{one.name} and {two.name} overlap")
        return tuple(found)

    def tensor(self) -> TensorInfo:
        name = self.string(_MOST_NAME)
        axes = self.number("I")
        if not 1 <= axes <= 4:
            raise self.broken(f"{name} has {axes} axes")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        number, offset = self.number("I"), self.number("Q")
        if number not in KINDS:
            raise CheckpointError(
                f"{self.path}: {name} is of kind {number}, which llama.cpp does not have, or has "
                "since this was written; known are "
                f"{', '.join(kind.name for kind in KINDS.values())}"
            )
        kind = KINDS[number]
        numbers = math.prod(shape)
        if min(shape) < 1 or shape[-1] % kind.length or numbers > self.size * kind.length:
            raise self.broken(f"{name} is {list(shape)} in {kind.name}")
        return TensorInfo(name, shape, kind, offset)

    def value(self, key: str, type_number: int) -> Any:
        if type_number == _STRING:
            return self.string()
        if type_number in _NUMBERS:
            dtype = np.dtype(_NUMBERS[type_number])
            return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()
        if type_number != _ARRAY:
            raise self.broken(f"the field {key!r} is of type {type_number}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _NUMBERS:
            dtype = np.dtype(_NUMBERS[inner])
            return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        self.strings += count
        if inner != _STRING or self.strings > _MOST_STRINGS or count * 8 > self.left:
            raise self.broken(f"the field {key!r} is an array of {count} values of type {inner}")
        return self.array_of_strings(count)

    def array_of_strings(self, count: int) -> list[str]:
        """See `string`, whose checks these go through unless they are all in the piece."""
        found, piece, at = [], self.piece, self.at
        for _ in range(count):
            start = at + _LENGTH.size
            end = start + (_LENGTH.unpack_from(piece, at)[0] if start <= len(piece) else 0)
            if start <= len(piece) >= end:
                at = end
                if self.texts:
                    found.append(self.decoded(piece[start:end]))
                continue
            self.at = at
            text = self.take(self.number("Q"))
            piece, at = self.piece, self.at
            if self.texts:
                found.append(self.decoded(text))
        self.at = at
        return found

    def string(self, most: int | None = None) -> str:
        length = self.number("Q")
        if most is not None and length > most:
            raise self.broken(f"it has a name of {length} bytes")
        return self.decoded(self.take(length))

    def decoded(self, text: bytes | bytearray) -> str:
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            raise self.broken("it has a text that is not UTF-8") from None

    def number(self, code: str) -> int:
        return int.from_bytes(self.take(_SIZES[code]), "little")

    def take(self, count: int) -> bytes | bytearray:
        """The next bytes, of which there have to be so many."""
        if count > self.left:
            raise self.broken("it ends within its header")
        if self.at + count > len(self.piece):
            rest = self.piece[self.at :]
            self.start, self.at = self.start + self.at, 0
            if count > _PIECE_BYTES:  # memory for it once
                self.piece, self.start = b"", self.start + count
                return self._large(rest, count)
            self.piece = rest + self.file.read(_PIECE_BYTES)
        found = self.piece[self.at : self.at + count]
        self.at += count
        if len(found) < count:
            raise self.broken("it ends within its header")
        return found

    def _large(self, rest: bytes, count: int) -> bytearray:
        """The next bytes, which begin with `rest`, read into their own memory."""
        found = bytearray(count)
        found[: len(rest)] = rest
        with memoryview(found) as memory:
            got = self.file.readinto(memory[len(rest) :])
        if len(rest) + got < count:
            raise self.broken("it ends within its header")
        return found

    def broken(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is truncated or altered: {why}; download or convert it again"
        )


def kinds_of(path: Path) -> str:
    """How the numbers of a model are stored, as in "in Q4_K, Q6_K and F32", the most bytes first.

    Raises:
        CheckpointError: see `read_parts`.
    """
    sizes: Counter[str] = Counter()
    for info in (info for header in read_parts(path, texts=False) for info in header.tensors):
        sizes[info.kind.name] += info.bytes
    *names, last = [name for name, _ in sizes.most_common()] or ["nothing"]
    return f"in {', '.join(names)} and {last}" if names else f"in {last}"


def parts_of(path: Path) -> list[Path]:
    """The file, or all the files that it was split into, given any of them; none is read.

    Raises:
        CheckpointError: one of the files is missing.
    """
    name = SPLIT.fullmatch(path.name)
    if name is None:
        return [path]
    stem, count = name[1], int(name[3])
    if not 1 <= count <= 1000:
        raise CheckpointError(f"{path} is one of {count} files by its name; give another name")
    paths = [path.with_name(f"{stem}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    missing = [each for each in paths if not each.is_file()]
    if missing:
        raise CheckpointError(
            f"{missing[0]} is missing: {path.name} is one of {count} files; download all of them"
        )
    return paths


def read_parts(path: Path, texts: bool = True) -> list[Header]:
    """The headers of a file, or of all the files that it was split into, given any of them.

    `texts`: see `read`.

    Raises:
        CheckpointError: see `read`; or one of the files is missing.
    """
    paths = parts_of(path)
    headers = [read(each, texts) for each in paths]
    count = headers[0].get("split.count", 0)
    if SPLIT.fullmatch(path.name) is None and isinstance(count, int) and count > 1:
        raise CheckpointError(
            f"{path} is one of {count} files of a model; keep the names that they had, "
            "NAME-00001-of-0000N.gguf"
        )
    names = Counter(info.name for header in headers for info in header.tensors)
    twice = sorted(name for name, count in names.items() if count > 1)
    if twice:
        raise CheckpointError(f"{path} and its other files hold {twice[0]} twice")
    said = headers[0].get("split.tensors.count", names.total())
    if type(said) is not int or said != names.total():
        raise CheckpointError(
            f"{path} and its other files hold {names.total()} of {said!r:.80} tensors"
        )
    return headers
