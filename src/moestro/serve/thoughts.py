"""Thoughts that a reply begins with, set apart by `<think>` and `</think>` in its text."""

from __future__ import annotations

BEGIN, END = "<think>", "</think>"


class Thoughts:
    """Takes a reply apart while it comes: thoughts, and what is said after them."""

    def __init__(self, opened: bool) -> None:
        """Begin a reply.

        Args:
            opened: the prompt has ended with BEGIN already.
        """
        self._held, self._thinking, self._decided = "", opened, opened
        self._bare = opened  # whether lines' ends that come next belong to a mark

    def push(self, text: str) -> tuple[str, str]:
        """Take text; returns (thoughts, said) that are certain."""
        self._held += text
        if not self._decided:
            start = self._held.lstrip()
            if len(start) < len(BEGIN) and BEGIN.startswith(start):
                return "", ""
            self._decided = True
            if start.startswith(BEGIN):
                self._thinking = self._bare = True
                self._held = start.removeprefix(BEGIN)
        if not self._thinking:
            return "", self._take(len(self._held))
        end = self._held.find(END)
        if end < 0:
            return self._take(len(self._held) - _beginning(self._held)), ""
        thoughts = self._take(end)
        self._held = self._held.removeprefix(END)
        self._thinking, self._bare = False, True
        return thoughts, self._take(len(self._held))

    def flush(self) -> tuple[str, str]:
        """What is left at the end."""
        rest = self._take(len(self._held))
        return (rest, "") if self._thinking else ("", rest)

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        if self._bare:
            text = text.lstrip("\n")
            self._bare = not text
        return text


def _beginning(text: str) -> int:
    """Length of the longest end of `text` with which END begins."""
    for length in range(min(len(END) - 1, len(text)), 0, -1):
        if END.startswith(text[-length:]):
            return length
    return 0
