"""Answers as they go out: server-sent events while a text is written, or one object at its end."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from moestro.infer.writing import Piece
from moestro.serve.engine import Job
from moestro.serve.errors import ApiError

LOG = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"
PING = b": still at work\n\n"
# No proxy may keep what should be seen as it is written.
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
# Entries of a list that are written one by one.
_LONG = 64
# As nginx has it: the client left before its answer.
CLIENT_LEFT = 499

T = TypeVar("T")


def json_text(data: Any) -> str:
    """JSON, written in parts that are short enough for other threads to go on between them."""
    if isinstance(data, dict):
        pairs = (f"{json.dumps(str(name))}:{json_text(value)}" for name, value in data.items())
        return "{" + ",".join(pairs) + "}"
    if isinstance(data, list) and (
        len(data) > _LONG or any(isinstance(each, dict) for each in data)
    ):
        return "[" + ",".join(map(json_text, data)) + "]"
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


async def whole(make: Callable[[], dict[str, Any]]) -> Response:
    """An answer that is made and written in a thread, since it may be long."""

    def written() -> bytes:
        return json_text(make()).encode()

    return Response(await asyncio.to_thread(written), media_type="application/json")


def sse(data: Any, name: str | None = None, *, long: bool = False) -> bytes:
    """One event; a `long` one is made in a thread."""
    text = json_text(data) if long else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"{f'event: {name}' if name else ''}{chr(10) if name else ''}data: {text}\n\n".encode()


class EventStream(StreamingResponse):
    """A job's events; a client that leaves ends the job."""

    def __init__(
        self,
        job: Job,
        events: AsyncIterator[bytes],
        failed: Callable[[ApiError], list[bytes]] | None = None,
    ) -> None:
        """Begin an answer.

        Args:
            job: what is answered.
            events: the events.
            failed: how an error in the middle of them is told; None: as OpenAI's chat does.
        """
        told = _guarded(events, failed or _told)
        super().__init__(told, media_type="text/event-stream", headers=_HEADERS)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        with self._job:
            await super().__call__(scope, receive, send)


async def _guarded(
    events: AsyncIterator[bytes], failed: Callable[[ApiError], list[bytes]]
) -> AsyncIterator[bytes]:
    """The events; what fails in the middle of them is told as one more."""
    try:
        async for event in events:
            yield event
    except ApiError as error:
        for event in failed(error):
            yield event
    except Exception:  # the status is sent already, so that nothing else could tell
        LOG.exception("a stream failed")
        for event in failed(ApiError(500, "this server failed; try again")):
            yield event


def _told(error: ApiError) -> list[bytes]:
    return [sse(error.body()), DONE]


async def pieces_of(job: Job, ping_s: float) -> AsyncIterator[tuple[int, Piece] | None]:
    """(number of the text, Piece) as they come; None when there was nothing for `ping_s`."""
    while True:
        try:
            found = await job.next(ping_s)
        except TimeoutError:
            yield None
            continue
        if found is None:
            return
        yield found


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which ends early when the client leaves.

    Raises:
        ApiError: the client has left.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(CLIENT_LEFT, "the client has left")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
