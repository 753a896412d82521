"""Tokens to text while they come: characters spelled in bytes, whole or not shown at all.

A vocabulary spells what it has no token for in bytes, several tokens to a character: byte-level
BPE in the letters of its own alphabet, SentencePiece in tokens such as <0xF0> (byte fallback).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Protocol

_REPLACEMENT = "\ufffd"
# Bytes of a character of which more are to come.
_MOST_PARTS = 3
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Decodes(Protocol):
    """What turns ids into text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""


class StreamDecoder:
    """Decodes tokens one at a time, holding back a character until all its bytes are there.

    The pushed pieces and the flushed rest, joined, are what `decode` gives for all tokens.
    """

    # A few tokens give decoders that look to their left (a leading space, for one) the context
    # they need.
    _keep, _most = 8, 32

    def __init__(self, tokenizer: Decodes) -> None:
        self._tokenizer = tokenizer
        self._recent: list[int] = []
        self._given = 0  # characters of the recent tokens' text already handed out

    def push(self, token: int) -> str:
        """The text that `token` completes, often empty within a multi-byte character."""
        self._recent.append(token)
        text = self._tokenizer.decode(self._recent)
        new = text[self._given : _settled(text)]
        self._given += len(new)
        if len(self._recent) > self._most:
            kept = self._tokenizer.decode(self._recent[-self._keep :])
            # Tokens without text may lie between the bytes of a character.
            if len(kept) > _MOST_PARTS:
                del self._recent[: -self._keep]
                self._given = _settled(kept)
        return new

    def flush(self) -> str:
        """What is still held back; the decoder is then as new."""
        rest = self._tokenizer.decode(self._recent)[self._given :]
        self._recent, self._given = [], 0
        return rest


def characters_apart(tokens: Iterable[str]) -> list[str]:
    """The same tokens, an empty one after each character that is spelled in byte tokens.

    The tokenizers library decodes a run of byte tokens as a whole: one broken byte would destroy
    every character of the run.
    """
    found: list[str] = []
    for spelled, run in groupby(tokens, lambda token: _BYTE.fullmatch(token) is not None):
        if not spelled:
            found += run
            continue
        parts = list(run)
        raw = bytes(int(part[3:5], 16) for part in parts)
        # A byte that belongs to no character becomes half of a surrogate pair.
        for sign in raw.decode("utf-8", "surrogateescape"):
            size = len(sign.encode("utf-8", "surrogateescape"))
            found += [*parts[:size], ""]
            del parts[:size]
    return found


def _settled(text: str) -> int:
    """Characters of `text` that no further token can change: U+FFFD may be half a character."""
    return max(len(text.rstrip(_REPLACEMENT)), len(text) - _MOST_PARTS)
