"""A process of Python that answers one request a line, and can be ended whatever it does.

It ends with this process.
"""

from __future__ import annotations

import importlib.util
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

_PATHS = "import sys; sys.path += sys.argv[1:]; "
# Some installations need these to find Python's own libraries.
KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


class EndedError(Exception):
    """There is no answer.

    Attributes:
        code: what the process ended with; None: it did not end, and took too long or said too much.
    """

    def __init__(self, code: int | None) -> None:
        super().__init__()
        self.code = code


class Worker:
    """The process; one thread at a time may ask it."""

    def __init__(self, start: str, packages: Sequence[str]) -> None:
        """Start it.

        Args:
            start: the program.
            packages: what it may import beside Python's own.
        """
        specs = map(importlib.util.find_spec, packages)
        places = {str(Path(cast(str, spec.origin)).parents[1]): None for spec in specs if spec}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PATHS + start, *places],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
            start_new_session=True,  # Ctrl-C is not for it
        )
        self._owner = os.getpid()
        self._pipes = threading.RLock()
        # Also called when nothing refers to the worker any more, and before Python exits.
        self.close = weakref.finalize(self, _end, self._process, self._owner, self._pipes)

    def is_ready(self) -> bool:
        """Whether it still runs; a fork of this process must not talk to it."""
        return self._owner == os.getpid() and self._process.poll() is None

    def ask(self, line: bytes, wait_s: float, most: int) -> bytes:
        """The answer to one request; without one, the process is ended.

        Args:
            line: the request.
            wait_s: how long to wait.
            most: bytes of an answer.

        Raises:
            EndedError: there is no answer.
        """
        with self._pipes:
            return self._ask(line, wait_s, most)

    def _ask(self, line: bytes, wait_s: float, most: int) -> bytes:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        if not self.close.alive:
            raise EndedError(self._code())
        with suppress(BrokenPipeError):  # it ended, as is read next
            stdin.write(line)
            stdin.flush()
        deadline = time.monotonic() + wait_s
        received = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                waits = selector.select(deadline - time.monotonic())
                piece = os.read(stdout.fileno(), 2**20) if waits else b""
                if not piece or len(received) > most:
                    code = self._code()
                    self.close()
                    raise EndedError(code)
                received += piece
        return bytes(received)

    def _code(self) -> int | None:
        try:
            return self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return None


def _end(process: subprocess.Popen[bytes], owner: int, pipes: threading.RLock) -> None:
    """End a worker and leave no zombie; in a fork of its owner, only let go of it."""
    if owner != os.getpid():
        process.returncode = 0  # not this process's child
        _close(process)
        return
    process.kill()
    process.wait()
    with pipes:  # a thread that asks finds that it ended, and lets go of them first
        _close(process)


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
