"""Compiles grammars; also the process in which grammars.py tries them, one a line.

Imports nothing else of the project, so that the process starts fast and small.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence

import llguidance


def serve() -> None:
    """Compile what comes until there is no more; the first line has what `words` takes.

    A request is a grammar and its limit in seconds of processor time, after which the system ends
    this process. An answer is an empty line: what is wrong with a grammar is found out once more
    where it is used.
    """
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    tokens = words(*json.loads(sys.stdin.buffer.readline()))
    _answer()
    for line in sys.stdin.buffer:
        grammar, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        compiled(tokens, grammar).compute_bitmask()
        signal.setitimer(signal.ITIMER_PROF, 0)
        _answer()


def _answer() -> None:
    sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()


def words(text: str | None, ends: Sequence[int]) -> llguidance.LLTokenizer:
    """A tokenizer's tokens.

    Args:
        text: of its tokenizer.json; None: its tokens are bytes.
        ends: the tokens that end a text, the usual one first.
    """
    if text is None:
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Bytes(ends[0])), eos_token=list(ends)
        )
    return llguidance.LLTokenizer(text, eos_token=list(ends))


def compiled(tokens: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """What follows a grammar; its errors hold nothing of a text, which is for no log."""
    limits = llguidance.LLParserLimits(verbose_errors=False)
    return llguidance.LLMatcher(tokens, grammar, log_level=0, limits=limits)


class _Bytes:
    """A tokenizer of bytes, as llguidance asks for one."""

    bos_token_id = None
    tokens = tuple(bytes([number]) for number in range(256))

    def __init__(self, end: int) -> None:
        self.eos_token_id, self.special_token_ids = end, (end,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)
