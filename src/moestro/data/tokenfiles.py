"""From documents to token files: spool the text, choose and split it, write it as tokens.

Every document is read once, into one spool file; only numbers about it stay in memory. What goes
into training and what is held out is then a choice of byte ranges of that file.
"""

from __future__ import annotations

import hashlib
import mmap
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moestro.config import DataConfig
from moestro.config.number import Positive
from moestro.data.documents import character_start, choose_held_out, read_documents, stable_hash
from moestro.data.domains import check_domain, check_domains
from moestro.errors import DataError
from moestro.settings import Settings
from moestro.text import ByteTokenizer, Tokenizer, build_tokenizer, utf8

TRAIN_FILE, HELD_FILE, ENDS_FILE = "train.bin", "held_out.bin", "train_ends.bin"
_SPOOL_FILE = "spool.txt"
_PIECE_BYTES = 1 << 20


class Ranges(NamedTuple):
    """Byte ranges of the spool, by domain, in shuffled order within each.

    Attributes:
        domains_N: Number of the domain.
        starts_N: First byte.
        stops_N: One past the last byte.
        groups_N: Seeded hash of the group that is held out together.
    """

    domains_N: NDArray[np.int64]
    starts_N: NDArray[np.int64]
    stops_N: NDArray[np.int64]
    groups_N: NDArray[np.uint64]

    @property
    def sizes_N(self) -> NDArray[np.int64]:
        """Bytes of each range."""
        return self.stops_N - self.starts_N

    def where(self, kept_N: NDArray[Any]) -> Ranges:
        """The ranges that a mask or an index picks."""
        return Ranges(*(column_N[kept_N] for column_N in self))


class TokenFiles(Settings):
    """What is in the token files; goes into the folder's meta file as it is."""

    domains: tuple[str, ...]
    dtype: Literal["uint16", "uint32"]
    train_tokens: dict[str, Annotated[int, Field(ge=0)]]
    held_tokens: dict[str, Positive]
    held_bytes: dict[str, Positive]
    notes: tuple[str, ...]
    digest: str


