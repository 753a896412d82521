"""What breaks servers: full queues, clients that leave, steps that never end, logits of NaN."""

import asyncio
import json
import logging
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest

from moestro.serve.running import bind, server

from .scripted import FAIL, NAN, counting
from .serving import at_work

PATH = "/v1/completions"
Client = httpx.AsyncClient


def on(address: str, work: Callable[[Client], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        async with Client(base_url=address, timeout=60) as client:
            await work(client)

    asyncio.run(all_of_it())


def test_small_packets_go_at_once() -> None:
    """What asyncio looks at before it sets TCP_NODELAY."""
    with bind("127.0.0.1", 0) as bound:
        assert bound.proto == socket.IPPROTO_TCP


async def until(client: Client, **counts: int) -> None:
    """Wait until /health counts as many."""
    end = time.monotonic() + 20
    while True:
        found = (await client.get("/health")).json()
        if {name: found.get(name) for name in counts} == counts:
            return
        assert time.monotonic() < end, found
        await asyncio.sleep(0.01)


def asked(prompt: str = "a", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "temperature": 0, "max_tokens": 10, **more}


def test_one_more_than_may_wait_is_refused() -> None:
    model, state = counting(max_live=1, max_waiting=1)

    async def work(client: Client) -> None:
        model.go.clear()
        first = asyncio.create_task(client.post(PATH, json=asked()))
        second = asyncio.create_task(client.post(PATH, json=asked("m")))
        await until(client, running=1, waiting=1)
        third = await client.post(PATH, json=asked())
        assert third.status_code == 429
        assert int(third.headers["retry-after"]) > 0
        assert third.json()["error"]["type"] == "rate_limit_error"
        assert (await client.post(PATH, json=asked(n=2))).status_code == 429
        never = await client.post(PATH, json=asked(n=3))
        assert never.status_code == 400
        assert "takes 2 at once" in never.json()["error"]["message"]
        model.go.set()
        assert (await first).json()["choices"][0]["text"] == "bcdefghijk"
        assert (await second).json()["choices"][0]["text"] == "nopqrstuvw"
        assert (await client.post(PATH, json=asked())).status_code == 200

    with at_work(state) as address:
        on(address, work)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place_within_a_step(stream: bool) -> None:
    model, state = counting(max_live=1)

    async def work(client: Client) -> None:
        model.go.clear()
        tasks = [
            asyncio.create_task(client.post(PATH, json=asked(max_tokens=4000, stream=stream)))
            for _ in range(2)
        ]
        await until(client, running=1, waiting=1)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await asyncio.sleep(0.3)  # the server sees it in its own time, during the step
        begun = model.steps
        model.go.set()
        await until(client, running=0, waiting=0)
        assert model.steps <= begun + 1
        assert (await client.post(PATH, json=asked())).status_code == 200

    with at_work(state) as address:
        on(address, work)


def test_health_answers_at_once_while_a_step_takes_long() -> None:
    model, state = counting(stall_s=0.5)

    async def work(client: Client) -> None:
        assert (await client.get("/health")).json()["status"] == "ok"
        model.go.clear()
        task = asyncio.create_task(client.post(PATH, json=asked()))
        await until(client, running=1)
        start = time.monotonic()
        while (response := await client.get("/health")).status_code == 200:
            assert time.monotonic() < start + 20
        assert time.monotonic() >= start + 0.2
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "stalled"
        model.go.set()
        assert (await task).status_code == 200
        assert (await client.get("/health")).status_code == 200

    with at_work(state) as address:
        on(address, work)


def test_a_request_with_nan_ends_alone() -> None:
    model, state = counting()

    async def work(client: Client) -> None:
        model.go.clear()
        good = asyncio.create_task(client.post(PATH, json=asked()))
        bad = asyncio.create_task(client.post(PATH, json=asked(NAN)))
        streamed = asyncio.create_task(client.post(PATH, json=asked(NAN, stream=True)))
        await until(client, running=3)
        model.go.set()
        assert (await good).json()["choices"][0]["text"] == "bcdefghijk"
        assert (await bad).status_code == 500
        assert "NaN" in (await bad).json()["error"]["message"]
        error, done = (await streamed).text.strip().split("\n\n")
        assert "NaN" in json.loads(error.removeprefix("data: "))["error"]["message"]
        assert done == "data: [DONE]"
        await until(client, running=0, waiting=0)

    with at_work(state) as address:
        on(address, work)


def test_a_step_that_fails_ends_what_runs_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    _, state = counting()

    async def work(client: Client) -> None:
        response = await client.post(PATH, json=asked(FAIL))
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert "as the test wants it" not in response.text
        assert (await client.post(PATH, json=asked())).status_code == 200
        await until(client, running=0, waiting=0)

    with at_work(state) as address:
        on(address, work)
    assert "as the test wants it" in caplog.text


def test_before_its_end_a_server_finishes_and_refuses() -> None:
    model, state = counting(drain_s=20)

    async def work(client: Client) -> None:
        model.go.clear()
        running = asyncio.create_task(client.post(PATH, json=asked()))
        await until(client, running=1)
        state.engine.refuse()
        late = await client.post(PATH, json=asked())
        assert late.status_code == 503
        assert int(late.headers["retry-after"]) > 0
        assert (await client.get("/health")).status_code == 503
        model.go.set()
        assert (await running).json()["choices"][0]["text"] == "bcdefghijk"

    with at_work(state) as address:
        on(address, work)


def test_a_signal_refuses_the_new_until_what_runs_is_done() -> None:
    """On connections of their own, which a socket that is closed at once would not take."""
    model, state = counting(drain_s=20)
    bound, ready = bind("127.0.0.1", 0), threading.Event()
    loop = server(state, ready.set)
    thread = threading.Thread(target=loop.run, args=([bound],))
    thread.start()
    assert ready.wait(30)
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    model.go.clear()
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(httpx.post, f"{url}{PATH}", json=asked(), timeout=60)
        while not state.engine.running:
            time.sleep(0.01)
        loop.handle_exit(signal.SIGTERM, None)
        time.sleep(0.4)
        late = httpx.post(f"{url}{PATH}", json=asked())
        assert late.status_code == 503
        assert int(late.headers["retry-after"]) > 0
        assert httpx.get(f"{url}/health").status_code == 503
        model.go.set()
        assert running.result().json()["choices"][0]["text"] == "bcdefghijk"
    thread.join(30)
    assert not thread.is_alive()


def test_what_takes_longer_than_the_end_may_is_told() -> None:
    model, state = counting(drain_s=0.1)

    async def work(client: Client) -> None:
        model.go.clear()
        running = asyncio.create_task(client.post(PATH, json=asked(max_tokens=4000, stream=True)))
        await until(client, running=1)
        state.engine.refuse()
        await asyncio.sleep(0.2)
        model.go.set()
        events = (await running).text.strip().split("\n\n")
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"

    with at_work(state) as address:
        on(address, work)


@pytest.mark.parametrize("whole", [True, False])
def test_a_client_that_stalls_is_cut_off_quietly(
    whole: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """One that reads nothing of a stream, and one that stops in the middle of its request."""
    model, state = counting()
    bound, ready = bind("127.0.0.1", 0), threading.Event()
    loop = server(state, ready.set)
    loop.config.timeout_graceful_shutdown = 0.2  # type: ignore[assignment]
    logging.getLogger("uvicorn.error").addHandler(caplog.handler)
    thread = threading.Thread(target=loop.run, args=([bound],))
    thread.start()
    body = json.dumps(asked(max_tokens=4000, stream=True)).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    try:
        assert ready.wait(30)
        with socket.create_connection(bound.getsockname()) as client:
            model.go.clear()
            client.sendall(head + (body if whole else body[:9]))
            end = time.monotonic() + 20
            while not loop.server_state.tasks or state.engine.running != whole:
                assert time.monotonic() < end
                time.sleep(0.01)
            loop.should_exit = True
            while "Cancel 1 running task(s)" not in caplog.text:
                assert time.monotonic() < end
                time.sleep(0.01)
            model.go.set()
            thread.join(30)
        assert not thread.is_alive()
    finally:
        model.go.set()
        loop.should_exit = True
        thread.join(30)
        logging.getLogger("uvicorn.error").removeHandler(caplog.handler)
    assert "Traceback" not in caplog.text
    assert "CancelledError" not in caplog.text


def test_a_silent_stream_is_kept_open() -> None:
    model, state = counting(ping_s=0.05)

    async def work(client: Client) -> None:
        model.go.clear()
        running = asyncio.create_task(client.post(PATH, json=asked(stream=True)))
        await until(client, running=1)
        await asyncio.sleep(0.3)
        model.go.set()
        events = (await running).text.strip().split("\n\n")
        assert events.count(": still at work") >= 2
        texts = [json.loads(e[6:])["choices"][0]["text"] for e in events if e.startswith("data: {")]
        assert "".join(texts) == "bcdefghijk"

    with at_work(state) as address:
        on(address, work)


def test_many_at_once_each_get_their_own() -> None:
    _, state = counting(max_live=16, max_waiting=300)

    async def work(client: Client) -> None:
        prompts = [chr(97 + number % 26) for number in range(200)]
        answers = await asyncio.gather(
            *(client.post(PATH, json=asked(each, max_tokens=3)) for each in prompts)
        )
        for prompt, answer in zip(prompts, answers, strict=True):
            want = "".join(chr((ord(prompt) - 96 + i) % 26 + 97) for i in range(3))
            assert answer.json()["choices"][0]["text"] == want
        await until(client, running=0, waiting=0)

    with at_work(state) as address:
        on(address, work)
