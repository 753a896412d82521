"""Thoughts that a reply begins with, set apart by marks in its text."""

from __future__ import annotations

# What thoughts stand between; a model's template has the second of them in it.
MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
)


def marks_of(source: str) -> tuple[str, str] | None:
    """The marks that a template knows; None: it knows of no thoughts."""
    return next((marks for marks in MARKS if marks[1] in source), None)


class Thoughts:
    """Takes a reply apart while it comes: thoughts, and what is said after them."""

    def __init__(self, opened: bool, marks: tuple[str, str] = MARKS[0]) -> None:
        """Begin a reply.

        Args:
            opened: the prompt has ended with the first mark already.
            marks: what they stand between.
        """
        self._begin, self._end = marks
        self._held, self._thinking, self._decided = "", opened, opened
        self._bare = opened  # whether lines' ends that come next belong to a mark

    def push(self, text: str) -> tuple[str, str]:
        """Take text; returns (thoughts, said) that are certain."""
        self._held += text
        if not self._decided:
            start = self._held.lstrip()
            if len(start) < len(self._begin) and self._begin.startswith(start):
                return "", ""
            self._decided = True
            if start.startswith(self._begin):
                self._thinking = self._bare = True
                self._held = start.removeprefix(self._begin)
        if not self._thinking:
            return "", self._take(len(self._held))
        end = self._held.find(self._end)
        if end < 0:
            return self._take(len(self._held) - self._ending()), ""
        thoughts = self._take(end)
        self._held = self._held.removeprefix(self._end)
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

    def _ending(self) -> int:
        """How much of what is held may be the beginning of the mark that ends thoughts."""
        for length in range(min(len(self._end) - 1, len(self._held)), 0, -1):
            if self._end.startswith(self._held[-length:]):
                return length
        return 0
