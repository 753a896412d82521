"""The channels of a reply: its parts that special tokens set apart, as gpt-oss writes them.

A reply is one message or several, `<|start|>role<|channel|>name<|message|>text<|end|>`: thoughts
in the channel analysis, calls of tools in commentary, the answer in final (OpenAI's harmony
format). Without such tokens all of a reply is its final channel.
"""

from __future__ import annotations

from collections.abc import Iterable

from moestro.text import Tokenizer

FINAL = "final"
# Of the marks themselves, and of roles and names between them.
HEADER = ""
_CHANNEL, _MESSAGE = "<|channel|>", "<|message|>"
_BORDERS = frozenset({"<|start|>", "<|end|>", "<|call|>", "<|return|>"})
_FUNCTIONS = " to=functions."


class Channels:
    """Says which channel a text is in.

    Attributes:
        current: The channel after the tokens so far; of a message that calls a tool, with whom it
            is to: `commentary to=functions.name`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int] = ()) -> None:
        """Begin after a prompt."""
        self.current = FINAL
        self._tokenizer = tokenizer
        marks = tokenizer.specials if _MESSAGE in tokenizer.specials.values() else {}
        self._marks = marks
        self._header = ""
        if marks:
            for token in prompt:
                self.push(token)

    def push(self, token: int) -> None:
        """Take the next token."""
        mark = self._marks.get(token)
        if mark in _BORDERS:
            self.current, self._header = HEADER, ""
        elif mark == _CHANNEL:
            self.current, self._header = HEADER, f"{self._header} {_CHANNEL} "
        elif mark == _MESSAGE:
            self.current, self._header = _named(self._header), ""
        elif self.current == HEADER:
            self._header += self._tokenizer.decode([token]) or " "


def function_of(channel: str) -> str:
    """The function that a message in a channel calls; empty where it calls none."""
    return channel.partition(_FUNCTIONS)[2]


def _named(header: str) -> str:
    """The channel of `role to=whom <|channel|> name to=whom form`, where all may be missing."""
    name = [*header.partition(_CHANNEL)[2].split(), FINAL][0]
    to = next((f" {word}" for word in header.split() if word.startswith("to=")), "")
    return name + to
