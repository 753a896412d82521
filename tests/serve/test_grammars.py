"""Schemas that would take an age to compile: refused, and nothing else waits for them."""

import asyncio
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest
import torch

from moestro.infer.writing import Constraint
from moestro.serve import grammars
from moestro.serve.constraints import of_json
from moestro.serve.errors import ApiError
from moestro.serve.grammars import Grammars
from moestro.serve.running import bind, server
from moestro.serve.served import Served
from moestro.text import ByteTokenizer

from .serving import at_work, state_of
from .test_chat import HELLO, post

ENDLESS = {"type": "integer", "multipleOf": 99999989}
COSTLY: dict[str, dict[str, Any]] = {
    "multipleOf": ENDLESS,
    "a common multiple": {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}], "type": "integer"},
    "many that are small": {
        "type": "object",
        "properties": {f"p{n}": {"type": "integer", "multipleOf": n} for n in range(9001, 9999, 2)},
    },
    "patternProperties": {
        "type": "object", "patternProperties": {f"^a{i}x": {"type": "null"} for i in range(400)},
    },
    "patterns": {
        "allOf": [{"type": "string", "pattern": f"(.*a.{{{i}}}b)"} for i in range(20)],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def bytes_only():
    found = Grammars(ByteTokenizer())
    yield found
    found.close()


@pytest.mark.parametrize("name", list(COSTLY))
def test_a_schema_that_takes_too_long_is_refused(
    bytes_only: Grammars, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "MOST_SECONDS", 0.1)
    with pytest.raises(ApiError, match=r"more than 0.1 s of processor time.*multipleOf") as found:
        bytes_only.constraint(of_json(COSTLY[name]), "tools")
    assert (found.value.status, found.value.param) == (400, "tools")


def test_the_next_schema_is_compiled_as_ever(bytes_only: Grammars) -> None:
    """Also those of the same kind that are honest."""
    for schema in (
        {"type": "integer", "multipleOf": 9973},
        {"type": "object", "patternProperties": {f"^a{i}x": {} for i in range(50)}},
        {"type": "object", "properties": {f"p{n}": {"type": "number"} for n in range(300)}},
    ):
        assert bytes_only.constraint(of_json(schema), "tools")().allowed().any()


def test_nothing_waits_for_a_schema_that_is_compiled(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the server's end: what is compiled then is ended."""
    monkeypatch.setattr(grammars, "MOST_SECONDS", 60.0)
    state, before = state_of(served), {*threading.enumerate()}
    form = {"type": "json_object", "schema": ENDLESS}
    body = {"messages": HELLO, "response_format": form, "max_tokens": 1}
    limits = httpx.Limits(max_connections=40)  # more than asyncio has threads on any machine
    with (
        at_work(state) as address,
        httpx.Client(timeout=60, limits=limits) as client,
        ThreadPoolExecutor(40) as clients,
    ):
        path = f"{address}/v1/chat/completions"
        held = [clients.submit(client.post, path, json=body) for _ in range(40)]
        plain = post(address, "/v1/completions", prompt="a", max_tokens=2, stream=True)
        assert plain.text.endswith("data: [DONE]\n\n")
        assert post(address, messages=HELLO, max_tokens=2).status_code == 200
        assert not any(each.done() for each in held)
        state.grammars.close()
        assert {each.result().status_code for each in held} == {503}
    for thread in {*threading.enumerate()} - before:
        thread.join(10)
        assert not thread.is_alive()


def test_the_servers_end_closes_its_grammars(served: Served) -> None:
    state = state_of(served)
    with at_work(state):
        assert state.grammars.constraint(of_json({}), "tools")
    with pytest.raises(ApiError, match="about to end"):
        state.grammars.constraint(of_json({}), "tools")


def test_a_grammar_that_is_kept_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """And texts of one grammar do not share their place in it."""
    found, grammar, asked = Grammars(ByteTokenizer()), of_json({"const": "ab"}), []
    compiled = grammars.compiled
    monkeypatch.setattr(
        grammars, "compiled", lambda words, text: asked.append(text) or compiled(words, text)
    )

    async def make() -> tuple[Constraint, Constraint]:
        first, second = await found.make(grammar, "tools"), await found.make(grammar, "text")
        return first(), second()

    first, second = asyncio.run(make())
    found.close()
    assert asked == [grammar]
    first.push(ord('"'))
    assert torch.equal(second.allowed().nonzero()[:, 0], torch.tensor([ord('"')]))
    assert torch.equal(first.allowed().nonzero()[:, 0], torch.tensor([ord("a")]))


def test_a_grammar_that_is_kept_waits_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "MOST_SECONDS", 60.0)
    found, plain = Grammars(ByteTokenizer()), of_json({"type": "null"})

    async def make() -> None:
        await found.make(plain, "tools")
        costly = asyncio.ensure_future(found.make(of_json(ENDLESS), "tools"))
        while found._pool._work_queue.qsize():  # until it has begun
            await asyncio.sleep(0.01)
        assert (await found.make(plain, "tools"))().allowed().any()
        assert not costly.done()
        found.close()
        with pytest.raises(ApiError, match="about to end"):
            await costly

    asyncio.run(make())


def test_grammars_are_kept_up_to_a_sum_of_seconds_the_last_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grammars, "MOST_KEPT_S", 3 * grammars._LEAST_S + 1e-9)
    monkeypatch.setattr(grammars.time, "thread_time", lambda: 0.0)
    found = Grammars(ByteTokenizer())
    texts = [of_json({"const": number}) for number in range(4)]

    async def make() -> None:
        for number in (0, 1, 2, 0, 3):
            await found.make(texts[number], "tools")

    asyncio.run(make())
    found.close()
    assert list(found._kept) == [texts[2], texts[0], texts[3]]


