"""One text of an answer as it comes: what of it is said to the user, and what is counted."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

from moestro.infer.channels import FINAL, HEADER, function_of
from moestro.infer.writing import Finish, Piece
from moestro.serve.engine import Job
from moestro.serve.thoughts import Thoughts
from moestro.serve.tools import Call, Reader

FinishReason = Literal["stop", "length", "tool_calls"]
_REASONS: Mapping[Finish, FinishReason] = {
    "stop": "stop", "end_of_text": "stop", "length": "length",
}  # fmt: skip


class Delta(NamedTuple):
    """What a piece adds to a reply: text for the user, thoughts, calls of tools."""

    content: str = ""
    reasoning: str = ""
    calls: Sequence[Call] = ()


class Reply:
    """A text from its pieces.

    Attributes:
        content: What is said to the user.
        reasoning: What the model thought aloud.
        reasoned: How many tokens gave thoughts; those without text of their own, such as a
            character's first bytes, go with what comes next.
        calls: The tools that it calls.
        pieces: It as it came, the token that ends it included.
        finish: Why it ended; None before.
        stop: The stop string that it ended before.
    """

    def __init__(self, thoughts: Thoughts | None = None, reader: Reader | None = None) -> None:
        """Begin a reply.

        Args:
            thoughts: sets thoughts apart; None: the text has none.
            reader: finds calls; None: the text has none.
        """
        self.content, self.reasoning, self.reasoned = "", "", 0
        self.pieces: list[Piece] = []
        self.calls: list[Call] = []
        self.finish: FinishReason | None = None
        self.stop: str | None = None
        self._thoughts, self._reader = thoughts, reader
        self._deltas: list[Delta] = []
        self._silent = 0  # the last tokens that gave nothing so far

    @property
    def tokens(self) -> int:
        """How many it has."""
        return len(self.pieces)

    @property
    def parts(self) -> list[Delta]:
        """What it has in the order in which it came, each part thoughts, text or one call."""
        found = []
        for kind, run in groupby(self._in_order(), key=lambda each: each[0]):
            values = [value for _, value in run]
            if kind == "reasoning":
                found.append(Delta(reasoning="".join(values)))
            elif kind == "content":
                found.append(Delta("".join(values)))
            else:
                found += [Delta(calls=[call]) for call in values]
        return found

    def _in_order(self) -> Iterator[tuple[str, Any]]:
        """All that was added, each with its field."""
        for delta in self._deltas:
            if delta.reasoning:
                yield "reasoning", delta.reasoning
            if delta.content:
                yield "content", delta.content
            for call in delta.calls:
                yield "calls", call

    def push(self, piece: Piece) -> Delta:
        """Take the next piece."""
        self.pieces.append(piece)
        thought, said, calls = "", piece.text, list[Call]()
        to = function_of(piece.channel) if self._reader is not None else ""
        if not to and piece.channel != FINAL:
            thought, said = piece.text if piece.channel != HEADER else "", ""
        elif not to and self._thoughts is not None:
            thought, said = self._thoughts.push(piece.text)
        if piece.finish is not None and self._thoughts is not None:
            last = self._thoughts.flush()
            thought, said = thought + last[0], said + last[1]
        if self._reader is not None:
            said, calls = self._reader.push(said, to)
            if piece.finish is not None:
                rest, more = self._reader.flush()
                said, calls = said + rest, calls + more
        self.content, self.reasoning = self.content + said, self.reasoning + thought
        self.calls += calls
        if piece.finish is not None:
            self.finish, self.stop = _REASONS[piece.finish], piece.stop
            if self.calls and self.finish == "stop":
                self.finish = "tool_calls"
        self._silent += 1
        if thought:
            self.reasoned += self._silent
        if thought or said or calls:
            self._silent = 0
            self._deltas.append(Delta(said, thought, calls))
        return Delta(said, thought, calls)


async def gather(job: Job, new: Callable[[], Reply] = Reply) -> list[Reply]:
    """All texts of a job, whole."""
    replies = [new() for _ in job.asks]
    while (found := await job.next()) is not None:
        index, piece = found
        replies[index].push(piece)
    return replies


def usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    """Tokens, as OpenAI counts them."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """What every answer, and every chunk of one, begins with."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }
