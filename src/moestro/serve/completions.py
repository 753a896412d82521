"""/v1/completions: texts that are continued."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from moestro.infer.writing import Piece, Scored
from moestro.serve import errors
from moestro.serve.engine import Job
from moestro.serve.events import DONE, PING, EventStream, pieces_of, sse, while_connected, whole
from moestro.serve.logprobs import echoed, of_completion
from moestro.serve.replies import Reply, gather, head, usage
from moestro.serve.routing import routed_fields, token_of
from moestro.serve.schema import CompletionRequest
from moestro.serve.served import Served, encode_all
from moestro.serve.state import State


async def complete(request: Request, state: State, wanted: CompletionRequest) -> Response:
    """Answer one request."""
    served = state.served
    served.check_name(wanted.model)
    _check(wanted)
    most = 16 if wanted.max_tokens is None else wanted.max_tokens
    nothing = most == 0 and wanted.echo is True
    prompts = await encode_all(served, wanted.prompts, room=0 if nothing else 1)
    most = 1 if nothing else most  # the text is left out later
    job = state.submit(served.asks(wanted, prompts, most))
    start = head("cmpl", "text_completion", served.check_name(wanted.model))
    texts = [_Text(job, index, served, wanted) for index in range(len(job.asks))]
    if wanted.stream:
        return EventStream(job, _stream(job, state, wanted, start, texts))
    with job:
        replies = await while_connected(request, gather(job))
    return await whole(lambda: {**start, **_answer(job, wanted, texts, replies)})


def _answer(
    job: Job, wanted: CompletionRequest, texts: Sequence[_Text], replies: Sequence[Reply]
) -> dict[str, Any]:
    """All that an answer has beside its head."""
    choices = []
    for text, reply in zip(texts, replies, strict=True):
        choices.append(text.choice([*text.prompt(), *map(text.part, reply.pieces)], reply))
    routing = routed_fields(job, wanted)
    for choice, own in zip(choices, routing.choices, strict=True):
        choice |= own
    return {"choices": choices, "usage": _usage(job, texts, wanted), **routing.prompt}


class _Part(NamedTuple):
    """A part of a text: a token, and how likely it was where that is wanted."""

    text: str
    token: int
    scored: Scored | None


class _Text:
    """One choice of an answer, from its prompt where that is echoed.

    Attributes:
        written: Tokens that were written and are told.
    """

    def __init__(self, job: Job, index: int, served: Served, wanted: CompletionRequest) -> None:
        self._job, self._index, self._served, self._wanted = job, index, served, wanted
        self._offset, self.written = 0, 0

    def prompt(self) -> list[_Part]:
        """What is echoed, once the prompt is read."""
        if not self._wanted.echo:
            return []
        tokens = self._job.asks[self._index].tokens
        given = self._wanted.prompts[self._index // self._wanted.count]
        if self._wanted.top is None:
            text = given if isinstance(given, str) else self._spelled(given)
            return [_Part(text, tokens[0], None)]
        texts = echoed(self._served.tokenizer, given, tokens)
        scored = [None, *self._job.scored.get(self._index, [None] * (len(tokens) - 1))]
        return [_Part(*each) for each in zip(texts, tokens, scored, strict=True)]

    def _spelled(self, tokens: Sequence[int]) -> str:
        """Text of tokens; the model may know more of them than the tokenizer."""
        tokenizer = self._served.tokenizer
        return tokenizer.decode([token for token in tokens if token < tokenizer.vocab_size])

    def part(self, piece: Piece) -> _Part | None:
        """What was written; None where nothing was to be."""
        if self._wanted.max_tokens == 0:
            return None
        self.written += 1
        return _Part(piece.text, piece.token, piece.scored)

    def choice(self, parts: Sequence[_Part | None], reply: Reply) -> dict[str, Any]:
        """The choice, or a chunk of it."""
        told = [part for part in parts if part is not None]
        logprobs = None
        if self._wanted.top is not None:
            tokens, texts = [part.token for part in told], [part.text for part in told]
            scored = [part.scored for part in told]
            tokenizer = self._served.tokenizer
            logprobs = of_completion(tokenizer, tokens, texts, scored, self._offset)
        text = "".join(part.text for part in told)
        self._offset += len(text)
        nothing = reply.finish is not None and self._wanted.max_tokens == 0
        return {
            "index": self._index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": "length" if nothing else reply.finish,
            "stop_reason": None if nothing else reply.stop,
        }


def _usage(job: Job, texts: Sequence[_Text], wanted: CompletionRequest) -> dict[str, Any]:
    prompts = range(0, len(job.asks), wanted.count)
    read = sum(len(job.asks[index].tokens) for index in prompts)
    cached = sum(job.cached.get(index, 0) for index in prompts)
    return usage(read, sum(text.written for text in texts), cached)


def _check(wanted: CompletionRequest) -> None:
    if wanted.suffix:
        raise errors.refused("suffix is not supported; leave it out", "suffix")


async def _stream(
    job: Job,
    state: State,
    wanted: CompletionRequest,
    start: dict[str, Any],
    texts: Sequence[_Text],
) -> AsyncIterator[bytes]:
    replies = [Reply() for _ in job.asks]
    silent = {"usage": None} if wanted.tells_usage else {}

    def chunk(index: int, piece: Piece, *, first: bool = False, long: bool = False) -> bytes:
        text, reply = texts[index], replies[index]
        parts = [*(text.prompt() if first else ()), text.part(piece)]
        choice, more = text.choice(parts, reply), dict[str, Any]()
        if wanted.tells_experts:
            choice["token"] = token_of(piece)
        if reply.finish and wanted.routed:
            own = routed_fields(job, wanted, index)
            choice, more = {**choice, **own.choices[0]}, own.prompt
        if choice["text"] or reply.finish or wanted.tells_experts or wanted.top is not None:
            return sse({**start, "choices": [choice], **silent, **more}, long=long)
        return b""

    async for found in pieces_of(job, state.settings.ping_s):
        if found is None:
            yield PING
            continue
        index, piece = found
        reply, first = replies[index], not replies[index].pieces
        reply.push(piece)
        if (first and wanted.echo) or reply.finish:  # which may be long
            event = await asyncio.to_thread(chunk, index, piece, first=first, long=True)
        else:
            event = chunk(index, piece)
        if event:
            yield event
    if wanted.tells_usage:
        yield sse({**start, "choices": [], "usage": _usage(job, texts, wanted)})
    yield DONE
