"""The server's routes; what stands before them is in gate.py."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from moestro.errors import MoestroError
from moestro.serve import errors
from moestro.serve.chat import chat
from moestro.serve.completions import complete
from moestro.serve.errors import ApiError
from moestro.serve.events import CLIENT_LEFT
from moestro.serve.gate import Gate
from moestro.serve.messages import count, message
from moestro.serve.openapi import Described, describe, page_of
from moestro.serve.page import headers_of, read_page
from moestro.serve.responses import respond
from moestro.serve.routing import load
from moestro.serve.schema import (
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from moestro.serve.schema_messages import CountRequest, MessagesRequest
from moestro.serve.schema_responses import ResponsesRequest
from moestro.serve.served import Served
from moestro.serve.state import State
from moestro.serve.tokens import detokenize, tokenize
from moestro.strictjson import parse

LOG = logging.getLogger(__name__)
AnyBody = TypeVar("AnyBody", bound=Body)
# Bytes of a body that takes longer to read than a thread to begin.
_LARGE = 1 << 14
Endpoint = Callable[[Request], Awaitable[Response]]


def build_app(state: State) -> Starlette:
    """The server as an ASGI application; it starts the engine, and stops it at its end."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        state.engine.start()
        try:
            yield
        finally:
            state.grammars.close()
            state.engine.stop()

    app = Starlette(
        routes=[
            Route("/", _shown(read_page("playground.html"))),
            *(Route(path.replace("{name}", "{name:path}"), answer) for path, answer, _ in _GETS),
            *(_post(path, kind, answer) for path, kind, answer, _ in _POSTS),
            *_described(),
            *(
                []
                if state.report is None
                else [Route("/report", _shown(state.report, styled=True))]
            ),
        ],
        exception_handlers={
            ApiError: _api_error,
            MoestroError: _moestro_error,
            HTTPException: _http_error,
            ClientDisconnect: _left,
            Exception: _failure,
        },
        middleware=[Middleware(Gate, settings=state.settings)],
        lifespan=lifespan,
    )
    app.state.moestro = state
    return app


def _shown(page: str, *, styled: bool = False) -> Callable[[Request], Awaitable[Response]]:
    """Answers with a page for a browser."""
    headers = headers_of(page, styled=styled)

    async def endpoint(_: Request) -> Response:
        return HTMLResponse(page, headers=headers)

    return endpoint


def _described() -> list[Route]:
    """The routes that describe the others."""
    told = describe(
        [
            *(Described(path, says, kind) for path, kind, _, says in _POSTS),
            *(Described(path, says) for path, _, says in _GETS),
        ]
    )

    async def endpoint(_: Request) -> Response:
        return JSONResponse(told)

    return [Route("/openapi.json", endpoint), Route("/docs", _shown(page_of(told)))]


def _post(
    path: str,
    kind: type[AnyBody],
    answer: Callable[[Request, State, AnyBody], Awaitable[Response]],
) -> Route:
    async def endpoint(request: Request) -> Response:
        return await answer(request, request.app.state.moestro, await read(request, kind))

    return Route(path, endpoint, methods=["POST"])


async def read(request: Request, kind: type[AnyBody]) -> AnyBody:
    """The body of a request, checked.

    Raises:
        ApiError: it is no JSON, or not what this route takes.
    """
    body = await request.body()
    if len(body) > _LARGE:  # so that others' streams go on
        return await asyncio.to_thread(_checked, body, kind)
    return _checked(body, kind)


def _checked(body: bytes, kind: type[AnyBody]) -> AnyBody:
    try:
        values = parse(body)
    except ValueError as error:
        raise errors.refused(f"the body is not the JSON that is read here: {error}") from None
    if not isinstance(values, dict):
        raise errors.refused(f"the body is {type(values).__name__}; send a JSON object")
    with errors.explaining():
        return kind.model_validate(values)


async def health(request: Request) -> Response:
    """Whether the engine is at work; never touches it."""
    state: State = request.app.state.moestro
    step_s = state.engine.step_s()
    if step_s > state.settings.stall_s:
        message = "the engine has stopped"
        if step_s < float("inf"):
            message = f"the engine has not finished a step for {step_s:.0f} s"
        raise ApiError(503, message, code="stalled")
    if state.engine.closed:
        raise errors.closing()
    return JSONResponse(
        {"status": "ok", "running": state.engine.running, "waiting": state.engine.waiting}
    )


async def metrics(request: Request) -> Response:
    """The server's figures."""
    state: State = request.app.state.moestro
    return state.metrics.response()


async def routing(request: Request) -> Response:
    """How often each expert was chosen since the server began."""
    state: State = request.app.state.moestro
    return JSONResponse(load(state.served, state.engine.load_LE))


async def models(request: Request) -> Response:
    """The one model that there is, and it with each of its adapters."""
    names = request.app.state.moestro.served.names
    return JSONResponse({"object": "list", "data": [_model(request, name) for name in names]})


async def one_model(request: Request) -> Response:
    """What `models` says of one."""
    state: State = request.app.state.moestro
    return JSONResponse(_model(request, state.served.check_name(request.path_params["name"])))


def _model(request: Request, name: str) -> dict[str, object]:
    served: Served = request.app.state.moestro.served
    moe = served.model.cfg.moe
    return {
        "id": name,
        "parent": None if name == served.name else served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "moestro",
        "max_model_len": served.context,
        "chat": served.template is not None,
        "moe_layers": list(served.moe_layers),
        "num_experts": moe.num_experts if moe is not None else 0,
        "experts_per_token": moe.top_k if moe is not None else 0,
        "report": "/report" if request.app.state.moestro.report is not None else None,
    }


_GETS = (
    ("/v1/models", models, "The model that is served, and it with each adapter"),
    ("/v1/models/{name}", one_model, "The same, by its name"),
    ("/v1/routing", routing, "How often each expert was chosen since the server began"),
    ("/health", health, "Whether the engine is at work"),
    ("/metrics", metrics, "Figures for Prometheus"),
)
_POSTS: tuple[tuple[str, Any, Any, str], ...] = (
    ("/v1/chat/completions", ChatRequest, chat, "The next message of a conversation"),
    ("/v1/completions", CompletionRequest, complete, "Texts that are continued"),
    ("/v1/responses", ResponsesRequest, respond, "A conversation's next items"),
    ("/v1/messages", MessagesRequest, message, "The next message, in Anthropic's shape"),
    ("/v1/messages/count_tokens", CountRequest, count, "How many tokens a conversation has"),
    ("/tokenize", TokenizeRequest, tokenize, "The tokens of a text or a conversation"),
    ("/detokenize", DetokenizeRequest, detokenize, "The text of tokens"),
)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response(request.url.path)


async def _moestro_error(request: Request, error: Exception) -> Response:
    return errors.refused(str(error)).response(request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]} is not served here"
    told = ApiError(error.status_code, message, headers=error.headers)
    return told.response(request.url.path)


async def _left(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


async def _failure(request: Request, _: Exception) -> Response:
    return ApiError(500, "this server failed; its log says why").response(request.url.path)
