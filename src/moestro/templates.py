"""The process in which sandbox.py runs other people's jinja2 templates: one request a line.

jinja2's immutable sandbox gives no attribute that leads to Python, and nothing that the template
is given can be changed. It sets no bound to time or memory, and counting cannot set one: a value
of sixty small lists takes an age to hash, compare or print. The system's limits hold for whatever
a template does; who exceeds them is ended by the system, and this process with it.

Imports nothing of the project, so that it starts fast and small.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from types import CodeType
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Makes Python and jinja2 load what they load when first used: later no file can be opened.
_WARM_UP = "{{ 'a'|wordwrap|striptags|pprint }}{{ strftime_now('%c') }}{{ none() }}"
# How this process ends when a template takes more memory than it may; sandbox.py knows it too.
OUT_OF_MEMORY = 77
# Characters of a message that the template itself, or an error in it, gives.
_LONGEST_MESSAGE = 2000


def serve() -> None:
    """Answer requests until there are no more.

    A request has `source` and `given`, the template and its variables; `now`, the local time; and
    its limits, `seconds` of processor time, `memory` in bytes and `characters` written; and the
    two `marks` to write around what a model is trained on, if any. An answer
    has the `text`, or that the template `refused` with a message, or what its `problem` is.
    """
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    _answer({"source": _WARM_UP, "given": {}, "now": "2000-01-01", "characters": 99})
    _confine()
    try:
        for line in sys.stdin.buffer:
            request = json.loads(line)
            _limit(resource.RLIMIT_AS, request["memory"])
            signal.setitimer(signal.ITIMER_PROF, request["seconds"])
            answer = json.dumps(_answer(request)).encode("ascii")
            sys.stdout.buffer.write(answer + b"\n")
            sys.stdout.buffer.flush()
            signal.setitimer(signal.ITIMER_PROF, 0)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


def _confine() -> None:
    """Open no more files or sockets, write none, start no process, leave no core."""
    for kind, most in (("NOFILE", 3), ("FSIZE", 0), ("NPROC", 0), ("CORE", 0)):
        most_of_kind = getattr(resource, f"RLIMIT_{kind}")
        with suppress(OSError, ValueError):
            resource.setrlimit(most_of_kind, (most, most))


def _limit(kind: int, most: int) -> None:
    """Set a limit that can be changed again, within what this process was started with."""
    _, hard = resource.getrlimit(kind)
    with suppress(OSError, ValueError):  # macOS knows no limit of memory
        resource.setrlimit(kind, (most if hard < 0 else min(most, hard), hard))


def _answer(request: Mapping[str, Any]) -> dict[str, str]:
    try:
        return {"text": _write(request)}
    except MemoryError:
        raise
    except _RefusedError as error:
        return {"refused": str(error)[:_LONGEST_MESSAGE]}
    except SecurityError as error:
        problem = f"is not safe to run: {error}"
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        problem = f"fails{f' in line {line}' if line else ''}: {error.message}"
    except Exception as error:  # a program of someone else's may fail in any way
        problem = f"fails with {type(error).__name__}: {error}"
    return {"problem": problem[:_LONGEST_MESSAGE]}


def _write(request: Mapping[str, Any]) -> str:
    """The text that a template makes of its variables."""
    sandbox, marks = _Sandbox(datetime.fromisoformat(request["now"])), request.get("marks") or ()
    code, names = _compiled(request["source"], tuple(marks)), sandbox.make_globals(None)
    pieces, left = [], request["characters"]
    for piece in sandbox.template_class.from_code(sandbox, code, names).generate(request["given"]):
        left -= len(piece)
        if left < 0:
            raise SecurityError(f"it writes more than {request['characters']:,} characters")
        pieces.append(piece)
    return "".join(pieces)


@lru_cache(maxsize=4)
def _compiled(source: str, marks: tuple[str, ...]) -> CodeType:
    sandbox = _Sandbox(datetime.min)
    sandbox.marks = marks
    return sandbox.compile(source)


class _RefusedError(Exception):
    """The template called `raise_exception`."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """What a template can use; the clock stands at `now`."""

    marks: tuple[str, ...] = ()  # begin and end what a model is trained on

    def __init__(self, now: datetime) -> None:
        def strftime_now(form: str) -> str:
            return now.strftime(form)

        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        self.filters["tojson"] = _tojson
        del self.globals["lipsum"]
        self.globals |= {
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Fields,
            "raise_exception": _raise,
            "strftime_now": strftime_now,
        }


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body, between marks where they are wanted."""
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = getattr(self.environment, "marks", ())
        if not marks:
            return body
        begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in marks)
        return [begin, *body, end]


class _Fields(Namespace):
    """A namespace that takes no name beginning with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"it names a field {name!r}; no name may begin with an underscore")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes that HTML would need."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
        sort_keys=sort_keys,
    )  # fmt: skip


def _raise(message: object) -> None:
    raise _RefusedError(str(message))
