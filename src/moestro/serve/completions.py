"""/v1/completions: texts that are continued."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moestro.serve import errors
from moestro.serve.engine import Job
from moestro.serve.events import DONE, PING, EventStream, pieces_of, sse, while_connected
from moestro.serve.replies import Reply, gather, head, usage
from moestro.serve.routing import routed_fields, token_of
from moestro.serve.schema import CompletionRequest
from moestro.serve.served import encode_all
from moestro.serve.state import State


async def complete(request: Request, state: State, wanted: CompletionRequest) -> Response:
    """Answer one request."""
    served = state.served
    served.check_name(wanted.model)
    _check(wanted)
    prompts = await encode_all(served, wanted.prompts)
    job = state.submit(served.asks(wanted, prompts, wanted.max_tokens or 16))
    start = head("cmpl", "text_completion", served.name)
    read = sum(map(len, prompts))
    if wanted.stream:
        return EventStream(job, _stream(job, state, wanted, start, read))
    with job:
        replies = await while_connected(request, gather(job))
    choices = [
        {"index": index, "text": reply.content, "logprobs": None, "finish_reason": reply.finish}
        for index, reply in enumerate(replies)
    ]
    routing = routed_fields(job, wanted)
    for choice, own in zip(choices, routing.choices, strict=True):
        choice |= own
    counted = usage(read, sum(reply.tokens for reply in replies))
    return JSONResponse({**start, "choices": choices, "usage": counted, **routing.prompt})


def _check(wanted: CompletionRequest) -> None:
    if wanted.suffix:
        raise errors.refused("suffix is not supported; leave it out", "suffix")


async def _stream(
    job: Job, state: State, wanted: CompletionRequest, start: dict[str, Any], read: int
) -> AsyncIterator[bytes]:
    replies = [Reply() for _ in job.asks]
    silent = {"usage": None} if wanted.tells_usage else {}
    async for found in pieces_of(job, state.settings.ping_s):
        if found is None:
            yield PING
            continue
        index, piece = found
        reply = replies[index]
        text = reply.push(piece).content
        if text or reply.finish or wanted.tells_experts:
            choice: dict[str, Any] = {
                "index": index, "text": text, "logprobs": None, "finish_reason": reply.finish,
            }  # fmt: skip
            if wanted.tells_experts:
                choice["token"] = token_of(piece)
            more = {}
            if reply.finish and wanted.routed:
                own = routed_fields(job, wanted, index)
                choice, more = {**choice, **own.choices[0]}, own.prompt
            yield sse({**start, "choices": [choice], **silent, **more})
    if wanted.tells_usage:
        counted = usage(read, sum(reply.tokens for reply in replies))
        yield sse({**start, "choices": [], "usage": counted})
    yield DONE
