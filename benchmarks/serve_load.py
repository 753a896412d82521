"""One load for all servers of /v1/completions: started, asked, and timed as clients see it."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

# Reading a file of many GiB may take this long.
_READY_S = 900.0


class Text(NamedTuple):
    """One text as a client saw it.

    Attributes:
        tokens: as the server counts them.
        first_s: until the first event with a choice.
        gap_s: the longest time between two of them.
        rate: tokens per second from the first to the last; 0 for a single one.
    """

    tokens: int
    first_s: float
    gap_s: float
    rate: float


class Stream:
    """One text that is being streamed.

    Attributes:
        times: when each event with a choice came, by `time.perf_counter`.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.begun = asyncio.Event()

    async def run(self, address: str, body: dict[str, Any], path: str = "/v1/completions") -> Text:
        """Ask, and read to the end."""
        place = urlsplit(address)
        asked = {"temperature": 0, **body, "stream": True}
        asked["stream_options"] = {"include_usage": True}
        sent = json.dumps(asked).encode()
        reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=1 << 24)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(sent)}\r\nConnection: close\r\n\r\n"
        )
        start = time.perf_counter()
        used, status = 0, ""
        try:
            writer.write(head.encode() + sent)
            async for raw in reader:
                line = raw.strip()
                status = status or line.decode()
                if not line.startswith(b"data: ") or line == b"data: [DONE]":
                    continue
                event = json.loads(line[6:])
                used = (event.get("usage") or {}).get("completion_tokens") or used
                if event.get("choices") and not _role_alone(event["choices"][0]):
                    self.times.append(time.perf_counter())
                    self.begun.set()
        finally:
            writer.close()
        if not self.times:
            raise SystemExit(f"{address} answered {status}")
        gaps = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        tokens, written_s = used or len(self.times), self.times[-1] - self.times[0]
        rate = (tokens - 1) / written_s if written_s else 0.0
        return Text(tokens, self.times[0] - start, max(gaps, default=0.0), rate)


def _role_alone(choice: dict[str, Any]) -> bool:
    """Whether it is the chunk with which a chat begins, before anything is computed."""
    delta = choice.get("delta")
    return delta is not None and not delta.get("content") and not choice.get("finish_reason")


async def ask(address: str, body: dict[str, Any], path: str = "/v1/completions") -> Text:
    """Stream one text."""
    return await Stream().run(address, body, path)


def draw(rng: random.Random, length: int, vocab: int) -> list[int]:
    """A prompt that nobody has seen."""
    return [rng.randrange(256, vocab) for _ in range(length)]


def p95(values: list[float]) -> float:
    """The value that 95 of 100 do not exceed."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


async def load(
    address: str, clients: int, prompts: list[list[int]], tokens: int
) -> dict[str, float]:
    """Clients that ask for one text after the other until all prompts are used."""
    left, found = list(prompts), list[Text]()

    async def client() -> None:
        while left:
            found.append(await ask(address, {"prompt": left.pop(), "max_tokens": tokens}))

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - start
    return {
        "tokens_per_s": sum(text.tokens for text in found) / seconds,
        "first_p50_s": statistics.median(text.first_s for text in found),
        "first_p95_s": p95([text.first_s for text in found]),
        "gap_max_s": max(text.gap_s for text in found),
    }


async def beside(
    address: str, prompts: list[list[int]], long: list[int], tokens: int
) -> dict[str, float]:
    """What streams see while a long prompt arrives, and how long /health takes meanwhile."""
    streams = [Stream() for _ in prompts]
    tasks = [
        asyncio.create_task(stream.run(address, {"prompt": prompt, "max_tokens": tokens}))
        for stream, prompt in zip(streams, prompts, strict=True)
    ]
    for stream in streams:
        await stream.begun.wait()
    await asyncio.sleep(1.0)
    health: list[float] = []

    async def poll() -> None:
        while True:
            health.append(await _health_s(address))
            await asyncio.sleep(0.02)

    polling = asyncio.create_task(poll())
    arrived = time.perf_counter()
    first = await ask(address, {"prompt": long, "max_tokens": 1})
    read = time.perf_counter()
    ended = [task.done() for task in tasks]
    for task in (polling, *tasks):
        task.cancel()
    await asyncio.gather(polling, *tasks, return_exceptions=True)
    alone, during = [], []
    for stream, over in zip(streams, ended, strict=True):
        for before, after in zip(stream.times, stream.times[1:], strict=False):
            (during if after > arrived else alone).append(after - before)
        # One that stood still all the time has had no event since.
        if not over and stream.times[-1] < read:
            during.append(read - stream.times[-1])
    return {
        "gap_max_s": max(during, default=None),
        "gap_before_s": statistics.median(alone) if alone else None,
        "long_first_s": first.first_s,
        "health_max_s": max(health),
        "health_p50_s": statistics.median(health),
    }


async def _health_s(address: str) -> float:
    """How long a new connection waits for /health."""
    place, start = urlsplit(address), time.perf_counter()
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        request = f"GET /health HTTP/1.1\r\nHost: {place.netloc}\r\nConnection: close\r\n\r\n"
        writer.write(request.encode())
        await reader.readline()
        return time.perf_counter() - start
    finally:
        writer.close()


async def shared(
    address: str, system: list[int], ends: list[list[int]], tokens: int
) -> dict[str, float]:
    """First tokens of prompts that begin alike, the first of them and those after it."""
    firsts = [
        (await ask(address, {"prompt": system + end, "max_tokens": tokens})).first_s for end in ends
    ]
    later = statistics.median(firsts[1:])
    return {"first_s": firsts[0], "later_s": later, "times_shorter": firsts[0] / later}


@contextmanager
def started(command: str, words: list[str], threads: int) -> Iterator[str]:
    """A server in a process of its own; yields its address once it is ready.

    Args:
        command: how it is started, options of its own included; an address: it runs already.
        words: what else it is told; PORT in them becomes a free port.
        threads: that compute.
    """
    if command.startswith("http"):
        yield command.rstrip("/")
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [*shlex.split(command), *(word.replace("PORT", str(port)) for word in words)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log, env=environment)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(process, line, address, log)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], line: list[str], address: str, log: Any) -> None:
    end = time.monotonic() + _READY_S
    while process.poll() is None and time.monotonic() < end:
        try:
            with urlopen(f"{address}/health", timeout=10) as answer:
                if answer.status == 200:
                    return
        except (URLError, OSError):
            time.sleep(0.2)
    log.seek(0)
    raise SystemExit(f"{shlex.join(line)} does not serve:\n{log.read()[-2000:]}")


def own_command() -> str:
    """This project's server."""
    return shlex.join([sys.executable, "-m", "moestro", "serve"])


def words_of(name: str, model: Path, context: int, slots: int, threads: int) -> list[str]:
    """What a server is told of the model; llama-server divides its context among its slots."""
    if name == "moestro":
        return [
            str(model), "--port", "PORT", "--max-live", str(slots), "--context", str(context)
        ]  # fmt: skip
    return [
        "-m", str(model), "--host", "127.0.0.1", "--port", "PORT", "-np", str(slots),
        "-c", str(context * slots), "-t", str(threads), "-tb", str(threads),
    ]  # fmt: skip
