"""What stands before every route: the server's names, the key, the body's size."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moestro.serve.errors import ApiError
from moestro.serve.settings import ServeSettings

# Open to whoever can reach the server: monitors have no key, and the page asks for it.
OPEN = frozenset({"/", "/docs", "/openapi.json", "/health", "/metrics"})
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]", ""})


class Gate:
    """Lets requests pass that are allowed to."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self._app, self._settings = app, settings
        self._keys = [each for key in settings.api_keys for each in _sent(key)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_names(headers)
            if scope["path"] not in OPEN:
                self._check_key(headers)
            self._check_length(headers)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        await self._app(scope, self._counted(receive), send)

    def _check_key(self, headers: Headers) -> None:
        if not self._keys:
            return
        # In bytes: `Headers` takes each for a character, and the last of `à` for a space.
        scheme, _, token = headers.get("authorization", "").encode("latin-1").partition(b" ")
        given = headers.get("x-api-key", "").encode("latin-1")
        given = token.strip(b" ") if scheme.lower() == b"bearer" else given
        if not _same_as_one(given, self._keys):
            raise ApiError(
                401,
                "this server needs a key, and the request has "
                + ("another" if given else "none: send the header Authorization: Bearer KEY"),
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    def _check_names(self, headers: Headers) -> None:
        """Refuse what a browser sends for another site's page, under its name or ours."""
        host = headers.get("host", "")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, "pages of other sites cannot use this server", code="origin")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if not self._settings.any_host and name not in _LOOPBACK:
            raise ApiError(
                403,
                f"this server answers on this machine only, and not as {name[:100]!r}; a reverse "
                "proxy has to send the Host of this server, or the server needs a key",
                code="host",
            )

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._settings.body_limit:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        most = self._settings.body_limit
        return ApiError(413, f"the request is longer than {most:,} bytes", code="body_too_large")

    def _counted(self, receive: Receive) -> Receive:
        """The same, until more bytes have come than are read."""
        left = self._settings.body_limit

        async def counting() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise self._too_large()
            return message

        return counting


def _sent(key: str) -> set[bytes]:
    """A key in the bytes that clients send: UTF-8's, or Latin-1's, as some do where they can."""
    found = {key.encode()}
    with suppress(UnicodeEncodeError):
        found.add(key.encode("latin-1"))
    return found


def _same_as_one(given: bytes, keys: Iterable[bytes]) -> bool:
    """Compares with every key, in a time that tells nothing of them."""
    found = False
    for key in keys:
        found |= hmac.compare_digest(given, key)
    return found
