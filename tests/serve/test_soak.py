"""Many clients of all kinds at once: nobody gets another's text, nothing is lost or left behind."""

import asyncio
import json
import os
import random
import time
from pathlib import Path

import httpx2 as httpx
import pytest

from .conftest import at_work
from .scripted import NAN, counting

PATH = "/v1/completions"


def resident() -> int:
    """Bytes of memory that this process, and so the server, has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def expected(prompt: str, length: int) -> str:
    return "".join(chr((ord(prompt[-1]) - 96 + i) % 26 + 97) for i in range(length))


async def one(client: httpx.AsyncClient, draw: random.Random) -> str:
    """One request of a random kind; returns the kind once all about it was right."""
    kind = draw.choice(["whole", "stream", "leave", "leave early", "bad", "nan"])
    prompt = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(1, 300)))
    length = draw.randint(1, 40)
    body = {"prompt": prompt, "max_tokens": length, "temperature": 0, "stream": kind == "stream"}
    if kind == "whole":
        response = await client.post(PATH, json=body)
        assert response.json()["choices"][0]["text"] == expected(prompt, length)
    elif kind == "stream":
        lines = [e for e in (await client.post(PATH, json=body)).text.split("\n\n") if e]
        assert lines[-1] == "data: [DONE]"
        texts = [json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]]
        assert "".join(texts) == expected(prompt, length)
    elif kind == "leave":
        body |= {"stream": True, "max_tokens": 3000}
        async with client.stream("POST", PATH, json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    break
    elif kind == "leave early":
        task = asyncio.create_task(client.post(PATH, json={**body, "max_tokens": 3000}))
        await asyncio.sleep(draw.random() * 0.05)
        task.cancel()
        await asyncio.wait([task])
    elif kind == "bad":
        response = await client.post(PATH, content=json.dumps(body)[: draw.randint(1, 30)])
        assert response.status_code == 400
    else:
        response = await client.post(PATH, json={**body, "prompt": NAN + prompt})
        assert response.status_code == 500
        assert "NaN" in response.json()["error"]["message"]
    return kind


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux' own figures")
def test_many_clients_of_all_kinds() -> None:
    """MOESTRO_SOAK=5000 makes more of them, 200 at once."""
    count, draw = int(os.environ.get("MOESTRO_SOAK", "400")), random.Random(1)
    _, state = counting(max_live=16, max_waiting=1000)
    worst = 0.0

    async def work(address: str) -> list[int]:
        nonlocal worst
        limits = httpx.Limits(max_connections=201)
        async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as client:
            memory, left = [], count
            while left > 0:
                batch = [asyncio.create_task(one(client, draw)) for _ in range(min(200, left))]
                left -= len(batch)
                start = time.monotonic()
                assert (await client.get("/health")).status_code == 200
                worst = max(worst, time.monotonic() - start)
                await asyncio.gather(*batch)
                memory.append(resident())
            end = time.monotonic() + 20
            while (found := (await client.get("/health")).json())["running"]:
                assert time.monotonic() < end, found
                await asyncio.sleep(0.02)
            assert found == {"status": "ok", "running": 0, "waiting": 0}
        return memory

    with at_work(state) as address:
        memory = asyncio.run(work(address))
    if len(memory) > 5:
        grown = memory[-1] - memory[2]
        print(f"{count} requests: memory grew by {grown:,} bytes after the first 600")
        assert grown < 32 * 2**20
    assert worst < 10
