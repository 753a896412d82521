"""One process writes a run: a lock on its folder, which ends with the process at the latest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moestro.errors import ConfigError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the lock of an existing folder; without one where the system or the disk has none.

    Raises:
        ConfigError: another process holds it, or another lock of this process.
    """
    if fcntl is None:
        yield
        return
    folder = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process trains the run in {run}, and two would destroy each other's "
                "checkpoints; wait until it ends, stop it with Ctrl-C, or choose another folder "
                "with --out"
            ) from None
        except OSError:  # some network disks
            pass
        yield
    finally:
        os.close(folder)
