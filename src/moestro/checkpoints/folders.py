"""Our own checkpoints on disk: whole or not there at all, and every byte verified.

A checkpoint is a folder with a manifest of sizes and SHA-256 sums. It is written under another
name, flushed, read back and then renamed, so a crash at any moment leaves the old one untouched.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moestro.errors import CheckpointError
from moestro.files import UNFINISHED, write_json
from moestro.strictjson import read_object

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
CONFIG = "config.json"
_STEP_FOLDER = re.compile(r"step-(\d{6,})")


@contextmanager
def atomic_folder(
    target: Path, sealed: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
) -> Iterator[Path]:
    """Write a folder so that `target` is either complete and verified, or untouched.

    Args:
        target: a new folder.
        sealed: files that are flushed and verified already, as `seal` says of them; by name, and
            known by the end of the block.

    Yields:
        An empty folder beside `target` to write into. When the block ends, a manifest is added,
        everything is flushed to disk and read back, and the folder is renamed to `target`. When
        the block raises, the folder is removed.

    Raises:
        CheckpointError: what was read back differs from what was written, or target exists.
        OSError: the disk is full or the place cannot be written.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists already; remove it or choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = unfinished(target)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        written = (path for path in folder.iterdir() if path.is_file())
        files = {**seal(path for path in written if path.name not in sealed), **sealed}
        for name, record in sealed.items():
            _check_size(folder / name, record)
        write_json(folder / MANIFEST, {"files": dict(sorted(files.items()))})
        _flush(folder)
        folder.rename(target)
        _flush(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def seal(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Flush files to disk and read them back; size and checksum of each by name.

    Raises:
        CheckpointError: what was read back differs from what was written.
    """
    written = {path: _fingerprint(path) for path in paths}
    for path in written:
        _flush(path)
    for path, record in written.items():
        _verify(path, record)
    return {path.name: record for path, record in written.items()}


def unfinished(target: Path) -> Path:
    """The folder that `atomic_folder` writes into until it is `target`."""
    return target.with_name(f"{UNFINISHED}{target.name}")


def remove_folder(folder: Path) -> None:
    """Remove a checkpoint: what a kill leaves of it is not taken for one, and swept up later."""
    leaving = unfinished(folder)
    shutil.rmtree(leaving, ignore_errors=True)
    folder.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def read_json(path: Path, *, finite: bool = True) -> dict[str, Any]:
    """Read a JSON object that belongs to a checkpoint.

    Args:
        path: the file.
        finite: refuse NaN and Infinity, which some published files hold.

    Raises:
        CheckpointError: the file is missing, damaged, or holds no object.
    """
    return read_object(
        path, CheckpointError, "use another checkpoint, or fetch this one again", finite=finite
    )


def is_pretrained(path: Path) -> bool:
    """Whether a folder's config.json, or this file, names a model_type: Hugging Face's layout."""
    path = path / CONFIG if path.is_dir() else path
    return path.is_file() and "model_type" in read_json(path, finite=False)


def verify_folder(folder: Path, rank: int = 0, ranks: int = 1) -> None:
    """Check every file of a checkpoint against its manifest.

    Args:
        folder: the checkpoint's.
        rank: reads through one of `ranks` shares of the files; the other ranks do the rest.
        ranks: how many there are.

    Raises:
        CheckpointError: names the file that is missing, truncated or altered.
    """
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: it has no {MANIFEST}. "
            "Give a run's folder, or one of its checkpoints"
        )
    for number, (name, written) in enumerate(_manifest(folder).items()):
        if number % ranks == rank:
            _verify(folder / name, written)
        else:
            _check_size(folder / name, written)


def _check_size(path: Path, written: Mapping[str, Any]) -> None:
    """Compare a file's size with what was said of it when it was written."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} lacks the file {path.name}; use another checkpoint")
    size = path.stat().st_size
    if size != written["bytes"]:
        raise CheckpointError(
            f"{path} has {size} bytes instead of {written['bytes']}: it is truncated or "
            "altered; use another checkpoint"
        )


def _verify(path: Path, written: Mapping[str, Any]) -> None:
    """Compare a file with what was said of it when it was written."""
    _check_size(path, written)
    if _fingerprint(path) != written:
        raise CheckpointError(
            f"{path} does not match its checksum: it was altered after it was saved; "
            "use another checkpoint"
        )


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of each file, by name."""
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict) or not files or not all(map(_is_record, files.values())):
        raise CheckpointError(
            f"{folder / MANIFEST} does not list the checkpoint's files with their sizes and "
            "checksums: it was altered; use another checkpoint"
        )
    return files


def _is_record(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("bytes"), int)
        and isinstance(value.get("sha256"), str)
    )


def step_folders(run: Path) -> dict[int, Path]:
    """The checkpoint folders of a run by step, oldest first; good or not, but all finished."""
    folder = run / CHECKPOINTS
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _STEP_FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return list(step_folders(run).values())


def newest_checkpoint(path: Path, known: Callable[[Path], bool] | None = None) -> Path:
    """The checkpoint that `path` means: itself, or the newest good one of a run.

    Args:
        path: a run's folder or a checkpoint's.
        known: whether a checkpoint is known to be good, so that its files are not read through.

    Raises:
        CheckpointError: there is none, or none is whole; says what is wrong with each.
    """

    def verify(folder: Path) -> None:
        if known is None or not known(folder):
            verify_folder(folder)

    if (path / MANIFEST).is_file():
        verify(path)
        return path
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a run's folder or a checkpoint's")
    troubles = []
    for folder in reversed(checkpoints(path)):
        try:
            verify(folder)
        except CheckpointError as error:
            troubles.append(str(error))
        else:
            return folder
    if troubles:
        raise CheckpointError(f"no checkpoint in {path} is whole: {'; '.join(troubles)}")
    raise CheckpointError(f"{path} holds no checkpoint; give a run's folder or a checkpoint's")


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _flush(path: Path) -> None:
    """Force a file or a folder's entries onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
