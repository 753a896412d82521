"""/v1/chat/completions: the next message of a conversation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from moestro.infer.writing import Piece
from moestro.serve.engine import Job
from moestro.serve.events import DONE, PING, EventStream, pieces_of, sse, while_connected, whole
from moestro.serve.logprobs import of_chat
from moestro.serve.replies import Delta, Reply, gather, head, usage
from moestro.serve.routing import routed_fields, token_of
from moestro.serve.schema import ChatRequest
from moestro.serve.state import State
from moestro.serve.tools import Call
from moestro.serve.turns import Turn, prepare


async def chat(request: Request, state: State, wanted: ChatRequest) -> Response:
    """Answer one request."""
    turn = await while_connected(request, prepare(state, wanted))
    job = state.submit(turn.asks)
    kind = "chat.completion.chunk" if wanted.stream else "chat.completion"
    start = head("chatcmpl", kind, state.served.check_name(wanted.model))
    if wanted.stream:
        return EventStream(job, _stream(job, state, wanted, start, turn))
    with job:
        replies = await while_connected(request, gather(job, turn.new_reply))
    return await whole(lambda: {**start, **_answer(job, state, wanted, turn, replies)})


def _answer(
    job: Job, state: State, wanted: ChatRequest, turn: Turn, replies: Sequence[Reply]
) -> dict[str, Any]:
    """All that an answer has beside its head."""
    choices = [
        {
            "index": index,
            "message": _message(reply),
            "logprobs": _logprobs(state, wanted, reply.pieces),
            "finish_reason": reply.finish,
            "stop_reason": reply.stop,
        }
        for index, reply in enumerate(replies)
    ]
    routing = routed_fields(job, wanted)
    for choice, own in zip(choices, routing.choices, strict=True):
        choice |= own
    counted = usage(turn.read, sum(reply.tokens for reply in replies), job.cached.get(0, 0))
    return {"choices": choices, "usage": counted, **routing.prompt}


def _logprobs(state: State, wanted: ChatRequest, pieces: Sequence[Piece]) -> dict[str, Any] | None:
    return of_chat(state.served.tokenizer, pieces) if wanted.top is not None else None


def _message(reply: Reply) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.content}
    if reply.reasoning:
        message |= {"reasoning_content": reply.reasoning, "reasoning": reply.reasoning}
    if reply.calls:
        message |= {
            "content": reply.content or None,
            "tool_calls": [called(call) for call in reply.calls],
        }
    return message


def called(call: Call) -> dict[str, Any]:
    """A call as OpenAI has it."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


async def _stream(
    job: Job, state: State, wanted: ChatRequest, start: dict[str, Any], turn: Turn
) -> AsyncIterator[bytes]:
    """A first chunk with the role, one for each piece of text, a last one with the reason."""
    replies = [turn.new_reply() for _ in job.asks]
    silent = {"usage": None} if wanted.tells_usage else {}

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None, **fields: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        choice |= fields
        more = {}
        if finish and wanted.routed:
            own = routed_fields(job, wanted, index)
            choice, more = {**choice, **own.choices[0]}, own.prompt
        return sse({**start, "choices": [choice], **silent, **more}, long=bool(more or finish))

    for index in range(len(replies)):
        yield chunk(index, {"role": "assistant", "content": None})
    async for found in pieces_of(job, state.settings.ping_s):
        if found is None:
            yield PING
            continue
        index, piece = found
        reply = replies[index]
        known = len(reply.calls)
        fields: dict[str, Any] = {}
        if wanted.tells_experts:
            fields["token"] = token_of(piece)
        if wanted.top is not None and piece.finish != "end_of_text":
            fields["logprobs"] = _logprobs(state, wanted, [piece])
        deltas = list(_deltas(reply.push(piece), known))
        for delta in deltas or ([{}] if fields else []):
            yield chunk(index, delta, **fields)
            fields = {}
        if reply.finish:
            yield await asyncio.to_thread(chunk, index, {}, reply.finish, stop_reason=reply.stop)
    if wanted.tells_usage:
        counted = usage(turn.read, sum(reply.tokens for reply in replies), job.cached.get(0, 0))
        yield sse({**start, "choices": [], "usage": counted})
    yield DONE


def _deltas(delta: Delta, known: int) -> Iterator[dict[str, Any]]:
    """What chunks say of a delta, after so many calls."""
    if delta.reasoning:
        yield {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning}
    if delta.content:
        yield {"content": delta.content}
    for place, call in enumerate(delta.calls, known):
        yield {"tool_calls": [{"index": place, **called(call)}]}
