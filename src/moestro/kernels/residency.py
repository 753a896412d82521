"""Packed experts that stay in their file: some of them in memory, the others read as wanted.

`native/residency.cpp` keeps those that were used last and reads the rest in threads of its own,
past the page cache where the file system can.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from weakref import finalize

from moestro.errors import CheckpointError
from moestro.kernels.native_library import I32, I64, PTR, call, library

READERS = 4
_ENDS, _CHANGED = -1, -2


class Slabs(NamedTuple):
    """The experts of one mixture in a file, side by side on whole pages."""

    offset: int  # where they begin
    slab_bytes: int  # of each
    experts: int  # E
    kept: int  # how many are in memory at most


class Reads(NamedTuple):
    """What was wanted since a file was opened."""

    hits: int  # experts that were in memory
    misses: int  # that were not
    bytes: int  # read from the file
    waited_s: float  # that computing stood still until they were there

    @property
    def hit_rate(self) -> float:
        """The share of what was wanted that was in memory; 1 before anything was."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 1.0

    def since(self, before: Reads) -> Reads:
        """What came after `before`."""
        return Reads(
            self.hits - before.hits,
            self.misses - before.misses,
            self.bytes - before.bytes,
            self.waited_s - before.waited_s,
        )


class _Slabs(ctypes.Structure):
    """`moestro_slabs`."""

    _fields_ = (("offset", I64), ("slab_bytes", I64), ("experts", I64), ("slots", I64))


class _Reads(ctypes.Structure):
    """`moestro_reads`."""

    _fields_ = (
        ("hits", I64), ("misses", I64), ("bytes", I64), ("waited_ns", I64), ("place", I64),
        ("error", I32), ("reserved", I32),
    )  # fmt: skip


class Residency:
    """The experts of a file, of which so many of each mixture are in memory at a time.

    A file that shrinks or is written to while this lives gives errors, never wrong numbers; one
    that is removed or replaced is read on.

    Args:
        path: of the file.
        mixtures: where the experts are, and how many of them are kept.
        file: which file it was when `mixtures` were read from it; None: whatever is there.
        readers: threads that read.

    Raises:
        CheckpointError: the file cannot be opened, or is another one.
        MemoryError: there is no room for what is to be kept.
    """

    def __init__(
        self,
        path: Path,
        mixtures: Sequence[Slabs],
        file: os.stat_result | None = None,
        readers: int = READERS,
    ) -> None:
        self.path, self.mixtures = path, tuple(mixtures)
        slabs = (_Slabs * len(self.mixtures))(*(_Slabs(*each) for each in self.mixtures))
        self.handle, fd = PTR(), open_direct(path, file)
        try:
            made = ctypes.byref(self.handle)
            call("residency_open", fd, slabs, len(slabs), readers, made, takes="experts in a file")
        except BaseException:
            os.close(fd)
            raise
        # When the process ends the system takes it all back, also from a thread that computes.
        finalize(self, _close, library(), self.handle, fd).atexit = False

    def reads(self) -> Reads:
        """What was wanted until now."""
        found = self._counts()
        return Reads(found.hits, found.misses, found.bytes, found.waited_ns / 1e9)

    def failure(self) -> CheckpointError:
        """Why the last read failed."""
        found = self._counts()
        why = {
            _ENDS: "it ends there; it was cut while the model was in use",
            _CHANGED: "it was written to while the model was in use",
        }
        advice = "remove it and open the model again to pack its checkpoint again"
        what = why.get(found.error)
        if what is None:
            what, advice = (
                os.strerror(found.error),
                "try again, and look at the disk if it stays so",
            )
        return CheckpointError(f"cannot read {self.path} at byte {found.place}: {what}; {advice}")

    def _counts(self) -> _Reads:
        counts = _Reads()
        call("residency_counts", self.handle, ctypes.byref(counts))
        return counts


class Stored(NamedTuple):
    """Which mixture of a file some experts are."""

    residency: Residency
    mixture: int


def open_direct(path: Path, file: os.stat_result | None = None) -> int:
    """A descriptor that reads past the page cache, where the file system can.

    Args:
        path: of the file.
        file: what it was before; None: whatever is there.

    Raises:
        CheckpointError: the file cannot be opened, or is another one or changed.
    """
    fd = _open(path)
    if file is not None and _version(os.fstat(fd)) != _version(file):
        os.close(fd)
        raise CheckpointError(f"{path} was replaced or written to while it was opened; try again")
    return fd


def _open(path: Path) -> int:
    with suppress(OSError, AttributeError):
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def _version(file: os.stat_result) -> tuple[int, ...]:
    return file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns


def _close(native: ctypes.CDLL, handle: ctypes.c_void_p, fd: int) -> None:
    native.moestro_residency_close(handle)
    os.close(fd)