def write_token_files(cfg: DataConfig, folder: Path) -> TokenFiles:
    """Read all sources and write their tokens, and the tokenizer, into an existing folder."""
    spool = folder / _SPOOL_FILE
    with spool.open("wb") as writing:
        domains, ranges = _spool(cfg, writing)
    if not domains:
        raise DataError(
            f"there is no text in {', '.join(cfg.sources)}: every file is empty or blank"
        )
    check_domains(domains)
    with spool.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
        if cfg.domain_bytes is not None:
            ranges = _capped(ranges, text, cfg.domain_bytes)
        train, held, notes = _split(ranges, text, cfg, domains)
        tokenizer = build_tokenizer(cfg.tokenizer, _texts(train, text))
        digest = hashlib.sha256()
        counts = [
            _write(side, text, tokenizer, folder / name, digest, len(domains))
            for side, name in ((train, TRAIN_FILE), (held, HELD_FILE))
        ]
    spool.unlink()
    (train_ends, train_tokens), (held_ends, held_tokens) = counts
    train_ends.tofile(folder / ENDS_FILE)
    digest.update(train_ends.tobytes() + held_ends.tobytes())
    tokenizer.save(folder)
    held_bytes = np.bincount(held.domains_N, held.sizes_N + 1, len(domains)).astype(np.int64)
    train_by, held_by, bytes_by = (
        dict(zip(domains, numbers, strict=True))
        for numbers in (train_tokens, held_tokens, held_bytes.tolist())
    )
    _check_length(train_by, held_by, cfg)
    return TokenFiles(
        domains=domains, dtype=token_dtype(tokenizer).name, train_tokens=train_by,
        held_tokens=held_by, held_bytes=bytes_by, notes=notes, digest=digest.hexdigest(),
    )  # fmt: skip


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """uint16 where the vocabulary fits, else uint32."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def _spool(cfg: DataConfig, stream: IO[bytes]) -> tuple[list[str], Ranges]:
    """Write all text end to end; returns the sorted domains and the documents in shuffled order."""
    numbers: dict[str, int] = {}
    domains, stops = array("q"), array("q")
    orders, groups = array("Q"), array("Q")
    place = 0
    for document in read_documents(cfg):
        place += stream.write(utf8(document.text))
        stops.append(place)
        if document.domain not in numbers:
            check_domain(document.domain, document.name)
            numbers[document.domain] = len(numbers)
        domains.append(numbers[document.domain])
        # Two hashes: with one, a capped domain would keep just the documents to hold out.
        orders.append(stable_hash("order", cfg.seed, document.name))
        groups.append(stable_hash("held out", cfg.seed, document.group or document.name))
    names = sorted(numbers)
    rank_of = np.empty(len(names), dtype=np.int64)
    rank_of[[numbers[name] for name in names]] = np.arange(len(names))
    stops_N = np.array(stops, dtype=np.int64)
    starts_N = np.concatenate((np.zeros(min(1, len(stops)), np.int64), stops_N[:-1]))
    domains_N = rank_of[np.array(domains, dtype=np.int64)]
    ranges = Ranges(domains_N, starts_N, stops_N, np.array(groups, dtype=np.uint64))
    return names, ranges.where(np.lexsort((np.array(orders, dtype=np.uint64), domains_N)))


def _capped(ranges: Ranges, text: mmap.mmap, most: int) -> Ranges:
    """At most `most` bytes of each domain: its first documents, the last of them cut."""
    ends_N = np.cumsum(ranges.sizes_N)
    begins_N = ends_N - ranges.sizes_N
    first_N = np.searchsorted(ranges.domains_N, ranges.domains_N)
    room_N = most - (begins_N - begins_N[first_N])
    stops_N = np.minimum(ranges.stops_N, ranges.starts_N + np.maximum(room_N, 0))
    for number in np.flatnonzero((stops_N < ranges.stops_N) & (room_N > 0)):
        stops_N[number] = character_start(text, int(stops_N[number]))
    capped = ranges._replace(stops_N=stops_N)
    return capped.where(capped.sizes_N > 0)


def _split(
    ranges: Ranges, text: mmap.mmap, cfg: DataConfig, domains: list[str]
) -> tuple[Ranges, Ranges, list[str]]:
    """Training and held-out ranges, and a note on every domain that had to be cut in two."""
    context = cfg.seq_len + 1
    # A few windows' worth, so that a small domain's number is not one window's luck.
    least = 8 * context
    held_N = choose_held_out(ranges.domains_N, ranges.groups_N, ranges.sizes_N, cfg.held_out, least)
    sides, notes = [], []
    for number, domain in enumerate(domains):
        inside_N = ranges.domains_N == number
        train, held = ranges.where(inside_N & ~held_N), ranges.where(inside_N & held_N)
        whole = ranges.where(inside_N)
        total = int(whole.sizes_N.sum())
        # What cannot be cut at all is refused with what is too short: see `_check_length`.
        if total > 1 and min(train.sizes_N.sum(), held.sizes_N.sum()) < context:
            train, held = _cut(whole, text, max(int(total * cfg.held_out), min(total // 2, least)))
            notes.append(
                f"domain {domain!r} has too few documents to hold some out whole, so it is cut in "
                f"two by position: the last {held.sizes_N.sum() / total:.0%} of it is held out"
            )
        sides.append((train, held))
    train, held = map(_joined, zip(*sides, strict=True))
    return train, held, notes


def _cut(ranges: Ranges, text: mmap.mmap, wanted: int) -> tuple[Ranges, Ranges]:
    """Part one domain by position: about the last `wanted` bytes, whole lines if possible."""
    ends_N = np.cumsum(ranges.sizes_N)
    place = int(ends_N[-1]) - wanted
    cut = int(np.searchsorted(ends_N, place, side="right"))
    target = int(ranges.stops_N[cut] - (ends_N[cut] - place))
    where = _line_start(text, max(int(ranges.starts_N[cut]), target - wanted), target)
    numbers_N = np.arange(len(ends_N))
    first, last = ranges.where(numbers_N <= cut), ranges.where(numbers_N >= cut)
    first.stops_N[-1] = last.starts_N[0] = where
    return first.where(first.sizes_N > 0), last.where(last.sizes_N > 0)


def _joined(parts: Iterable[Ranges]) -> Ranges:
    return Ranges(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _write(
    ranges: Ranges,
    text: mmap.mmap,
    tokenizer: Tokenizer,
    path: Path,
    digest: hashlib._Hash,
    num_domains: int,
) -> tuple[NDArray[np.int64], list[int]]:
    """Write one side's tokens; returns each document's end in the file and tokens by domain."""
    dtype = token_dtype(tokenizer)
    ends, place = array("q"), 0
    totals = [0] * num_domains
    with path.open("wb") as stream:
        for domain, start, stop in zip(*(a.tolist() for a in ranges[:3]), strict=True):
            begin = place
            tokens = (_encode(tokenizer, part, dtype) for part in _parts(text, start, stop))
            for some in chain(tokens, [np.array([tokenizer.end_of_text], dtype)]):
                stream.write(some.data)
                digest.update(some.data)
                place += len(some)
            ends.append(place)
            totals[domain] += place - begin
    return np.array(ends, dtype=np.int64), totals


def _encode(tokenizer: Tokenizer, raw: bytes, dtype: np.dtype[Any]) -> NDArray[Any]:
    if isinstance(tokenizer, ByteTokenizer):  # without the detour over a list
        return np.frombuffer(raw, dtype=np.uint8).astype(dtype)
    return np.array(tokenizer.encode(raw.decode("utf-8")), dtype=dtype)


def _texts(ranges: Ranges, text: mmap.mmap) -> Iterator[str]:
    for start, stop in zip(ranges.starts_N.tolist(), ranges.stops_N.tolist(), strict=True):
        for part in _parts(text, start, stop):
            yield part.decode("utf-8")


def _parts(text: mmap.mmap, start: int, stop: int) -> Iterator[bytes]:
    """A document in parts of bounded size, cut at lines if possible, never inside a character."""
    while start < stop:
        cut = stop
        if stop - start > _PIECE_BYTES:
            cut = _line_start(text, start + 1, start + _PIECE_BYTES)
        yield text[start:cut]
        start = cut


def _line_start(text: mmap.mmap, lowest: int, target: int) -> int:
    """The last line's start in (lowest, target]; else the start of the character at `target`."""
    newline = text.rfind(b"\n", lowest, target)
    return newline + 1 if newline >= 0 else character_start(text, target)


def _check_length(by_train: dict[str, int], by_held: dict[str, int], cfg: DataConfig) -> None:
    context = cfg.seq_len + 1
    advice = (
        f"one context needs {context} (data.seq_len + 1): add text, lower data.seq_len, "
        "{} data.held_out, or merge domains with data.domains = 'none'"
    )
    train = sum(by_train.values())
    if train < context:
        raise DataError(f"only {train} tokens are left for training, but " + advice.format("lower"))
    for domain, held in by_held.items():
        if held < context:
            raise DataError(
                f"domain {domain!r} has {held} held-out tokens (and "
                f"{by_train[domain]} for training), but " + advice.format("raise")
            )
