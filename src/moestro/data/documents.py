"""Documents: finding text files, reading them, labelling their domain, choosing the held-out.

What is read does not depend on the order in which the file system lists files, and a NUL byte
inside a text file ends a document.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import mmap
import os
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from moestro.config import DataConfig
from moestro.data import builtin
from moestro.data.domains import ALL
from moestro.errors import DataError
from moestro.text import utf8

BUILTIN = "builtin"
TEXT_EXTENSIONS = {
    ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".html", ".css", ".xml",
    ".sql", ".sh", ".ps1", ".bat", ".py", ".pyi", ".pyx", ".c", ".h", ".cc", ".cpp", ".cxx",
    ".hpp", ".hh", ".cu", ".cuh", ".m", ".mm", ".rs", ".go", ".java", ".kt", ".scala", ".swift",
    ".js", ".mjs", ".ts", ".jsx", ".tsx", ".vue", ".cs", ".fs", ".rb", ".php", ".pl", ".pm",
    ".lua", ".r", ".jl", ".hs", ".ml", ".mli", ".ex", ".exs", ".erl", ".clj", ".el", ".lisp",
    ".f90", ".f", ".asm", ".s", ".zig", ".nim", ".dart", ".v", ".vhd", ".cmake", ".mk",
}  # fmt: skip
JSONL_EXTENSIONS = {".jsonl", ".ndjson"}
_WHAT_IS_TEXT = (
    "read are .txt, .md, .jsonl and source code such as .py, also with .gz; name a file by its own "
    "path to read it whatever its extension"
)
_TEXTS = f"a path, a glob such as 'texts/*.md', or '{BUILTIN}'"
_CHATS = "a .jsonl file of conversations, or a glob such as 'chats/*.jsonl'"
_CHUNK_BYTES = 1 << 20
# Longer text files are cut at a line, so that memory does not depend on the length of a file.
LONGEST_DOCUMENT = 16 << 20
LONGEST_LINE = 64 << 20


class Document(NamedTuple):
    """One text with its label.

    Attributes:
        name: Where it comes from, the same on every machine: source folder, path, line or part.
        domain: Its label.
        text: Never blank, without NUL.
        group: Documents of one group are held out together; "" stands for the name.
    """

    name: str
    domain: str
    text: str
    group: str = ""


class SourceFile(NamedTuple):
    """A file to read, and the folder that its domain is counted from."""

    path: Path
    root: Path

    @property
    def name(self) -> str:
        """The root folder's own name and the path below it."""
        return f"{self.root.name}/{self.path.relative_to(self.root).as_posix()}"


def read_documents(cfg: DataConfig) -> Iterator[Document]:
    """Every document of `cfg.sources`, one at a time, in a fixed order; blank ones are left out.

    A text file longer than 16 MiB comes as several documents of one group, cut at lines.

    Raises:
        DataError: a source is missing, matches nothing or holds no text; a file cannot be read
            or decoded; a line of a .jsonl file lacks its fields or is longer than 64 MiB.
    """
    files = source_files(cfg)  # first, so that a mistake in any source is reported immediately
    readers = [_builtin_documents(cfg)] if BUILTIN in cfg.sources else []
    readers += [(_read_jsonl if _is_jsonl(file.path) else _read_text)(file, cfg) for file in files]
    yield from (document for reader in readers for document in reader if document.text.strip())


def source_files(cfg: DataConfig) -> list[SourceFile]:
    """The files of all sources but 'builtin', each once, in the order of the sources, sorted."""
    allowed = _TEXTS if cfg.chat is None else _CHATS
    if not cfg.sources:
        raise DataError(f"data.sources is empty; give {allowed}")
    if cfg.chat is not None and BUILTIN in cfg.sources:
        raise DataError(
            f"data.sources has '{BUILTIN}', which is text, not conversations; give {allowed}"
        )
    files: dict[Path, SourceFile] = {}
    for source in cfg.sources:
        for file in [] if source == BUILTIN else resolve(source, allowed):
            files.setdefault(file.path.resolve(), file)
    return list(files.values())


def source_state(cfg: DataConfig) -> list[tuple[str, int, int]]:
    """Name, size in bytes and modification time in ns of everything that would be read."""
    files = [(file.name, file.path) for file in source_files(cfg)]
    state: list[tuple[str, int, int]] = []
    if BUILTIN in cfg.sources:
        state.append((f"{BUILTIN} {sys.implementation.name} {sys.version}", 0, 0))
        files += [(str(path), path) for path in builtin.library_files()]
    for name, path in files:
        try:
            status = path.stat()
        except OSError as error:
            raise _unreadable(path, error) from None
        state.append((name, status.st_size, status.st_mtime_ns))
    return state


