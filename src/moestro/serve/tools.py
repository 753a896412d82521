"""Calls of tools: the forms in which models write them, in one table, and how each is read."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moestro.serve import errors
from moestro.serve.constraints import json_of, of_calls, quoted
from moestro.serve.schema import ChatRequest, ChosenTool
from moestro.strictjson import parse

Schemas = Mapping[str, Mapping[str, Any]]  # of each function's arguments
Said = list[tuple[str, Any]]  # names, and arguments


class Form(NamedTuple):
    """How calls are written: `begin`, a call, `end`.

    Attributes:
        begin: what calls begin with; empty where they fill the reply, or have a channel.
        end: what they end with.
        call: what a function's arguments stand between; None: a call cannot be held to.
        read: the calls that stand between the marks; None where it is anything else.
        value: what one argument stands between, where each is written by itself; None: JSON.
        between: what parts calls that share their marks; None: each has its own.
        shut: whether a call without `end` may lack arguments.
    """

    begin: str
    end: str
    call: Callable[[str], tuple[str, str]] | None
    read: Callable[[str, Schemas], Said | None]
    value: tuple[str, str] | None = None
    between: str | None = None
    shut: bool = False

    @property
    def text(self) -> str:
        """All that is written around arguments."""
        call = ("", "") if self.call is None else self.call("")
        return "".join((self.begin, self.end, *call, *(self.value or ())))


class Call(NamedTuple):
    """A function that a model calls; the arguments are JSON."""

    id: str
    name: str
    arguments: str


def _object(key: str) -> Callable[[str], tuple[str, str]]:
    return lambda name: (f'{{"name": {json.dumps(name)}, "{key}": ', "}")


def _read_json(body: str, _: Schemas) -> Said | None:
    """{"name": …, "arguments": {…}}, or a list of such."""
    try:
        value = parse(body)
    except ValueError:
        return None
    found: Said = []
    for each in value if isinstance(value, list) else [value]:
        if not isinstance(each, dict) or not isinstance(each.get("name"), str):
            return None
        found.append((each["name"], each.get("arguments", each.get("parameters", {}))))
    return found


# An end mark ends a part only where the next part, or nothing, follows: texts may hold such marks.
_FUNCTION = re.compile(
    r"\s*<function=([^>\n]+)>(.*?)</function>(?=\s*(?:<function=|\Z))", re.DOTALL
)
_PARAMETER = re.compile(
    r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>(?=\s*(?:<parameter=|\Z))", re.DOTALL
)
_ARGUMENT = re.compile(
    r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>(?=\s*(?:<arg_key>|\Z))", re.DOTALL
)
_DEEPSEEK = re.compile(
    r"\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>([^\n]+)\n```json\n(.*?)\n```|"
    r"([^\n]+?)<｜tool▁sep｜>(.*?))<｜tool▁call▁end｜>(?=\s*(?:<｜tool▁call▁begin｜>|\Z))",
    re.DOTALL,
)


def _read_functions(body: str, schemas: Schemas) -> Said | None:
    """<function=…> with a <parameter=…> for each argument."""
    found: Said = []
    for name, inner in _each(_FUNCTION, body) or ():
        pairs = _each(_PARAMETER, inner)
        if pairs is None:
            return None
        found.append((name, _values(pairs, schemas.get(name, {}))))
    return found or None


def _read_keys(body: str, schemas: Schemas) -> Said | None:
    """A name, and <arg_key> and <arg_value> for each argument."""
    start, mark, rest = body.partition("<arg_key>")
    name, pairs = start.strip(), _each(_ARGUMENT, mark + rest)
    return None if pairs is None else [(name, _values(pairs, schemas.get(name, {})))]


def _read_deepseek(body: str, _: Schemas) -> Said | None:
    """Names and JSON between marks of their own, with ```json in V3 and without from V3.1 on."""
    try:
        return [
            (old or new, parse(old_json or new_json))
            for old, old_json, new, new_json in _each(_DEEPSEEK, body) or ()
        ] or None
    except ValueError:
        return None


def _read_arguments(body: str, _: Schemas) -> Said | None:
    """What a message to functions.NAME says, NAME in its first line."""
    name, _end, rest = body.partition("\n")
    try:
        return [(name, parse(rest))]
    except ValueError:
        return None


def _each(pattern: re.Pattern[str], text: str) -> list[tuple[str, ...]] | None:
    """What is found one after the other; None if there is more."""
    found, at = [], 0
    while (match := pattern.match(text, at)) is not None:
        found.append(match.groups())
        at = match.end()
    return None if text[at:].strip() else found


def _values(pairs: list[tuple[str, ...]], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that are written as they are: strings plain, and everything else as JSON."""
    known = _properties(schema)
    return {name: _value(text, known.get(name)) for name, text in pairs}


def _value(text: str, schema: Any) -> Any:
    if isinstance(schema, dict) and (schema.get("type") == "string" or text in _choices(schema)):
        return text
    try:
        return parse(text)
    except ValueError:
        return text


def _properties(schema: Mapping[str, Any]) -> dict[str, Any]:
    known = schema.get("properties")
    return known if isinstance(known, dict) else {}


def _choices(schema: Mapping[str, Any]) -> list[Any]:
    choices = schema.get("enum")
    return choices if isinstance(choices, list) else []


HERMES = Form("<tool_call>\n", "\n</tool_call>", _object("arguments"), _read_json)
BARE = Form("", "", _object("arguments"), _read_json)
LLAMA = Form("", "", _object("parameters"), _read_json)
QWEN_CODER = Form(
    "<tool_call>\n", "\n</tool_call>", lambda name: (f"<function={name}>\n", "</function>"),
    _read_functions, ("<parameter={}>\n", "\n</parameter>\n"),
)  # fmt: skip
GLM = Form(
    "<tool_call>", "</tool_call>", lambda name: (f"{name}\n", ""), _read_keys,
    ("<arg_key>{}</arg_key>\n<arg_value>", "</arg_value>\n"), shut=True,
)  # fmt: skip
DEEPSEEK = Form(
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
    lambda name: (
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n", "\n```<｜tool▁call▁end｜>"
    ),
    _read_deepseek, between="\n",
)  # fmt: skip
DEEPSEEK_31 = DEEPSEEK._replace(
    call=lambda name: (f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    between="",
)
HARMONY = Form("", "", None, _read_arguments)  # gpt-oss: see `moestro.infer.channels`

# Marks by which a template tells its form, the first that all stand in it.
FORMS: tuple[tuple[tuple[str, ...], Form], ...] = (
    (("<|channel|>",), HARMONY),
    (("<｜tool▁call▁begin｜>", "```json"), DEEPSEEK),
    (("<｜tool▁call▁begin｜>",), DEEPSEEK_31),
    (("<function=",), QWEN_CODER),
    (("<arg_key>",), GLM),
    (("<tool_call>",), HERMES),
    (('"parameters": dictionary',), LLAMA),
    ((), BARE),
)


def form_of(source: str) -> Form:
    """The form of a template's calls.

    Raises:
        ApiError: it knows no tools.
    """
    if "tools" not in source:
        raise errors.refused("this model's chat template knows no tools; leave them out", "tools")
    return next(form for marks, form in FORMS if all(mark in source for mark in marks))


def grammar(
    wanted: ChatRequest, form: Form, *, thinking: str, otherwise: str | None = None
) -> str | None:
    """What a reply with tools is held to; None where tools hold it to nothing.

    Args:
        wanted: the request.
        form: of its calls.
        otherwise: the grammar of a reply without calls; None: any text.
        thinking: see `of_calls`.

    Raises:
        ApiError: there is no such tool, or a call cannot be forced, or not told from other replies.
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
    if must and form.call is None:
        raise errors.refused(
            "this model writes calls into a channel of their own, which cannot be forced; "
            "tool_choice may be auto or none",
            "tool_choice",
        )
    if not functions or form.call is None:
        return None
    if not (must or form.begin):
        if otherwise is not None:
            raise errors.refused(
                "this model writes calls as JSON without marks, which cannot be told from the JSON "
                "of a response_format; leave it or the tools out, or set tool_choice to required",
                "response_format",
            )
        return None
    bodies = [_body(form, name, each.parameters or {}) for name, each in functions.items()]
    return of_calls(
        bodies, form.begin, form.end, between=form.between,
        value_end=form.value[1] if form.value is not None else None, must=must,
        several=wanted.several_calls, otherwise=None if must else otherwise, thinking=thinking,
    )  # fmt: skip


def _body(form: Form, name: str, schema: Mapping[str, Any]) -> str:
    """The grammar of one function's call."""
    assert form.call is not None
    before, after = (quoted(text) if text else "" for text in form.call(name))
    if form.value is None:
        return f"{before} {json_of(schema or {'type': 'object'})} {after}"
    parts, required = [], schema.get("required", ())
    for key, own in _properties(schema).items():
        begin, end = (quoted(text.format(key)) for text in form.value)
        own, choices = own if isinstance(own, dict) else {}, _choices(own)
        if choices and all(isinstance(each, str) for each in choices):
            value = f"({' | '.join(map(quoted, choices))}) {end}"
        elif own.get("type") == "string":
            value = "plain"
        else:
            shared = {part: schema[part] for part in ("$defs", "definitions") if part in schema}
            value = f"{json_of({**shared, **own})} {end}"
        parts.append(f"({begin} {value}){'' if key in required else '?'}")
    return " ".join((before, *parts, after))


class Reader:
    """Takes a reply apart while it comes: text for the user, and calls."""

    def __init__(self, form: Form, schemas: Schemas, *, several: bool = True) -> None:
        """Begin a reply.

        Args:
            form: of its calls.
            schemas: of the functions' arguments, by name.
            several: tell more than the first call.
        """
        self._form, self._schemas = form, schemas
        self._left: int | None = None if several else 1  # calls that may still be told
        self._begin, self._end = form.begin.strip(), form.end.strip()
        self._held, self._said = "", False
        self._tried = 0  # of what follows a call's mark, how much holds no end of it
        self._to, self._sent = "", ""  # the function that a message is for, and what it says

    def push(self, text: str, to: str = "") -> tuple[str, list[Call]]:
        """Take text; returns what is certain to be for the user, and calls that are whole.

        Args:
            text: what comes next.
            to: the function that it is said to, where the form has a channel for it.
        """
        before = self._delivered() if to != self._to else ("", [])
        self._to = to
        if to:
            self._sent += text
            return before
        said, calls = self._own(text)
        return before[0] + said, before[1] + self._first(calls)

    def _delivered(self) -> tuple[str, list[Call]]:
        """The call that a message makes."""
        sent, self._sent = self._sent, ""
        found = self._calls(f"{self._to}\n{sent}") if self._to else []
        return ("", self._first(found)) if found else (sent, [])

    def _own(self, text: str) -> tuple[str, list[Call]]:
        self._held += text
        if not self._begin:
            bare = self._form.call is not None
            if bare and not self._said and self._held.lstrip()[:1] in ("", "{", "["):
                return "", []
            self._said = True
            return self._take(len(self._held)), []
        return self._marked()

    def _marked(self, *, last: bool = False) -> tuple[str, list[Call]]:
        """What is certain of what is held; at the end of the reply, all of it."""
        said, calls = "", list[Call]()
        while (start := self._held.find(self._begin)) >= 0:
            found, stop = self._call_at(start, last=last)
            if not found and not last:
                return said + self._take(len(self._held[:start].rstrip("\n"))), calls
            before, body = self._take(start), self._take(stop - start)
            said += before.rstrip("\n") if found else before + body
            calls += found
            self._tried = 0
        kept = 0 if last else self._beginning()
        return said + self._take(len(self._held) - kept), calls

    def _call_at(self, start: int, *, last: bool) -> tuple[list[Call], int]:
        """The calls that begin at a place, and where they end; an argument may hold end marks."""
        inner = start + len(self._begin)
        stop = self._held.find(self._end, inner + self._tried)
        while stop >= 0:
            if found := self._calls(self._held[inner:stop]):
                return found, stop + len(self._end)
            self._tried = stop + 1 - inner
            stop = self._held.find(self._end, stop + 1)
        if last and not self._form.shut and (found := self._calls(self._held[inner:])):
            return found, len(self._held)
        first = self._held.find(self._end, inner)
        return [], inner if first < 0 else first + len(self._end)

    def flush(self) -> tuple[str, list[Call]]:
        """What is left at the end."""
        if self._to:
            return self._delivered()
        if self._begin:
            said, calls = self._marked(last=True)
            return said, self._first(calls)
        rest = self._take(len(self._held))
        found = [] if self._said else self._calls(rest)
        return ("", self._first(found)) if found else (rest, [])

    def _first(self, calls: list[Call]) -> list[Call]:
        """Those that are told."""
        if self._left is not None:
            calls = calls[: self._left]
            self._left -= len(calls)
        return calls

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
        """The calls that a text spells; none where it is anything else."""
        found = []
        for name, arguments in self._form.read(body, self._schemas) or ():
            if name not in self._schemas or not isinstance(arguments, dict):
                return []
            text = json.dumps(arguments, ensure_ascii=False)
            found.append(Call(f"call_{uuid.uuid4().hex[:24]}", name, text))
        return found
