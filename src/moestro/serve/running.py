"""Runs the server's loop: a socket that is bound first, and an end that lets answers finish."""

from __future__ import annotations

import asyncio
import errno
import gc
import ipaddress
import logging
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from moestro.errors import ConfigError
from moestro.serve.app import build_app
from moestro.serve.state import State

# Seconds that answers get beyond the engine's own limit, to be sent.
_LAST_S = 5
# Longer than clients and proxies keep a connection for their next request, so that they close it.
_IDLE_S = 90


def bind(host: str, port: int) -> socket.socket:
    """The server's socket, before anything is read that takes time.

    Raises:
        ConfigError: there is no such address, or another program has it.
    """
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        # With its protocol: asyncio sets TCP_NODELAY only where that is said to be TCP, and without
        # it a second small packet waits 40 ms.
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, OverflowError) as error:
        advice = "give a --host of this machine"
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            advice = "another program has it: give another --port, or 0 for any that is free"
        elif getattr(error, "errno", None) == errno.EACCES:
            advice = "this user may not have it: give a --port from 1024 on"
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--host {host} --port {port}: {reason}; {advice}") from None
    return bound


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run(state: State, bound: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM; what runs then ends within the settings' `drain_s`.

    Args:
        state: what to serve; its engine is started and stopped here.
        bound: from `bind`.
        ready: called once requests are taken.
    """
    gc.collect()
    gc.freeze()  # what lives as long as the server is not searched again, which takes 100 ms
    server(state, ready).run([bound])


def server(state: State, ready: Callable[[], None]) -> uvicorn.Server:
    """The server that `run` runs, for who wants it in a thread."""
    config = uvicorn.Config(
        build_app(state),
        http="httptools",
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_IDLE_S,
        timeout_graceful_shutdown=_LAST_S,
    )
    return _Server(config, state, ready)


class _Server(uvicorn.Server):
    """Answers on its socket until what runs is done, so that others are told why they wait."""

    def __init__(self, config: uvicorn.Config, state: State, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._state, self._ready = state, ready
        self._asked_at: float | None = None  # to end
        logging.getLogger("uvicorn.error").addFilter(_is_news)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin, and say so."""
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def on_tick(self, counter: int) -> bool:
        """Whether it is time to end; asked every tenth of a second."""
        if self._asked_at is not None and not self.should_exit:
            self._state.grammars.close()  # what waits for one has not begun
            engine, waited_s = self._state.engine, time.monotonic() - self._asked_at
            late = waited_s > self._state.settings.drain_s + _LAST_S
            self.should_exit = late or not engine.running
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Finish what runs; asked a second time, end at once."""
        if self._asked_at is not None:
            self.force_exit = self.should_exit = True
            # The application's end is cut off, too, which it tells in words.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self._asked_at = time.monotonic()
        self._state.engine.refuse()


def _is_news(record: logging.LogRecord) -> bool:
    """Whether it is no trace of a request that was cut off, as is done once the time is over."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
