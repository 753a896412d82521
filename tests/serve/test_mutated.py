"""Bodies that are nearly right: whatever comes, an answer or a 4xx, and the server goes on."""

import copy
import json
import os
import random
from typing import Any

import httpx2 as httpx
import pytest

from moestro.serve.served import Served

from .serving import at_work, state_of
from .test_structure import SCHEMA

CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "é"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a", "content": "x"},
]
SAMPLING = {"temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"], "stream": False, "n": 1}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": [1, 2], "max_tokens": 2, **SAMPLING},
    "/v1/chat/completions": {
        "messages": MESSAGES,
        "max_tokens": 2,
        "tools": TOOLS,
        "tool_choice": "required",
        "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
        "stream_options": None,
        "logit_bias": {},
        "return_routed_experts": True,
        **SAMPLING,
    },
    "/v1/responses": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}],
        "max_output_tokens": 2,
        "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}],
        "text": {"format": {"type": "text"}},
        "stream": True,
    },
    "/v1/messages": {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f"}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]},
        ],
        "max_tokens": 2,
        "tools": [{"name": "f", "input_schema": SCHEMA}],
        "tool_choice": {"type": "auto"},
    },
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "a"}]},
    "/tokenize": {"prompt": "a", "add_special_tokens": True},
    "/detokenize": {"tokens": [1, 2]},
}
JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2, 0.5, 1e308, -1e-308, 2**31, 2**63, 2**64, 10**40, "", "a",
    "é\0\u202e", "\ud800", "<|user|>", "</s>", "a" * 2000, [], {}, [[]], [None], [0] * 50, {"": ""},
    {"type": "function"}, {"type": "text"}, {"$ref": "#"},
    "none", "required", "json_object", "%json", '"}', "{{ 1/0 }}",
]  # fmt: skip


def places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(pairs):
        found.append((value, key))
        if isinstance(inner, dict | list):
            places(inner, found)
    return found


def mutated(body: dict[str, Any], draw: random.Random) -> bytes:
    body = copy.deepcopy(body)
    for _ in range(draw.randint(1, 3)):
        known = places(body, [])
        if not known:
            break
        holder, key = draw.choice(known)
        kind = draw.random()
        if kind < 0.6:
            holder[key] = copy.deepcopy(draw.choice(JUNK))
        elif kind < 0.8:
            del holder[key]
        else:
            other, there = draw.choice(known)
            holder[key] = copy.deepcopy(other[there])
    raw = bytearray(json.dumps(body, ensure_ascii=draw.random() < 0.9).encode("utf-8", "replace"))
    if draw.random() < 0.15:
        place = draw.randrange(len(raw))
        raw[place : place + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 3))
    return bytes(raw)


@pytest.mark.parametrize("path", BODIES)
def test_no_body_breaks_the_server(
    served: Served, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """MOESTRO_MUTATED=20000 tries more of them."""
    draw, count = random.Random(path), int(os.environ.get("MOESTRO_MUTATED", "700")) // len(BODIES)
    seen: set[int] = set()
    with (
        at_work(state_of(served, max_waiting=500)) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        assert client.post(path, json=BODIES[path]).status_code == 200
        for _ in range(count):
            body = mutated(BODIES[path], draw)
            response = client.post(path, content=body)
            seen.add(response.status_code)
            assert response.status_code in (200, 400, 404, 413), (body, response.text)
            if response.status_code != 200:
                assert response.json()["error"]["message"]
        assert client.post(path, json=BODIES[path]).status_code == 200
        assert client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    assert {200, 400} <= seen
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
