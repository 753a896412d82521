"""/v1/chat/completions: the next message of a conversation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moestro.errors import DataError
from moestro.serve import errors
from moestro.serve.engine import Job
from moestro.serve.events import DONE, PING, EventStream, pieces_of, sse, while_connected
from moestro.serve.replies import Reply, gather, head, usage
from moestro.serve.routing import routed_fields
from moestro.serve.schema import ChatMessage, ChatRequest
from moestro.serve.served import Served, encode_all
from moestro.serve.state import State


async def chat(request: Request, state: State, wanted: ChatRequest) -> Response:
    """Answer one request."""
    served = state.served
    served.check_name(wanted.model)
    tokens = await conversation(served, wanted)
    most = wanted.max_completion_tokens
    most = wanted.max_tokens if most is None else most
    job = state.submit(served.asks(wanted, [tokens], most))
    kind = "chat.completion.chunk" if wanted.stream else "chat.completion"
    start = head("chatcmpl", kind, served.name)
    if wanted.stream:
        return EventStream(job, _stream(job, state, wanted, start, len(tokens)))
    with job:
        replies = await while_connected(request, gather(job))
    choices = [
        {
            "index": index,
            "message": _message(reply),
            "logprobs": None,
            "finish_reason": reply.finish,
        }
        for index, reply in enumerate(replies)
    ]
    routing = routed_fields(job, wanted)
    for choice, own in zip(choices, routing.choices, strict=True):
        choice |= own
    counted = usage(len(tokens), sum(reply.tokens for reply in replies))
    return JSONResponse({**start, "choices": choices, "usage": counted, **routing.prompt})


async def conversation(served: Served, wanted: ChatRequest) -> list[int]:
    """The tokens of a conversation, up to where the reply begins."""
    variables = wanted.chat_template_kwargs or {}
    text = await rendered(served, wanted.messages, variables)
    (tokens,) = await encode_all(served, [text], templated=True)
    return tokens


async def rendered(
    served: Served,
    messages: Sequence[ChatMessage],
    variables: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    reply: bool = True,
) -> str:
    """The text of a conversation.

    Args:
        served: whose template writes it.
        messages: the conversation.
        variables: what else the template takes.
        tools: what the model may call.
        reply: end with what begins the model's reply.
    """
    template, plain = served.chat(), [_plain(message) for message in messages]
    for name in ("messages", "add_generation_prompt", "reply", "tools"):
        if name in variables:
            raise errors.refused(
                f"chat_template_kwargs cannot set {name}", f"chat_template_kwargs.{name}"
            )
    more = {**variables, **({"tools": list(tools)} if tools else {})}
    try:
        return await asyncio.to_thread(lambda: template.render(plain, reply=reply, **more))
    except DataError as error:
        raise errors.refused(str(error), "messages") from None


def _plain(message: ChatMessage) -> dict[str, Any]:
    """A message as templates know it."""
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": message.text}
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            plain[name] = value
    thoughts = message.reasoning_content or message.reasoning
    if thoughts is not None:
        plain["reasoning_content"] = thoughts
    if message.tool_calls:
        plain["tool_calls"] = [
            {"id": call.id, "type": "function", "function": _called(call.function)}
            for call in message.tool_calls
        ]
    return plain


def _called(function: Any) -> dict[str, Any]:
    """A call with its arguments as an object, which is what templates write out."""
    try:
        arguments = json.loads(function.arguments or "{}")
    except ValueError:
        arguments = function.arguments
    return {"name": function.name, "arguments": arguments}


def _message(reply: Reply) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.content}
    if reply.reasoning:
        message |= {"reasoning_content": reply.reasoning, "reasoning": reply.reasoning}
    return message


async def _stream(
    job: Job, state: State, wanted: ChatRequest, start: dict[str, Any], read: int
) -> AsyncIterator[bytes]:
    """A first chunk with the role, one for each piece of text, a last one with the reason."""
    replies: Sequence[Reply] = [Reply() for _ in job.asks]
    silent = {"usage": None} if wanted.tells_usage else {}

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        more = {}
        if finish and wanted.routed:
            own = routed_fields(job, wanted, index)
            choice, more = {**choice, **own.choices[0]}, own.prompt
        return sse({**start, "choices": [choice], **silent, **more})

    for index in range(len(replies)):
        yield chunk(index, {"role": "assistant", "content": None})
    async for found in pieces_of(job, state.settings.ping_s):
        if found is None:
            yield PING
            continue
        index, piece = found
        delta = replies[index].push(piece)
        if delta.reasoning:
            yield chunk(index, {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning})
        if delta.content:
            yield chunk(index, {"content": delta.content})
        if replies[index].finish:
            yield chunk(index, {}, replies[index].finish)
    if wanted.tells_usage:
        counted = usage(read, sum(reply.tokens for reply in replies))
        yield sse({**start, "choices": [], "usage": counted})
    yield DONE
