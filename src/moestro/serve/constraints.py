"""Grammars of replies, in llguidance's form of Lark: JSON of a schema, calls of tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

# Some space between JSON's parts, as models write it, but not without end.
_SPACE = {"whitespace_pattern": r"[\x20\x0A]{1,16}"}
_ANYTHING = "/(.|\\n)*/"


def of_json(schema: Mapping[str, Any], *, thinking: str = "") -> str:
    """The grammar of JSON that a schema describes.

    Args:
        schema: of JSON.
        thinking: what ends the thoughts that the text begins with; empty where there are none.
    """
    return f"%llguidance {{}}\nstart: {_after_thoughts(json_of(schema), thinking)}"


def of_calls(
    bodies: Sequence[str],
    begin: str,
    end: str,
    *,
    between: str | None,
    value_end: str | None,
    must: bool,
    several: bool,
    otherwise: str | None = None,
    thinking: str = "",
) -> str:
    """The grammar of a reply with calls of functions.

    Args:
        bodies: the grammar of a call of each function; `plain` in it is any text up to `value_end`.
        begin: what calls begin with; the trigger of one in the middle of text.
        end: what they end with.
        between: what parts calls that share their marks; None: each has its own.
        value_end: see `bodies`.
        must: the reply is a call; else it may be text, with calls in it.
        several: more than one call may come; else the reply ends with the first.
        otherwise: the grammar of a reply without calls, which has no text beside them then; None:
            any text.
        thinking: as for `of_json`.
    """
    body = "(" + " | ".join(bodies) + ")"
    if several and between is not None:
        body += f" ({quoted(between) if between else ''} {body})*"
    body += f" {quoted(end)}" if end else ""
    rules = f"plain[lazy]: TEXT {quoted(value_end)}\n" if value_end is not None else ""
    if must or otherwise is not None:
        call = f"{quoted(begin)} {body}" if begin else body
        more = f' ("\\n" {call})*' if several and begin and between is None else ""
        choices = call + more if otherwise is None else f"({call}{more} | {otherwise})"
        start = _after_thoughts(choices, thinking)
        text = "" if thinking or not rules else f"TEXT: {_ANYTHING}\n"
        return f"%llguidance {{}}\nstart: {start}{rules}{text}"
    mark, rest = begin.rstrip(), begin[len(begin.rstrip()) :]
    inner = f"{quoted(rest)} {body}" if rest else body
    # Text that follows a call would take further marks; `call*` meets each of them first.
    return (
        f"%llguidance {{}}\nstart: {'call* TEXT' if several else 'call | TEXT'}\n"
        f"call: opening {inner}\nopening[lazy]: TEXT {quoted(mark)}\n{rules}TEXT: {_ANYTHING}\n"
    )


def _after_thoughts(body: str, end: str) -> str:
    """The rules of a reply, from behind `start:` on."""
    if not end:
        return f"{body}\n"
    return (
        f"thoughts BREAK? {body}\nBREAK: /\\n{{1,4}}/\n"
        f"thoughts[lazy]: TEXT {quoted(end)}\nTEXT: {_ANYTHING}\n"
    )


def json_of(schema: Mapping[str, Any]) -> str:
    """The grammar of JSON, as a part of another."""
    return "%json " + json.dumps({**schema, "x-guidance": _SPACE})


def quoted(text: str) -> str:
    """The grammar of a text as it is."""
    return json.dumps(text)
