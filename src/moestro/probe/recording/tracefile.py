"""Trace files: one .npz per run, written part by part, read whole or part by part.

The format, member by member, is in docs/traces.md. All members are stored without compression, so
what a file says about its size can be held against the size that it has before memory is taken.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from math import prod
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from moestro.errors import DataError
from moestro.files import whole_file
from moestro.probe.recording.tracecheck import check, check_subject, dtypes
from moestro.probe.recording.traces import Subject, Trace, join, require_same
from moestro.strictjson import parse

FORMAT = "moestro trace"
VERSION = 1
_HEADER, _NAMES = "header.json", "names.json"
_OPTIONAL = "kept_TLK"
_MEMBER = re.compile(r"part-(\d{5,})/(\w+\.npy|names\.json)")


class TraceWriter:
    """Writes a trace file that appears under its name only when it is complete.

    Use it with `with`. Parts go to a file `.unfinished-NAME-…` beside `path`, which takes the
    place of `path` at the end. After an error, `path` is as it was and the other file is gone;
    after a kill it may stay behind, and can be removed.

    Args:
        path: the file; what is there is replaced.
        subject: the model; every part must be of it.
        append: keep the parts of the trace that is there, which must be of the same model; if
            there is none, start one.
    """

    def __init__(self, path: Path, subject: Subject, append: bool = False) -> None:
        self._path = Path(path).resolve()
        self._subject = subject
        self._append = append
        self._parts = 0
        self._damaged = False

    def __enter__(self) -> Self:
        """Open the unfinished file.

        Raises:
            DataError: the file cannot be written, or the one to append to is damaged or of
                a different model.
        """
        check_subject(self._subject, f"the trace for {self._path}")
        with _files(self._path, "written"), ExitStack() as stack:
            if self._path.is_dir():
                raise IsADirectoryError("it is a folder")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            old = self._append and self._path.exists()
            if old:
                with _Reader(self._path) as reader:
                    require_same(reader.subject, self._subject)
                    self._parts = reader.parts
            file = stack.enter_context(whole_file(self._path))
            if old:
                with self._path.open("rb") as before:
                    shutil.copyfileobj(before, file)
            self._archive = zipfile.ZipFile(file, "a" if old else "w")
            stack.push(self._close)
            if not old:
                header = {"format": FORMAT, "version": VERSION}
                self._put_json(_HEADER, {**header, "subject": self._subject._asdict()})
            self._open = stack.pop_all()
        return self

    def write(self, trace: Trace) -> None:
        """Add a part.

        Raises:
            DataError: it is of a different model, its values are impossible (see
                docs/traces.md), or the disk is full.
        """
        require_same(self._subject, trace.subject)
        check(trace, f"the trace for {self._path}")
        self._damaged = True
        place = f"part-{self._parts:05d}"
        with _files(self._path, "written"):
            names = {"domains": trace.domains, "documents": trace.documents}
            self._put_json(f"{place}/{_NAMES}", names)
            for name, dtype in dtypes(self._subject.num_experts).items():
                values = getattr(trace, name)
                if values is not None:
                    with self._member(f"{place}/{name}.npy") as member:
                        plain = np.ascontiguousarray(values, dtype=dtype)
                        np.lib.format.write_array(member, plain, allow_pickle=False)
        self._parts += 1
        self._damaged = False

    def __exit__(self, *error: Any) -> None:
        """Put the file in its place, or after an error remove what there is of it."""
        with _files(self._path, "written") if error[1] is None else nullcontext():
            self._open.__exit__(*error)

    def _close(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            with suppress(OSError, ValueError):
                self._archive.close()
            return
        self._archive.close()
        if self._damaged:
            raise DataError(f"{self._path} was not written: one of its parts could not be")
        if not self._parts:
            raise DataError(f"{self._path} was not written: no part of a trace was given to it")

    def _member(self, name: str) -> IO[bytes]:
        return self._archive.open(zipfile.ZipInfo(name), "w", force_zip64=True)

    def _put_json(self, name: str, value: object) -> None:
        with self._member(name) as member:
            member.write(json.dumps(value).encode("ascii"))


def write_parts(path: Path, parts: Iterable[Trace], append: bool = False) -> None:
    """Write the parts of a trace as they come, such as those of `record_batches`.

    Args:
        path: the file; what is there is replaced.
        parts: of one model.
        append: keep the parts of the trace that is there, which must be of the same model.

    Raises:
        DataError: as `TraceWriter`; or there is no part.
    """
    coming = iter(parts)
    first = next(coming, None)
    if first is None:
        raise DataError(f"{path} was not written: no part of a trace was given to it")
    with TraceWriter(path, first.subject, append) as writer:
        writer.write(first)
        del first
        for part in coming:
            writer.write(part)


def read_trace(path: Path) -> Trace:
    """The whole trace of a file: its parts joined.

    Raises:
        DataError: the file is missing, truncated, damaged, no trace, or of another version.
    """
    return join(list(read_parts(path)))


def read_parts(path: Path) -> Iterator[Trace]:
    """The parts of a trace file as they were written; one at a time is in memory.

    Domains, documents and batches are numbered by each part for itself; `join` of some or all
    parts numbers them together.

    Raises:
        DataError: as `read_trace`; what is wrong with a part, when its turn comes.
    """
    with _files(Path(path), "read"), _Reader(Path(path)) as reader:
        for part in range(reader.parts):
            yield reader.read(part)


@contextmanager
def _files(path: Path, what: str) -> Iterator[None]:
    """Turn what the system says about a file into an error that names it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"the trace {path} cannot be {what}: {reason}") from error


