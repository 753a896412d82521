"""Errors as clients read them: a status, and an object that says what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from moestro.errors import MoestroError

_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    429: "rate_limit_error", 500: "server_error", 503: "unavailable_error",
}  # fmt: skip
_ANTHROPIC_TYPES = {
    413: "request_too_large", 500: "api_error", 503: "overloaded_error",
}  # fmt: skip
_PLAIN = frozenset({"str", "int", "float", "bool"})


class ApiError(Exception):
    """A request that gets an error for an answer.

    Attributes:
        status: of HTTP.
        message: for a person.
        code: for a program; None where the status says it all.
        param: the field that is wrong.
        more: what else the error's object has.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        more: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.more, self.headers = dict(more or {}), dict(headers or {})

    @property
    def kind(self) -> str:
        """What the error's object calls its type."""
        return _TYPES.get(self.status, "invalid_request_error")

    def body(self, *, anthropic: bool = False) -> dict[str, Any]:
        """The error's object, as OpenAI or as Anthropic has it."""
        if anthropic:
            kind = _ANTHROPIC_TYPES.get(self.status, self.kind)
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        error = {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.code,
        }  # fmt: skip
        return {"error": error | self.more}

    def response(self, path: str) -> JSONResponse:
        """The whole answer to a request for a path."""
        body = self.body(anthropic=path.startswith("/v1/messages"))
        return JSONResponse(body, self.status, self.headers)


class GrammarError(MoestroError):
    """A text that cannot go on as its grammar wants it; says nothing of either."""


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that is wrong in itself."""
    return ApiError(400, message, param=param, code=code)


def unknown_model(name: str, served: Sequence[str]) -> ApiError:
    """A request for a model that is not served here."""
    return ApiError(
        404,
        f"there is no model {name[:200]!r} here; this server has {' and '.join(map(repr, served))}",
        param="model",
        code="model_not_found",
    )


def too_long(tokens: int, context: int, room: int) -> ApiError:
    """A prompt that leaves no room for the answer, or for itself where that is empty."""
    need = f", of which the answer needs at least {room}" if room else ""
    return ApiError(
        413,
        f"the prompt is {tokens} tokens long, and this server's context is {context} tokens{need}; "
        "send a shorter prompt",
        code="context_length_exceeded",
        more={"n_prompt_tokens": tokens, "n_ctx": context},
    )


def full(waiting: int) -> ApiError:
    """A request that would have to wait behind too many others."""
    return ApiError(
        429,
        f"{waiting} requests are waiting already, as many as this server lets wait; try again "
        "in a few seconds",
        code="queue_full",
        headers={"retry-after": "2"},
    )


def closing() -> ApiError:
    """A request to a server that is about to end."""
    return ApiError(
        503,
        "this server is about to end and takes no more requests; try again in a while",
        code="shutting_down",
        headers={"retry-after": "10"},
    )


@contextmanager
def explaining() -> Iterator[None]:
    """Turns what pydantic refuses into an answer."""
    try:
        yield
    except ValidationError as error:
        raise explained(error) from None


@contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Turns the field that an answer names into what the route's own requests call it."""
    try:
        yield
    except ApiError as error:
        name = (error.param or "").partition(".")[0]
        if name not in names:
            raise
        reason = error.message.removeprefix(name)
        message = error.message if reason == error.message else names[name] + reason
        raise refused(message, names[name], error.code) from None


def explained(error: ValidationError) -> ApiError:
    """One thing that is wrong with a body, in a sentence."""
    # Where a value may have one of several types, pydantic tells what each makes of it: what is
    # wrong deepest inside is of the type that was meant.
    found = error.errors(include_url=False)
    problem = max(found, key=lambda each: len(_names(each["loc"])))
    names = _names(problem["loc"])
    where = ".".join(names) or "the request"
    if problem["type"] == "missing":
        return refused(f"{where} is required and was not given", where)
    shown = repr(problem["input"])
    shown = shown if len(shown) <= 80 else f"{shown[:80]}…"
    reason = problem["msg"].removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    return refused(f"{where} = {shown} is not allowed: {reason}", where)


def _names(loc: tuple[int | str, ...]) -> list[str]:
    """Where a problem is, without the names of types."""
    return [
        str(part)
        for part in loc
        if isinstance(part, int) or not (part in _PLAIN or "[" in part or "-" in part)
    ]
