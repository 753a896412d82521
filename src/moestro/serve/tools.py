"""Calls of tools: how a model's template writes them, and what of a reply is one."""

from __future__ import annotations

import json
import uuid
from typing import Any, NamedTuple

from moestro.serve import errors
from moestro.serve.constraints import of_calls
from moestro.serve.schema import ChatRequest, ChosenTool
from moestro.strictjson import parse

# Marks of forms that are not read: Qwen3-Coder, GLM, DeepSeek, gpt-oss.
_OTHER_FORMS = ("<function=", "<arg_key>", "<｜tool▁call", "<|channel|>")


class Form(NamedTuple):
    """How calls are written.

    Attributes:
        begin: what a call begins with; empty where it is bare JSON, which fills the reply.
        end: what it ends with.
        key: what the arguments are called.
    """

    begin: str
    end: str
    key: str


HERMES = Form("<tool_call>\n", "\n</tool_call>", "arguments")
BARE = Form("", "", "arguments")


class Call(NamedTuple):
    """A function that a model calls; the arguments are JSON."""

    id: str
    name: str
    arguments: str


def form_of(source: str) -> Form:
    """The form of a template's calls.

    Raises:
        ApiError: it knows no tools, or writes calls in a form that is not read.
    """
    if "tools" not in source:
        raise errors.refused("this model's chat template knows no tools; leave them out", "tools")
    other = next((mark for mark in _OTHER_FORMS if mark in source), None)
    if other is not None:
        raise errors.refused(
            f"this model writes calls with {other}, a form that is not read here; leave tools out",
            "tools",
        )
    if "<tool_call>" in source:
        return HERMES
    return BARE._replace(key="parameters") if '"parameters": dictionary' in source else BARE


def grammar(wanted: ChatRequest, form: Form, *, thinking: bool) -> str | None:
    """What a reply with tools is held to; None where it may be anything.

    Raises:
        ApiError: the tool that has to be called is none of the request's.
    """
    functions, choice = wanted.functions, wanted.tool_choice
    if isinstance(choice, ChosenTool):
        name = choice.function.name
        if name not in functions:
            known = ", ".join(map(repr, functions)) or "none"
            raise errors.refused(
                f"tool_choice names {name[:100]!r}; the request's functions are {known[:400]}",
                "tool_choice",
            )
        functions = {name: functions[name]}
    must = isinstance(choice, ChosenTool) or choice == "required"
    if must and not functions:
        raise errors.refused("tool_choice asks for a call, and there are no functions", "tools")
    if not functions or not (must or form.begin):
        return None
    schemas = {name: each.parameters or {"type": "object"} for name, each in functions.items()}
    several = wanted.parallel_tool_calls is not False and not isinstance(choice, ChosenTool)
    return of_calls(
        schemas, form.begin, form.key, form.end, must=must, several=several, thinking=thinking
    )


class Reader:
    """Takes a reply apart while it comes: text for the user, and calls."""

    def __init__(self, form: Form, names: frozenset[str]) -> None:
        self._form, self._names = form, names
        self._begin, self._end = form.begin.strip(), form.end.strip()
        self._held, self._said = "", False

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Take text; returns what is certain to be for the user, and calls that are whole."""
        self._held += text
        if not self._begin:
            if not self._said and self._held.lstrip()[:1] in ("", "{", "["):
                return "", []
            self._said = True
            return self._take(len(self._held)), []
        said, calls = "", list[Call]()
        while (start := self._held.find(self._begin)) >= 0:
            stop = self._held.find(self._end, start)
            if stop < 0:
                return said + self._take(start).rstrip("\n"), calls
            found = self._calls(self._held[start + len(self._begin) : stop])
            before = self._take(start)
            body = self._take(stop + len(self._end) - start)
            said += before.rstrip("\n") if found else before + body
            calls += found
        return said + self._take(len(self._held) - self._beginning()), calls

    def flush(self) -> tuple[str, list[Call]]:
        """What is left at the end."""
        rest = self._take(len(self._held))
        body = rest.strip().removeprefix(self._begin) if not self._said else ""
        found = self._calls(body)
        return ("", found) if found else (rest, [])

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken

    def _beginning(self) -> int:
        """How much of what is held may be the beginning of a call's mark, with lines before it."""
        for length in range(min(len(self._begin) - 1, len(self._held)), 0, -1):
            if self._begin.startswith(self._held[-length:]):
                break
        else:
            length = 0
        kept = self._held[: len(self._held) - length]
        return length + len(kept) - len(kept.rstrip("\n"))

    def _calls(self, body: str) -> list[Call]:
        """The calls that JSON spells; none where it is anything else."""
        try:
            value = parse(body)
        except ValueError:
            return []
        found = []
        for each in value if isinstance(value, list) else [value]:
            call = self._call(each)
            if call is None:
                return []
            found.append(call)
        return found

    def _call(self, value: Any) -> Call | None:
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if not isinstance(arguments, dict):
            return None
        text = json.dumps(arguments, ensure_ascii=False)
        return Call(f"call_{uuid.uuid4().hex[:24]}", value["name"], text)
