"""One process writes a run: a lock on its folder, which ends with the process at the latest."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moestro.errors import ConfigError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]


_POLL_S = 0.1


@contextmanager
def locked(run: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock of an existing folder; without one where the system or the disk has none.

    Args:
        run: the folder.
        wait_s: how long to wait for another process to end: a network disk may take a minute or
            two to notice that a node is gone.

    Raises:
        ConfigError: another process holds it, or another lock of this process.
    """
    if fcntl is None:
        yield
        return
    folder, until_s = os.open(run, os.O_RDONLY), time.monotonic() + wait_s
    try:
        while not _taken(folder):
            if time.monotonic() >= until_s:
                raise ConfigError(
                    f"another process trains the run in {run}, and two would destroy each other's "
                    "checkpoints; wait until it ends, stop it with Ctrl-C, or choose another "
                    "folder with --out"
                )
            time.sleep(_POLL_S)
        yield
    finally:
        os.close(folder)


def _taken(folder: int) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network disks have no locks
        pass
    return True
