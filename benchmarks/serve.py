"""Tokens per second under load: `moestro serve` and other servers of /v1/completions, by turns.

Start the servers first, on one model file, and give their addresses:

    moestro serve FILE.gguf --port 8001 &
    llama-server -m FILE.gguf --port 8002 -np 16 -c 32768 &
    python benchmarks/serve.py moestro=http://127.0.0.1:8001 llama.cpp=http://127.0.0.1:8002

Each client asks for one text after the other, of random tokens as its prompt, streamed; every
prompt is new. The servers take turns, one at a time under load. First tokens are what a client
waits for; a gap is the longest time between two events of one stream.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import time
from typing import NamedTuple
from urllib.parse import urlsplit

import measure


class Text(NamedTuple):
    """One text as a client saw it."""

    tokens: int
    first_s: float
    gap_s: float


async def ask(address: str, prompt: list[int], tokens: int) -> Text:
    """Stream one completion."""
    place = urlsplit(address)
    asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    asked["stream_options"] = {"include_usage": True}
    body = json.dumps(asked).encode()
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    start = last = time.perf_counter()
    writer.write(head.encode() + body)
    first = gap = 0.0
    used, seen, status = 0, 0, ""
    async for raw in reader:
        line = raw.strip()
        status = status or line.decode()
        if not line.startswith(b"data: ") or line == b"data: [DONE]":
            continue
        now = time.perf_counter()
        event = json.loads(line[6:])
        if (event.get("usage") or {}).get("completion_tokens"):
            used = event["usage"]["completion_tokens"]
        if event.get("choices"):
            first, gap = first or now - start, max(gap, now - last if first else 0.0)
            last, seen = now, seen + 1
    writer.close()
    if not seen:
        raise SystemExit(f"{address} answered {status}")
    return Text(used or seen, first, gap)


async def load(address: str, clients: int, texts: int, lengths: tuple[int, int], tokens: int,
               vocab: int, seed: int) -> dict[str, float]:  # fmt: skip
    """All clients at work; the same prompts for every server."""
    rng = random.Random(seed)
    prompts = [
        [rng.randrange(256, vocab) for _ in range(rng.randint(*lengths))] for _ in range(texts)
    ]
    found: list[Text] = []

    async def client() -> None:
        while prompts:
            found.append(await ask(address, prompts.pop(), tokens))

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - start
    firsts = sorted(text.first_s for text in found)
    return {
        "tokens_per_s": sum(text.tokens for text in found) / seconds,
        "first_p50_s": statistics.median(firsts),
        "first_p95_s": firsts[math.ceil(0.95 * len(firsts)) - 1],
        "gap_max_s": max(text.gap_s for text in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("servers", nargs="+", metavar="NAME=URL")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--texts", type=int, default=2, help="of each client in a round")
    parser.add_argument("--prompt", type=int, nargs=2, default=[64, 512], metavar=("LEAST", "MOST"))
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="", help="suffix of the result file")
    given = parser.parse_args()
    servers = dict(each.split("=", 1) for each in given.servers)
    rows, first = [], time.time_ns()  # no server has seen these prompts before
    for clients in given.clients:
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
        for number in range(given.rounds):
            for name, url in servers.items():
                rounds[name].append(
                    asyncio.run(
                        load(url, clients, clients * given.texts, tuple(given.prompt), given.tokens,
                             given.vocab, first + 1000 * clients + number)
                    )
                )  # fmt: skip
        for name, each in rounds.items():
            medians = {key: statistics.median(one[key] for one in each) for key in each[0]}
            rows.append({"clients": clients, "server": name, **medians})
    settings = {"prompt": given.prompt, "tokens": given.tokens, "rounds": given.rounds}
    measure.report(f"serve{given.name}", rows, settings)


if __name__ == "__main__":
    main()
