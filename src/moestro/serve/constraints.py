"""Texts that are held to a grammar: JSON of a schema, calls of tools; llguidance does the work."""

from __future__ import annotations

import json
import re
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import llguidance
import torch
from torch import Tensor

from moestro.infer.writing import Constraint
from moestro.serve import errors
from moestro.text import HF_FILE, ByteTokenizer, Tokenizer

# Some space between JSON's parts, as models write it, but not without end.
_SPACE = {"whitespace_pattern": r"[\x20\x0A]{1,16}"}
# The bits of every byte, the lowest first, packed into one number so that a look-up copies it.
_BITS = (
    (torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu") & 1)
    .to(torch.uint8).view(torch.float64)[:, 0]
)  # fmt: skip
_ANYTHING = "/(.|\\n)*/"


class Grammars:
    """Makes constraints for one tokenizer, which llguidance reads when one is first asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._lock = tokenizer, threading.Lock()
        self._words: llguidance.LLTokenizer | None = None

    def constraint(self, grammar: str, param: str) -> Callable[[], Constraint]:
        """Makes a constraint for each text that a grammar describes.

        Args:
            grammar: in llguidance's form of Lark.
            param: the field that it comes from.

        Raises:
            ApiError: it holds what llguidance does not know; says what.
        """
        words = self._read()
        # Else its errors have the text and the grammar in them, and they are for no log.
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = llguidance.LLMatcher(words, grammar, log_level=0, limits=limits)
        wrong = [matcher.get_error()] if matcher.is_error() else matcher.get_grammar_warnings()
        if wrong:
            raise errors.refused(f"{param} cannot be kept to: {_reason(wrong[0])}", param)
        try:
            _Matched(matcher.deep_copy()).allowed()
        except errors.GrammarError as error:
            raise errors.refused(f"{param} cannot be kept to: {error}", param) from None
        return lambda: _Matched(matcher.deep_copy())

    def _read(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._words is None:
                self._words = _words(self._tokenizer)
            return self._words


def _words(tokenizer: Tokenizer) -> llguidance.LLTokenizer:
    ends = sorted(tokenizer.ends, key=lambda end: end != tokenizer.end_of_text)
    if isinstance(tokenizer, ByteTokenizer):
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()), eos_token=ends)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        text = (Path(folder) / HF_FILE).read_text(encoding="utf-8")
    return llguidance.LLTokenizer(text, eos_token=ends)


class _Bytes:
    """The byte tokenizer, as llguidance asks for one."""

    eos_token_id = ByteTokenizer.end_of_text
    bos_token_id = None
    special_token_ids = (ByteTokenizer.end_of_text,)
    tokens = tuple(bytes([number]) for number in range(256))

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


class _Matched:
    """A `Constraint` that llguidance follows."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self) -> Tensor:
        bytes_N = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._check()
        return _BITS.index_select(0, bytes_N.int()).view(torch.bool)

    def push(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise errors.GrammarError(
                "the text cannot go on: its schema refers to itself without end, or allows more "
                "at this place than can be followed; make the schema smaller"
            )


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
        thinking: as for `of_json`.
    """
    body = "(" + " | ".join(bodies) + ")"
    if several and between is not None:
        body += f" ({quoted(between) if between else ''} {body})*"
    body += f" {quoted(end)}" if end else ""
    rules = f"plain[lazy]: TEXT {quoted(value_end)}\n" if value_end is not None else ""
    if must:
        call = f"{quoted(begin)} {body}" if begin else body
        more = f' ("\\n" {call})*' if several and begin and between is None else ""
        start = _after_thoughts(f"{call}{more}", thinking)
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


def _reason(text: str) -> str:
    """What llguidance says, without the grammar and the place in it."""
    said = re.split(r"\n\s*1 \| ", text)[0].rpartition("compile JSON schema:")[2]
    return " ".join(said.split())[:400]
