"""Renders a jinja2 template that came from someone else, in a process of its own with limits.

The process (templates.py) cannot open a file or a socket, and is ended when a template takes too
long or too much memory, whatever it does. It is started when first needed and kept for the next
rendering; each thread that renders at the same time has its own. It ends with this process.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, cast

from moestro.errors import DataError
from moestro.worker import EndedError, Worker

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

_START = "from moestro.templates import serve; serve()"


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
        # No character takes more than 12 bytes of JSON.
        received = worker.ask(line, LONGEST_WAIT_S, 12 * MOST_WRITTEN + 2**20)
    except EndedError as error:
        raise DataError(f"the chat template is not safe to run: {_excess(error.code)}") from None
    except BaseException:
        worker.close()
        raise
    if len(_idle) < MOST_IDLE:
        _idle.append(worker)
    answer = cast(dict[str, str], json.loads(received))
    if "refused" in answer:
        raise RefusedError(answer["refused"])
    if "text" not in answer:
        raise DataError(f"the chat template {answer['problem']}")
    return answer["text"]


def _excess(code: int | None) -> str:
    """Why there is no answer."""
    return {
        None: f"it takes longer than {LONGEST_WAIT_S:g} s, or answers at too great length",
        -signal.SIGPROF: f"it takes more than {MOST_SECONDS:g} s of processor time",
        OUT_OF_MEMORY: f"it takes more than {MOST_MEMORY >> 20:,} MiB of memory",
    }.get(code, f"its process ended with code {code}")


# Shared by all threads; `list.pop` and `list.append` are atomic, and no lock can be held in a fork.
_idle: list[Worker] = []


def _borrow() -> Worker:
    """A process for one rendering: one that waits, or a new one."""
    with suppress(IndexError):
        while True:
            worker = _idle.pop()
            if worker.is_ready():
                return worker
            worker.close()
    return Worker(_START, ("moestro", "jinja2", "markupsafe"))
