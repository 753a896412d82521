"""Many clients of all kinds at once: nobody gets another's text, nothing is lost or left behind."""

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest

from .scripted import NAN

PATH = "/v1/completions"


def resident(process: int) -> int:
    """Bytes of memory that a process has."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def apart(log: Path) -> Iterator[tuple[int, str]]:
    """A server in a process of its own, which writes a log; yields its number and its address."""
    words = [sys.executable, str(Path(__file__).with_name("scripted.py"))]
    with (
        log.open("w") as told,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=told, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            yield process.pid, f"http://127.0.0.1:{int(process.stdout.readline())}"
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert "Traceback" not in log.read_text()


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
def test_many_clients_of_all_kinds(tmp_path: Path) -> None:
    """MOESTRO_SOAK=5000 makes more of them, 200 at once."""
    count, draw = int(os.environ.get("MOESTRO_SOAK", "400")), random.Random(1)

    async def work(process: int, address: str) -> list[int]:
        limits, memory, left = httpx.Limits(max_connections=201), list[int](), count
        async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as client:
            while left > 0:
                batch = [asyncio.create_task(one(client, draw)) for _ in range(min(200, left))]
                left -= len(batch)
                assert (await client.get("/health")).status_code == 200
                await asyncio.gather(*batch)
                memory.append(resident(process))
            end = time.monotonic() + 20
            while (found := (await client.get("/health")).json())["running"]:
                assert time.monotonic() < end, found
                await asyncio.sleep(0.02)
            assert found == {"status": "ok", "running": 0, "waiting": 0}
        return memory

    with apart(tmp_path / "log") as (process, address):
        memory = asyncio.run(work(process, address))
    grown = memory[-1] - memory[min(2, len(memory) - 1)]
    print(f"{count} requests: {grown / 2**20:.1f} MiB more than after the first 600")
    assert grown < 16 * 2**20
