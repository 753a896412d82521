"""Schemas that would take an age to compile: refused, and nothing else waits for them."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest

from moestro.serve import grammars
from moestro.serve.constraints import of_json
from moestro.serve.errors import ApiError
from moestro.serve.grammars import Grammars
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