def test_what_is_refused_is_not_kept() -> None:
    found, wrong = Grammars(ByteTokenizer()), of_json({"type": "nothing"})

    async def make(param: str) -> None:
        with pytest.raises(ApiError, match=f"^{param} cannot be kept to"):
            await found.make(wrong, param)

    asyncio.run(make("tools"))
    asyncio.run(make("response_format"))
    found.close()
    assert not found._kept


def test_a_client_that_leaves_while_its_schema_waits_is_let_go(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its schema is not compiled, once it is its turn."""
    monkeypatch.setattr(grammars, "MOST_SECONDS", 60.0)
    state, gone = state_of(served), threading.Event()
    begun: list[str] = []
    make, compile_one = Grammars.make, Grammars._compile

    async def noting_the_end(self: Grammars, grammar: str, param: str) -> Any:
        try:
            return await make(self, grammar, param)
        except asyncio.CancelledError:
            gone.set()
            raise

    def noting_the_start(self: Grammars, grammar: str, param: str) -> Any:
        begun.append(grammar)
        return compile_one(self, grammar, param)

    monkeypatch.setattr(Grammars, "make", noting_the_end)
    monkeypatch.setattr(Grammars, "_compile", noting_the_start)

    def ask(address: str, schema: dict[str, Any], wait_s: float = 60) -> httpx.Response:
        form = {"type": "json_object", "schema": schema}
        body = {"messages": HELLO, "max_tokens": 1, "response_format": form}
        return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=wait_s)

    with at_work(state) as address, ThreadPoolExecutor(1) as clients:
        held = clients.submit(ask, address, ENDLESS)
        while not begun:
            time.sleep(0.01)
        with pytest.raises(httpx.ReadTimeout):
            ask(address, {"const": "left"}, 0.5)
        assert gone.wait(30)
        assert state.grammars._worker is not None
        state.grammars._worker.close()
        assert held.result().status_code == 400
        assert ask(address, {"const": "next"}).status_code == 200
    assert [("left" in text, "next" in text) for text in begun] == [(False, False), (False, True)]


def test_a_signal_ends_what_waits_for_its_schema(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, and in words; a text that is being written goes on."""
    monkeypatch.setattr(grammars, "MOST_SECONDS", 60.0)
    state = state_of(served)
    bound, ready = bind("127.0.0.1", 0), threading.Event()
    loop = server(state, ready.set)
    thread = threading.Thread(target=loop.run, args=([bound],))
    thread.start()
    assert ready.wait(30)
    path = f"http://127.0.0.1:{bound.getsockname()[1]}/v1/chat/completions"
    body = {"messages": HELLO, "response_format": {"type": "json_object", "schema": ENDLESS}}
    with ThreadPoolExecutor(1) as clients:
        held = clients.submit(httpx.post, path, json=body, timeout=60)
        while state.grammars._worker is None:
            time.sleep(0.01)
        loop.handle_exit(signal.SIGTERM, None)
        assert held.result().status_code == 503
        assert held.result().json()["error"]["code"] == "shutting_down"
    thread.join(30)
    assert not thread.is_alive()
