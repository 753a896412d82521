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


class Channels:
    """Says which channel a text is in.

    Attributes:
        current: The channel after the tokens so far.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int] = ()) -> None:
        """Begin after a prompt."""
        self.current = FINAL
        self._tokenizer = tokenizer
        marks = tokenizer.specials if _MESSAGE in tokenizer.specials.values() else {}
        self._marks = marks
        self._name: str | None = None  # what `<|channel|>` was followed by in this header
        if marks:
            for token in prompt:
                self.push(token)

    def push(self, token: int) -> None:
        """Take the next token."""
        mark = self._marks.get(token)
        if mark == _CHANNEL:
            self.current, self._name = HEADER, ""
        elif mark in _BORDERS:
            self.current, self._name = HEADER, None
        elif mark == _MESSAGE:
            # After the name may come whom the message is to, and its form.
            self.current, self._name = [*(self._name or "").split(), FINAL][0], None
        elif self.current == HEADER and self._name is not None:
            self._name += self._tokenizer.decode([token]) or " "