def resolve(source: str, allowed: str) -> list[SourceFile]:
    """The text files that one path or glob stands for, sorted; messages say what is `allowed`.

    A file named by its own path is read whatever its extension; inside folders and globs only
    text extensions count, and names that begin with a dot are passed over.

    Warns:
        UserWarning: inside a folder there are links to folders, which are not followed.
    """
    path = Path(source).expanduser()
    if path.is_file():
        path = path.absolute()
        return [SourceFile(path, path.parent)]
    if path.is_dir():
        root = path.resolve()
        found = [SourceFile(file, root) for file in _walk(root)]
        if not found:
            raise DataError(f"no text file in the folder {source}: {_WHAT_IS_TEXT}")
        return found
    if not glob.has_magic(source):
        raise DataError(f"no such file or folder: {source}; give {allowed}")
    return _resolve_glob(source, path)


def stable_hash(*parts: object) -> int:
    """64 bits that depend on nothing but the parts: not on the machine, nor on the run."""
    text = "\0".join(map(str, parts)).encode("utf-8", errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def choose_held_out(
    domains_N: NDArray[np.int64],
    groups_N: NDArray[np.uint64],
    sizes_N: NDArray[np.int64],
    share: float,
    least: int,
) -> NDArray[np.bool_]:
    """Which documents are held out: those whose group's hash falls below `share`.

    Then, domain by domain, lowest hash first: one with less than `share` of its bytes, or fewer
    than `least`, held out gives more groups, up to half of its bytes (long and short documents
    can make the share of the bytes far smaller than that of the documents); one that is all held
    out takes a group back. A domain of a single group (or, rarely, one that shares all its groups
    with such) stays on one side: the caller has to cut it.

    Args:
        domains_N: Number of each document's domain.
        groups_N: Seeded hash of each document's group: uniform over 64 bits.
        sizes_N: Bytes of each document, at least 1.
        share: Of the groups, in (0, 1).
        least: Bytes that a domain should have held out, at least 1.
    """
    held_N = groups_N < np.uint64(min(int(share * 2.0**64), 2**64 - 1))
    for domain in np.unique(domains_N):
        inside = np.flatnonzero(domains_N == domain)
        groups, first, group_of = np.unique(
            groups_N[inside], return_index=True, return_inverse=True
        )
        if len(groups) < 2:
            continue
        sizes = np.bincount(group_of, weights=sizes_N[inside])
        held = held_N[inside][first]
        size, half = sizes[held].sum(), sizes.sum() / 2
        wanted = max(least, share * sizes.sum())
        if held.all():
            held_N[groups_N == groups[-1]] = False
        for number, group in enumerate(groups):
            if size >= wanted:
                break
            if not held[number] and size + sizes[number] <= half:
                held_N[groups_N == group] = True
                size += sizes[number]
    return held_N


def character_start(text: bytearray | mmap.mmap, place: int) -> int:
    """The first byte of the character that the byte at `place` belongs to."""
    while 0 < place < len(text) and text[place] & 0xC0 == 0x80:
        place -= 1
    return place


def _builtin_documents(cfg: DataConfig) -> Iterator[Document]:
    one = ALL if cfg.domains == "none" else ""
    for module, *texts in builtin.library_texts():
        group = f"{BUILTIN}/{module}"
        for kind, text in zip(("code", "english"), texts, strict=True):
            yield Document(f"{group}:{kind}", one or kind, text.replace("\0", " "), group)
    for number, text in enumerate(builtin.arithmetic_texts(cfg.seed)):
        yield Document(f"{BUILTIN}/arithmetic/{number:05d}", one or "arithmetic", text)


def _resolve_glob(source: str, path: Path) -> list[SourceFile]:
    fixed = next(number for number, part in enumerate(path.parts) if glob.has_magic(part))
    root = Path(*path.parts[:fixed]).resolve()
    try:
        matches = list(root.glob(str(Path(*path.parts[fixed:]))))
    except ValueError as error:
        raise DataError(f"{source} is not a glob that works: {error}") from None
    if not matches:
        raise DataError(f"nothing matches the glob {source}; check the folder and the pattern")
    files = {file for match in matches if match.is_dir() for file in _walk(match)}
    files |= {match for match in matches if _is_text(match) and match.is_file()}
    seen = sorted(f for f in files if "." not in {part[0] for part in f.relative_to(root).parts})
    if not seen:
        raise DataError(
            f"the glob {source} matches {len(matches)} names, but no text file: {_WHAT_IS_TEXT}"
        )
    return [SourceFile(file, root) for file in seen]


def _walk(root: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise _unreadable(Path(error.filename), error)

    found, links = [], []
    for folder, inner, names in os.walk(root, onerror=refuse):
        inner[:] = [name for name in inner if not name.startswith(".") and name != "__pycache__"]
        links += [path for name in inner if (path := Path(folder, name)).is_symlink()]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        # is_file also passes over pipes and links to nowhere.
        found += [path for path in paths if _is_text(path) and path.is_file()]
    if links:
        more = f" and {len(links) - 1} more" if len(links) > 1 else ""
        warnings.warn(
            f"links to folders are not followed: {min(links)}{more} in {root}; to read them too, "
            "name them as sources, or give a glob that matches them",
            stacklevel=2,
        )
    return sorted(found)


def _is_gzip(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _plain(path: Path) -> Path:
    """The path without a final .gz."""
    return path.with_suffix("") if _is_gzip(path) else path


def _is_jsonl(path: Path) -> bool:
    return _plain(path).suffix.lower() in JSONL_EXTENSIONS


def _is_text(path: Path) -> bool:
    return _is_jsonl(path) or _plain(path).suffix.lower() in TEXT_EXTENSIONS


def _domain(file: SourceFile, cfg: DataConfig) -> str:
    if cfg.domains == "none":
        return ALL
    below = file.path.relative_to(file.root).parts
    if cfg.domains == "folder" and len(below) > 1:
        return below[0]
    if cfg.domains == "field":
        raise DataError(
            f"data.domains is 'field', but {file.path} is not a .jsonl file and has no fields; "
            "leave it out, or set data.domains to 'folder', 'file' or 'none'"
        )
    return _plain(file.path).stem


def _read_text(file: SourceFile, cfg: DataConfig) -> Iterator[Document]:
    domain = _domain(file, cfg)
    offset = part = last = 0
    for number, raw in _split_at_nul(file.path):
        part, offset = (part, offset) if number == last else (0, offset + 1)
        name = f"{file.name}#{number}" if number else file.name
        text = _decode(raw, file.path, offset)
        yield Document(f"{name}@{part}" if part else name, domain, text, name if part else "")
        offset, part, last = offset + len(raw), part + 1, number


def read_lines(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Number, place (for messages) and value of each line of a .jsonl file that is not blank.

    Raises:
        DataError: the file cannot be read, or a line is not JSON.
    """
    offset = 0
    for number, raw in enumerate(_guarded(path, lines=True), start=1):
        line = _decode(raw, path, offset)
        offset += len(raw)
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield number, where, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON ({error}); put one object on a line") from None


def _read_jsonl(file: SourceFile, cfg: DataConfig) -> Iterator[Document]:
    domain = "" if cfg.domains == "field" else _domain(file, cfg)
    for number, where, record in read_lines(file.path):
        text = _field(record, cfg.text_field, "data.text_field", where)
        try:
            utf8(text)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        label = domain or _field(record, cfg.domain_field, "data.domain_field", where)
        for part, piece in enumerate(text.split("\0")):
            yield Document(f"{file.name}#{number}" + (f".{part}" if part else ""), label, piece)


def _field(record: Any, field: str, setting: str, where: str) -> str:
    if not isinstance(record, dict):
        raise DataError(f"{where} is not a JSON object; expected one with the field {field!r}")
    if not isinstance(record.get(field), str):
        problem = "is not a string" if field in record else "is missing"
        known = ", ".join(map(repr, record)) or "none"
        raise DataError(
            f"{where}: the field {field!r} {problem}; the fields there are {known}; "
            f"correct the line, or name another field in {setting}"
        )
    return cast(str, record[field])


def _split_at_nul(path: Path) -> Iterator[tuple[int, bytes]]:
    """The number of each document of a file and its bytes; a long one's in several parts."""
    number, kept = 0, bytearray()
    for chunk in _guarded(path, lines=False):
        first, *others = chunk.split(b"\0")
        kept += first
        for other in others:
            yield number, bytes(kept)
            number, kept = number + 1, bytearray(other)
        if len(kept) > LONGEST_DOCUMENT:
            cut = kept.rfind(b"\n") + 1 or character_start(kept, len(kept) - 1) or len(kept)
            yield number, bytes(kept[:cut])
            del kept[:cut]
    yield number, bytes(kept)


def _guarded(path: Path, lines: bool) -> Iterator[bytes]:
    """The file's bytes, unzipped, by line or by chunk; every failure is a DataError."""
    try:
        with gzip.open(path) if _is_gzip(path) else path.open("rb") as stream:
            read = stream.readline if lines else stream.read
            while chunk := read(LONGEST_LINE + 1 if lines else _CHUNK_BYTES):
                if len(chunk) > LONGEST_LINE:
                    raise DataError(
                        f"{path} has a line longer than {LONGEST_LINE >> 20} MiB; put one document "
                        "on a line, and split documents longer than that"
                    )
                yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path} is not a whole gzip file ({error}); copy or download it again"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _decode(raw: bytes, path: Path, offset: int) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        inside = " of the unzipped text" if _is_gzip(path) else ""
        raise DataError(
            f"{path} is not UTF-8: byte {offset + error.start}{inside} is "
            f"0x{raw[error.start]:02x} ({error.reason}); convert the file to UTF-8 or leave it out"
        ) from None
    return text.removeprefix("\ufeff") if offset == 0 else text


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path} cannot be read ({error.strerror or error}); check its permissions or leave it out"
    )
