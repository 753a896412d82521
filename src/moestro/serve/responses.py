"""/v1/responses: a conversation's next items, whole or as typed events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moestro.serve import errors
from moestro.serve.engine import Job
from moestro.serve.errors import ApiError
from moestro.serve.events import PING, EventStream, pieces_of, sse, while_connected
from moestro.serve.replies import Delta, Reply, gather
from moestro.serve.schema_responses import ResponsesRequest
from moestro.serve.state import State
from moestro.serve.tools import Call
from moestro.serve.turns import Turn, prepare

_KINDS = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
# What a request here calls the fields of a conversation.
_NAMES = {"messages": "input", "response_format": "text.format"}


async def respond(request: Request, state: State, wanted: ResponsesRequest) -> Response:
    """Answer one request."""
    with errors.renaming(_NAMES):
        with errors.explaining():
            asked = wanted.as_chat()
        turn = await while_connected(request, prepare(state, asked))
    job = state.submit(turn.asks)
    start = _start(wanted, state.served.check_name(wanted.model))
    if wanted.stream:
        stream = _Events(start)
        return EventStream(job, _stream(job, state, stream, turn), stream.failed)
    with job:
        (reply,) = await while_connected(request, gather(job, turn.new_reply))
    output = list(map(_whole, reply.parts or [Delta()]))
    return JSONResponse({**start, **_end(job, reply, turn), "output": output})


def _start(wanted: ResponsesRequest, name: str) -> dict[str, Any]:
    """A response that has begun; clients expect every field."""
    form = wanted.text.format if wanted.text is not None else None
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": wanted.instructions,
        "max_output_tokens": wanted.max_output_tokens,
        "metadata": {},
        "model": name,
        "output": [],
        "parallel_tool_calls": wanted.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": wanted.temperature,
        "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True)},
        "tool_choice": _choice(wanted),
        "tools": [tool.model_dump() for tool in wanted.tools or ()],
        "top_p": wanted.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _choice(wanted: ResponsesRequest) -> Any:
    choice = wanted.tool_choice or "auto"
    return choice if isinstance(choice, str) else choice.model_dump()


def _end(job: Job, reply: Reply, turn: Turn) -> dict[str, Any]:
    cut = reply.finish == "length"
    return {
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "usage": {
            "input_tokens": turn.read,
            "input_tokens_details": {"cached_tokens": job.cached.get(0, 0)},
            "output_tokens": reply.tokens,
            "output_tokens_details": {"reasoning_tokens": reply.reasoned},
            "total_tokens": turn.read + reply.tokens,
        },
    }


def _whole(part: Delta) -> dict[str, Any]:
    """The item of a part of a reply; an empty message where there is nothing."""
    if part.calls:
        return _call(part.calls[0])
    if part.reasoning:
        return _item("reasoning", content=[_thought(part.reasoning)])
    return _item("message", content=[_text(part.content)])


def _item(kind: str, status: str = "completed", **fields: Any) -> dict[str, Any]:
    item = {"id": f"{_KINDS[kind]}_{uuid.uuid4().hex}", "type": kind, "status": status}
    if kind == "message":
        item["role"] = "assistant"
    return {**item, **({"summary": []} if kind == "reasoning" else {}), **fields}


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _thought(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}


def _call(call: Call) -> dict[str, Any]:
    return _item("function_call", call_id=call.id, name=call.name, arguments=call.arguments)


class _Events:
    """The events of one response: items that open, grow and close."""

    def __init__(self, start: dict[str, Any]) -> None:
        self._response, self._number = start, 0
        self._done: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._written = ""

    def begin(self) -> Iterator[bytes]:
        yield self._event("response.created", response=self._response)
        yield self._event("response.in_progress", response=self._response)

    def delta(self, delta: Delta) -> Iterator[bytes]:
        """What a delta adds."""
        if delta.reasoning:
            yield from self._grow("reasoning", delta.reasoning)
        if delta.content:
            yield from self._grow("message", delta.content)
        for call in delta.calls:
            yield from self._close()
            yield from self._whole(_call(call))

    def end(self, job: Job, reply: Reply, turn: Turn) -> Iterator[bytes]:
        """The last events."""
        if not self._done and self._open is None:
            yield from self._grow("message", "")
        yield from self._close()
        end = {**self._response, **_end(job, reply, turn), "output": self._done}
        yield self._event(f"response.{end['status']}", response=end)

    def failed(self, error: ApiError) -> list[bytes]:
        """The last event of a response that cannot end well."""
        told = {"code": error.code or error.kind, "message": error.message}
        end = {**self._response, "status": "failed", "error": told, "output": self._done}
        return [self._event("response.failed", response=end)]

    def _grow(self, kind: str, text: str) -> Iterator[bytes]:
        if self._open is None or self._open["type"] != kind:
            yield from self._close()
            self._open, self._written = _item(kind, "in_progress", content=[]), ""
            yield self._event("response.output_item.added", item=self._open, **self._place())
            yield self._part("response.content_part.added", "")
        self._written += text
        if text:
            name = "output_text" if kind == "message" else "reasoning_text"
            yield self._inside(f"response.{name}.delta", delta=text)

    def _close(self) -> Iterator[bytes]:
        if self._open is None:
            return
        name = "output_text" if self._open["type"] == "message" else "reasoning_text"
        yield self._inside(f"response.{name}.done", text=self._written)
        yield self._part("response.content_part.done", self._written)
        part = _text if name == "output_text" else _thought
        item = {**self._open, "status": "completed", "content": [part(self._written)]}
        yield self._event("response.output_item.done", item=item, **self._place())
        self._done.append(item)
        self._open = None

    def _whole(self, item: dict[str, Any]) -> Iterator[bytes]:
        """A call, which comes at once."""
        begun = {**item, "status": "in_progress", "arguments": ""}
        place = {**self._place(), "item_id": item["id"]}
        yield self._event("response.output_item.added", item=begun, **self._place())
        written = item["arguments"]
        yield self._event("response.function_call_arguments.delta", delta=written, **place)
        yield self._event(
            "response.function_call_arguments.done",
            arguments=written, name=item["name"], **place,
        )  # fmt: skip
        yield self._event("response.output_item.done", item=item, **self._place())
        self._done.append(item)

    def _place(self) -> dict[str, Any]:
        return {"output_index": len(self._done)}

    def _inside(self, name: str, **fields: Any) -> bytes:
        assert self._open is not None
        if name.startswith("response.output_text"):
            fields["logprobs"] = []
        place = {**self._place(), "item_id": self._open["id"], "content_index": 0}
        return self._event(name, **fields, **place)

    def _part(self, name: str, text: str) -> bytes:
        assert self._open is not None
        part = _text(text) if self._open["type"] == "message" else _thought(text)
        return self._inside(name, part=part)

    def _event(self, name: str, /, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return sse({"type": name, "sequence_number": number, **fields}, name)


async def _stream(job: Job, state: State, events: _Events, turn: Turn) -> AsyncIterator[bytes]:
    reply = turn.new_reply()
    for event in events.begin():
        yield event
    async for found in pieces_of(job, state.settings.ping_s):
        if found is None:
            yield PING
            continue
        for event in events.delta(reply.push(found[1])):
            yield event
    for event in events.end(job, reply, turn):
        yield event
