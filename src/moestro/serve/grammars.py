"""Texts that are held to a grammar: compiled beside all else, within limits; llguidance does it."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import llguidance
import torch
from torch import Tensor

from moestro.infer.writing import Constraint
from moestro.serve import errors
from moestro.serve.compiling import compiled, words
from moestro.text import HF_FILE, ByteTokenizer, Tokenizer
from moestro.worker import EndedError, Worker

# What a grammar may take to compile: seconds of processor time, and of waiting on a busy machine.
# Of most schemas it is some milliseconds; 1 s is a prime multipleOf between 100,000 and 200,000.
MOST_SECONDS = 1.0
LONGEST_WAIT_S = 30.0
# Grammars are kept for later requests up to this sum of their seconds, each counted as _LEAST_S or
# more. The memory that one holds grows with them, by some 35 MB for a second.
MOST_KEPT_S = 4.0
_LEAST_S = 0.02
_START = "from moestro.serve.compiling import serve; serve()"
# The bits of every byte, the lowest first, packed into one number so that a look-up copies it.
_BITS = (
    (torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu") & 1)
    .to(torch.uint8).view(torch.float64)[:, 0]
)  # fmt: skip


class Grammars:
    """Makes constraints for one tokenizer, which llguidance reads when one is first asked for.

    Some short schemas would take hours and all memory to compile, and nothing stops llguidance
    once it has begun. So each is first compiled in a process that is ended when it takes too long.
    Those used last are kept: clients send the same schema again and again.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(1, "moestro-grammars")
        self._words: llguidance.LLTokenizer | None = None
        self._worker: Worker | None = None
        self._kept: dict[str, _Compiled] = {}  # the one used last is last
        self._closed = False

    async def make(self, grammar: str, param: str) -> Callable[[], Constraint]:
        """`constraint`, one after the other in a thread of their own, so that all else goes on.

        One that is kept waits for no other.
        """
        if self._closed:
            raise errors.closing()
        found = self._kept.get(grammar)
        if found is None:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._pool, self._compile, grammar, param)
        self._keep(grammar, found)
        return found.new

    def _keep(self, grammar: str, found: _Compiled) -> None:
        self._kept.pop(grammar, None)  # so that it comes last
        self._kept[grammar] = found
        total_s = sum(each.seconds for each in self._kept.values())
        while total_s > MOST_KEPT_S:
            oldest = next(iter(self._kept))
            total_s -= self._kept.pop(oldest).seconds

    def constraint(self, grammar: str, param: str) -> Callable[[], Constraint]:
        """Makes a constraint for each text that a grammar describes; for one thread at a time.

        Args:
            grammar: in llguidance's form of Lark.
            param: the field that it comes from.

        Raises:
            ApiError: it holds what llguidance does not know, and says what; or takes too long.
        """
        return self._compile(grammar, param).new

    def _compile(self, grammar: str, param: str) -> _Compiled:
        if self._words is None:
            text, ends = _file_of(self._tokenizer)
            self._words = words(text, ends)
        self._try(grammar, param)
        began = time.thread_time()
        matcher = compiled(self._words, grammar)
        wrong = [matcher.get_error()] if matcher.is_error() else matcher.get_grammar_warnings()
        if wrong:
            raise errors.refused(f"{param} cannot be kept to: {_reason(wrong[0])}", param)
        try:
            _Matched(matcher.deep_copy()).allowed()
        except errors.GrammarError as error:
            raise errors.refused(f"{param} cannot be kept to: {error}", param) from None
        return _Compiled(matcher, max(_LEAST_S, time.thread_time() - began))

    def close(self) -> None:
        """End what is being compiled; that, and what waits for it, is told so."""
        self._closed = True
        self._pool.shutdown(wait=False)
        if self._worker is not None:
            self._worker.close()

    def _try(self, grammar: str, param: str) -> None:
        """Compile it where it does no harm."""
        if self._closed:
            raise errors.closing()
        try:
            if self._worker is None or not self._worker.is_ready():
                self._worker = Worker(_START, ("moestro", "llguidance"))
                self._ask(_file_of(self._tokenizer))
            self._ask((grammar, MOST_SECONDS))
        except EndedError as error:
            if self._closed:
                raise errors.closing() from None
            reason = {
                None: f"compiling it takes longer than {LONGEST_WAIT_S:g} s",
                -signal.SIGPROF: f"compiling it takes more than {MOST_SECONDS:g} s of processor "
                "time; usual causes are a large multipleOf, hundreds of patternProperties, and "
                "patterns under allOf: make them smaller or fewer",
            }.get(error.code, "llguidance fails to compile it; make it smaller or less deep")
            raise errors.refused(f"{param} cannot be kept to: {reason}", param) from None

    def _ask(self, request: tuple[object, object]) -> None:
        assert self._worker is not None
        self._worker.ask(json.dumps(request).encode() + b"\n", LONGEST_WAIT_S, 99)


def _file_of(tokenizer: Tokenizer) -> tuple[str | None, list[int]]:
    """A tokenizer's file, None for bytes, and the tokens that end a text, the usual one first."""
    ends = sorted(tokenizer.ends, key=lambda end: end != tokenizer.end_of_text)
    if isinstance(tokenizer, ByteTokenizer):
        return None, ends
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        return (Path(folder) / HF_FILE).read_text(encoding="utf-8"), ends


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


class _Compiled(NamedTuple):
    """A grammar, and the seconds of processor time that it counts for."""

    matcher: llguidance.LLMatcher
    seconds: float

    def new(self) -> Constraint:
        """For one more text."""
        return _Matched(self.matcher.deep_copy())


def _reason(text: str) -> str:
    """What llguidance says, without the grammar and the place in it."""
    said = re.split(r"\n\s*1 \| ", text)[0].rpartition("compile JSON schema:")[2]
    return " ".join(said.split())[:400]
