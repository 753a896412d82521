"""Tokens as text for a reader: characters whole, what cannot be seen made visible.

The text of documents is hostile input. Here it loses what could disturb the text around it; that
it cannot become markup is the matter of whoever writes it into a page.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moestro.streaming import StreamDecoder
from moestro.text import Tokenizer

_REPLACEMENT = "\ufffd"
_LONGEST = 48  # characters of one token
_LOOKED_AT = 12  # occurrences of a part of a character that are looked at for the whole
# Joiners and variation selectors shape letters and emoji; other invisible signs are replaced.
_ALLOWED = frozenset("\n\t\u200c\u200d\ufe0e\ufe0f")


class TokenText:
    """The text of a vocabulary's tokens, alone and one after another."""

    def __init__(self, tokenizer: Tokenizer, tokens_T: NDArray[np.int32]) -> None:
        """Take the tokenizer, and text in which to look up what parts of characters belong to."""
        self._tokenizer = tokenizer
        self._tokens_T = tokens_T
        self._names: dict[int, str] = {}
        # Text begins with a space that some decoders take off, but no token here begins a text.
        self._before = tokenizer.encode("a")

    def passage(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token where it stands.

        A character made of several tokens is the text of the last of them, the others are empty;
        so is nothing else, since a special token has a name.
        """
        stream, pieces = StreamDecoder(self._tokenizer), []
        for token in self._before:
            stream.push(token)
        for token in tokens:
            piece = stream.push(token)
            pieces.append(visible(piece) or self._special(token))
        # Half a character where the passage is cut shows as such.
        if rest := stream.flush():
            pieces[-1] += visible(rest)
        return pieces

    def name(self, token: int) -> str:
        """What to call a token that stands alone.

        Part of a character is named by the characters that it was part of in the text.
        """
        if token not in self._names:
            text = self._alone(token)
            if not text:
                self._names[token] = self._special(token) or f"⟨token {token}⟩"
            elif _REPLACEMENT in text:
                lead = text[: text.index(_REPLACEMENT)]
                whole = "".join(self._wholes(token, len(lead)))
                part = f"⟨part of {whole}⟩" if whole else f"⟨token {token}⟩"
                self._names[token] = visible(lead) + part
            else:
                self._names[token] = visible(text)
        return self._names[token]

    def _alone(self, token: int) -> str:
        """The text of one token within a text."""
        before = len(self._tokenizer.decode(self._before))
        return self._tokenizer.decode([*self._before, token])[before:]

    def _special(self, token: int) -> str:
        """The name of a token that has no text; empty for part of a character."""
        text = self._alone(token)
        if token in self._tokenizer.ends and not text.strip("\0"):
            return "⟨end of text⟩"
        return "" if text else f"⟨token {token}⟩"

    def _wholes(self, token: int, lead: int) -> list[str]:
        """The characters, most frequent first, that a token is part of after `lead` whole ones."""
        found: dict[str, int] = {}
        for place in np.flatnonzero(self._tokens_T == token)[:_LOOKED_AT].tolist():
            for back in range(4):
                first = max(0, place - back)
                before = self._tokens_T[first:place].tolist()
                text = self._tokenizer.decode(self._tokens_T[first : place + 4].tolist())
                known = len(self._tokenizer.decode(before).rstrip(_REPLACEMENT)) + lead
                whole = text[known : known + 1]
                if whole and whole != _REPLACEMENT:
                    found[whole] = found.get(whole, 0) + 1
                    break
        order = sorted(found, key=lambda whole: -found[whole])
        return [visible(whole) for whole in order[:3]]


def visible(text: str, longest: int = _LONGEST) -> str:
    """Text without signs that are invisible or change the direction of what follows."""
    if len(text) > longest:
        text = text[:longest] + "…"
    return "".join(map(_shown, text))


def _shown(sign: str) -> str:
    """One character as it is shown."""
    if sign in _ALLOWED:
        return sign
    if sign < " ":
        return chr(0x2400 + ord(sign))
    category = unicodedata.category(sign)
    if category == "Zs" and sign != " ":
        return "␣"
    if category in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
        return "␦" if category != "Cf" else "▫"
    return sign
