"""Files that are there whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

# What a kill leaves behind begins with it.
UNFINISHED = ".unfinished-"


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of `path` when the block ends without an error.

    After an error, such as a full disk, what was there is untouched.
    """
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f"{UNFINISHED}{path.name}-", delete=False
    ) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def write_whole(path: Path, text: str) -> None:
    """Write text in UTF-8."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people and programs: indented, with a final newline."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def cache_folder(key: str) -> Path:
    """A folder of our own for what cannot be kept where it belongs; it may not exist.

    In $XDG_CACHE_HOME/moestro, or ~/.cache/moestro, by a hash of what tells the thing from others.
    """
    stated = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = stated if stated.is_absolute() else Path.home() / ".cache"
    return cache / "moestro" / hashlib.sha256(key.encode()).hexdigest()[:32]
