"""/v1/messages and its count_tokens: conversations in Anthropic's shape."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moestro.serve import errors
from moestro.serve.engine import Job
from moestro.serve.errors import ApiError
from moestro.serve.events import EventStream, pieces_of, sse, while_connected
from moestro.serve.replies import Delta, Reply, gather
from moestro.serve.schema_messages import CountRequest, MessagesRequest
from moestro.serve.state import State
from moestro.serve.tools import Call
from moestro.serve.turns import Turn, conversation, prepare

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


async def message(request: Request, state: State, wanted: MessagesRequest) -> Response:
    """Answer one request."""
    with errors.explaining():
        asked = wanted.as_chat()
    turn = await while_connected(request, prepare(state, asked))
    job = state.submit(turn.asks)
    start: dict[str, Any] = {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": state.served.check_name(wanted.model),
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(job, turn, 0),
    }
    if wanted.stream:
        return EventStream(job, _stream(job, state, wanted, start, turn), _failed)
    with job:
        (reply,) = await while_connected(request, gather(job, turn.new_reply))
    blocks = list(map(_whole, reply.parts))
    usage = _usage(job, turn, reply.tokens)
    return JSONResponse({**start, **_end(reply), "content": blocks, "usage": usage})


async def count(_: Request, state: State, wanted: CountRequest) -> Response:
    """How many tokens a conversation has."""
    state.served.check_name(wanted.model)
    with errors.explaining():
        asked = wanted.as_chat()
    text = await conversation(state.served, asked)
    tokens = await asyncio.to_thread(state.served.tokenizer.encode_prompt, text, templated=True)
    return JSONResponse({"input_tokens": len(tokens)})


def _usage(job: Job, turn: Turn, written: int) -> dict[str, int]:
    cached = job.cached.get(0, 0)
    return {
        "input_tokens": turn.read - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": written,
    }


def _end(reply: Reply) -> dict[str, Any]:
    """Why a message ends."""
    assert reply.finish is not None
    if reply.stop is not None and reply.finish == "stop":
        return {"stop_reason": "stop_sequence", "stop_sequence": reply.stop}
    return {"stop_reason": _REASONS[reply.finish], "stop_sequence": None}


def _whole(part: Delta) -> dict[str, Any]:
    """The block of a part of a reply."""
    if part.calls:
        return {**_called(part.calls[0]), "input": json.loads(part.calls[0].arguments)}
    if part.reasoning:
        return {"type": "thinking", "thinking": part.reasoning, "signature": ""}
    return {"type": "text", "text": part.content}


def _called(call: Call) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name}


class _Blocks:
    """The blocks of one message: they open, grow and close."""

    def __init__(self) -> None:
        self._index, self._open = 0, ""

    def delta(self, delta: Delta) -> Iterator[bytes]:
        """What a delta adds."""
        if delta.reasoning:
            begun = {"type": "thinking", "thinking": "", "signature": ""}
            yield from self._grow(begun, {"type": "thinking_delta", "thinking": delta.reasoning})
        if delta.content:
            begun = {"type": "text", "text": ""}
            yield from self._grow(begun, {"type": "text_delta", "text": delta.content})
        for call in delta.calls:
            yield from self.close()
            part = {"type": "input_json_delta", "partial_json": call.arguments}
            yield from self._grow({**_called(call), "input": {}}, part)

    def close(self) -> Iterator[bytes]:
        """End the block that is open."""
        if self._open:
            yield _event("content_block_stop", index=self._index)
            self._index, self._open = self._index + 1, ""

    def _grow(self, begun: dict[str, Any], part: dict[str, Any]) -> Iterator[bytes]:
        if self._open != begun["type"]:
            yield from self.close()
            self._open = begun["type"]
            yield _event("content_block_start", index=self._index, content_block=begun)
        yield _event("content_block_delta", index=self._index, delta=part)


async def _stream(
    job: Job, state: State, wanted: MessagesRequest, start: dict[str, Any], turn: Turn
) -> AsyncIterator[bytes]:
    reply, blocks = turn.new_reply(), _Blocks()
    yield _event("message_start", message=start)
    async for found in pieces_of(job, state.settings.ping_s):
        if found is None:
            yield _event("ping")
            continue
        for event in blocks.delta(reply.push(found[1])):
            yield event
    for event in blocks.close():
        yield event
    yield _event("message_delta", delta=_end(reply), usage=_usage(job, turn, reply.tokens))
    yield _event("message_stop")


def _failed(error: ApiError) -> list[bytes]:
    return [sse(error.body(anthropic=True), "error")]


def _event(name: str, /, **fields: Any) -> bytes:
    return sse({"type": name, **fields}, name)
