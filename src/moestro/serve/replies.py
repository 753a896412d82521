"""One text of an answer as it comes: what of it is said to the user, and what is counted."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from moestro.infer.channels import FINAL, HEADER
from moestro.infer.writing import Finish, Piece
from moestro.serve.engine import Job

FinishReason = Literal["stop", "length", "tool_calls"]
_REASONS: Mapping[Finish, FinishReason] = {
    "stop": "stop", "end_of_text": "stop", "length": "length",
}  # fmt: skip


class Delta(NamedTuple):
    """What a piece adds to a reply: text for the user, and thoughts."""

    content: str = ""
    reasoning: str = ""


class Reply:
    """A text from its pieces.

    Attributes:
        content: What is said to the user.
        reasoning: What the model thought aloud.
        tokens: How many it has, the one that ends it included.
        finish: Why it ended; None before.
    """

    def __init__(self) -> None:
        self.content, self.reasoning, self.tokens = "", "", 0
        self.finish: FinishReason | None = None

    def push(self, piece: Piece) -> Delta:
        """Take the next piece."""
        self.tokens += 1
        if piece.finish is not None:
            self.finish = _REASONS[piece.finish]
        delta = Delta(content=piece.text)
        if piece.channel not in (FINAL, HEADER):
            delta = Delta(reasoning=piece.text)
        elif piece.channel == HEADER:
            delta = Delta()
        self.content += delta.content
        self.reasoning += delta.reasoning
        return delta


async def gather(job: Job) -> Sequence[Reply]:
    """All texts of a job, whole."""
    replies = [Reply() for _ in job.asks]
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