class _Reader:
    """An open trace file whose list of members and header are sound."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is not a file; give the .npz file of a trace")
        with self._damage("it is truncated or not an .npz file"):
            self._archive = zipfile.ZipFile(path)
        try:
            self._members = self._list()
            self.subject = self._read_header()
            self.parts = self._count_parts()
        except BaseException:
            self._archive.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._archive.close()

    def read(self, part: int) -> Trace:
        place, num_experts = f"part-{part:05d}", self.subject.num_experts
        with self._damage(f"{place}/{_NAMES} cannot be read"):
            names = parse(self._bytes(f"{place}/{_NAMES}"), surrogates=True)
            domains, documents = names["domains"], names["documents"]
            if not isinstance(domains, list) or not isinstance(documents, list):
                raise TypeError("domains and documents must be lists")
        arrays: dict[str, Any] = {_OPTIONAL: None}
        for name, dtype in dtypes(num_experts).items():
            member = f"{place}/{name}.npy"
            if member in self._members:
                arrays[name] = self._array(member, np.dtype(dtype).newbyteorder("<"))
        trace = Trace(self.subject, tuple(domains), tuple(documents), **arrays)
        check(trace, f"{self._path}, {place}")
        return trace

    @contextmanager
    def _damage(self, what: str) -> Iterator[None]:
        """Turn what is raised on damaged bytes into an error that names the file."""
        try:
            yield
        except (DataError, OSError):
            raise
        except Exception as error:  # the readers of zip and npy raise nearly anything
            reason = f"{type(error).__name__}: {error}"[:200]
            raise DataError(f"{self._path}: {what} ({reason}); record the trace again") from error

    def _list(self) -> dict[str, zipfile.ZipInfo]:
        """The members by name; their sizes are no more than the file holds."""
        infos = self._archive.infolist()
        members = {info.filename: info for info in infos}
        if len(members) != len(infos):
            raise DataError(f"{self._path} has two members of one name; record the trace again")
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise DataError(
                    f"{self._path}: {info.filename} is compressed; a trace file is not. "
                    "Give the file as `moestro probe --trace` wrote it"
                )
        if sum(info.file_size for info in infos) > self._path.stat().st_size:
            raise DataError(f"{self._path}: its members claim more bytes than the file has")
        return members

    def _read_header(self) -> Subject:
        if _HEADER not in self._members:
            raise DataError(f"{self._path} is not a trace: it has no member {_HEADER}")
        with self._damage(f"{_HEADER} cannot be read"):
            header = parse(self._bytes(_HEADER))
            if header["format"] != FORMAT:
                raise DataError(f"{self._path} is not a trace: its format is {header['format']!r}")
            if header["version"] != VERSION:
                raise DataError(
                    f"{self._path} is a trace of version {header['version']!r}, but this moestro "
                    f"reads version {VERSION}; record it again, or use the moestro that wrote it"
                )
            fields = dict(header["subject"])
            fields["moe_layers"] = tuple(fields["moe_layers"])
            subject = Subject(**fields)
        check_subject(subject, str(self._path))
        return subject

    def _count_parts(self) -> int:
        """How many parts there are; all have the members that they need, and no others."""
        needed = {f"{name}.npy" for name in dtypes(self.subject.num_experts)} | {_NAMES}
        found: dict[int, set[str]] = {}
        for name in self._members.keys() - {_HEADER}:
            match = _MEMBER.fullmatch(name)
            if match is None or match[2] not in needed:
                raise DataError(f"{self._path}: a trace file has no member {name!r}")
            found.setdefault(int(match[1]), set()).add(match[2])
        for part in range(max(found, default=0) + 1):
            for name in sorted(needed - {f"{_OPTIONAL}.npy"} - found.get(part, set())):
                raise DataError(
                    f"{self._path}: part-{part:05d}/{name} is missing; record the trace again"
                )
        return len(found)

    def _bytes(self, name: str) -> bytes:
        return self._archive.read(self._members[name])

    def _array(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        """One member; nothing is allocated before its size is known to be right."""
        with self._damage(f"{name} is damaged"), self._archive.open(name) as member:
            version = np.lib.format.read_magic(member)
            if version not in ((1, 0), (2, 0)):
                raise DataError(f"{self._path}: {name} is of npy version {version}")
            first = version == (1, 0)
            parse = np.lib.format.read_array_header_1_0 if first else _header_2_0
            shape, by_columns, found = parse(member)
            if found != dtype or by_columns:
                order = ", by columns" if by_columns else ""
                raise DataError(
                    f"{self._path}: {name} holds {found}{order}, but must hold {dtype} by rows"
                )
            size = self._members[name].file_size - member.tell()
            if min(shape, default=0) < 0 or prod(shape) * dtype.itemsize != size:
                raise DataError(
                    f"{self._path}: {name} should hold {dtype} of shape {list(shape)}, "
                    f"but has {size} bytes; record the trace again"
                )
            member.seek(0)
            values: NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
            # The checksum is compared when the end is reached, which no bytes are before.
            member.read()
            return values


def _header_2_0(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    return np.lib.format.read_array_header_2_0(member)
