"""Renders a jinja2 template that came from someone else, in a process of its own with limits.

The process (templates.py) cannot open a file or a socket, and is ended when a template takes too
long or too much memory, whatever it does. It is started when first needed and kept for the next
rendering; each thread that renders at the same time has its own. It ends with this process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from moestro.errors import DataError

# What one rendering may take: seconds of processor time, bytes of address space, and characters
# written; seconds of waiting, on a machine that is busy; bytes of its variables.
MOST_SECONDS = 5.0
MOST_MEMORY = 2**30
MOST_WRITTEN = 2**24
LONGEST_WAIT_S = 60.0
MOST_GIVEN = 2**26
# Around what a model is trained on, where that is asked for: characters that no text holds.
MARKS = ("\ufdd0", "\ufdd1")
# Processes that wait for the next rendering; and how one ends for lack of memory.
MOST_IDLE = 4
OUT_OF_MEMORY = 77

_START = "import sys; sys.path += sys.argv[1:]; from moestro.templates import serve; serve()"
# Some installations need these to find Python's own libraries.
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


class RefusedError(Exception):
    """The template called `raise_exception`."""


def render(source: str, variables: Mapping[str, Any], *, marks: bool = False) -> str:
    """The text that a template writes.

    Args:
        source: The template.
        variables: What it is given; plain data, as in JSON.
        marks: Write `MARKS` around what its {% generation %} blocks write.

    Raises:
        RefusedError: it does not want what it is given, and says why.
        DataError: it fails, does what is not allowed, or takes too much.
    """
    request = {
        "source": source, "given": variables, "now": datetime.now().isoformat(),
        "seconds": MOST_SECONDS, "memory": MOST_MEMORY, "characters": MOST_WRITTEN,
        "marks": MARKS if marks else None,
    }  # fmt: skip
    line = json.dumps(request).encode("ascii") + b"\n"
    if len(line) > MOST_GIVEN:
        raise DataError(
            f"a chat template and its messages have {len(line):,} bytes; at most {MOST_GIVEN:,} "
            "are rendered in one call: give fewer or shorter messages"
        )
    worker = _borrow()
    try:
        answer = worker.ask(line)
    except BaseException:
        worker.close()
        raise
    if len(_idle) < MOST_IDLE:
        _idle.append(worker)
    if "refused" in answer:
        raise RefusedError(answer["refused"])
    if "text" not in answer:
        raise DataError(f"the chat template {answer['problem']}")
    return answer["text"]


class _Worker:
    """A process that renders templates, one after the other."""

    def __init__(self) -> None:
        specs = map(importlib.util.find_spec, ("moestro", "jinja2", "markupsafe"))
        places = {str(Path(cast(str, spec.origin)).parents[1]): None for spec in specs if spec}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _START, *places],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
            start_new_session=True,  # Ctrl-C is not for it
        )
        self._owner = os.getpid()
        # Also called when nothing refers to the worker any more, and before Python exits.
        self.close = weakref.finalize(self, _end, self._process, self._owner)

    def is_ready(self) -> bool:
        """Whether it still runs; a fork of this process must not talk to it."""
        return self._owner == os.getpid() and self._process.poll() is None

    def ask(self, line: bytes) -> dict[str, str]:
        """The answer to one request."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with suppress(BrokenPipeError):  # it ended, as is read next
            stdin.write(line)
            stdin.flush()
        deadline = time.monotonic() + LONGEST_WAIT_S
        received = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                waits = selector.select(deadline - time.monotonic())
                piece = os.read(stdout.fileno(), 2**20) if waits else b""
                # No character takes more than 12 bytes of JSON.
                if not piece or len(received) > 12 * MOST_WRITTEN + 2**20:
                    raise DataError(f"the chat template is not safe to run: {self._excess()}")
                received += piece
        return cast(dict[str, str], json.loads(received))

    def _excess(self) -> str:
        """Why there is no answer."""
        try:
            code = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return f"it takes longer than {LONGEST_WAIT_S:g} s"
        return {
            -signal.SIGPROF: f"it takes more than {MOST_SECONDS:g} s of processor time",
            OUT_OF_MEMORY: f"it takes more than {MOST_MEMORY >> 20:,} MiB of memory",
        }.get(code, f"its process ended with code {code}")


# Shared by all threads; `list.pop` and `list.append` are atomic, and no lock can be held in a fork.
_idle: list[_Worker] = []


def _borrow() -> _Worker:
    """A process for one rendering: one that waits, or a new one."""
    with suppress(IndexError):
        while True:
            worker = _idle.pop()
            if worker.is_ready():
                return worker
            worker.close()
    return _Worker()


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """End a worker and leave no zombie; in a fork of its owner, only let go of it."""
    if owner != os.getpid():
        process.returncode = 0  # not this process's child
    else:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
