"""Long bodies, prompts and answers of one client do not hold up what others are told."""

import json
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest

from moestro.serve.events import json_text
from moestro.serve.served import Served
from moestro.text import train_bpe

from .serving import at_work, state_of

LONG = "a " * 150
ROUTED = {"max_tokens": 2, "return_routed_experts": True}
SCORED = {"max_tokens": 2, "echo": True, "logprobs": 2}


def held(wait: threading.Event, begun: threading.Event, real: Callable[..., Any]) -> Any:
    """A function that does not go on until a test lets it."""

    def holding(*given: Any, **named: Any) -> Any:
        begun.set()
        assert wait.wait(30)
        return real(*given, **named)

    return holding


@pytest.mark.parametrize(
    ("name", "path", "body"),
    [
        ("moestro.serve.app.parse", "/v1/completions", {"prompt": "a", "user": "x" * 20_000}),
        ("moestro.serve.served.encode", "/v1/completions", {"prompt": LONG}),
        *(
            ("moestro.serve.completions.routed_fields", "/v1/completions", {"prompt": LONG, **more})
            for more in (ROUTED, ROUTED | {"stream": True})
        ),
        *(
            ("moestro.serve.completions.of_completion", "/v1/completions", {"prompt": LONG, **more})
            for more in (SCORED, SCORED | {"stream": True})
        ),
        *(
            (
                "moestro.serve.chat.routed_fields",
                "/v1/chat/completions",
                {"messages": [{"role": "user", "content": LONG}], **more},
            )
            for more in (ROUTED, ROUTED | {"stream": True})
        ),
    ],
)
def test_health_is_told_meanwhile(
    served: Served, monkeypatch: pytest.MonkeyPatch, name: str, path: str, body: dict[str, Any]
) -> None:
    """On the loop's own thread, what is held here would hold /health up, too."""
    wait, begun = threading.Event(), threading.Event()
    module, _, function = name.rpartition(".")
    monkeypatch.setattr(name, held(wait, begun, getattr(sys.modules[module], function)))
    with at_work(state_of(served)) as address, ThreadPoolExecutor(1) as threads:
        answer = threads.submit(httpx.post, f"{address}{path}", json=body, timeout=60)
        try:
            assert begun.wait(30)
            assert httpx.get(f"{address}/health", timeout=20).status_code == 200
            assert httpx.get(f"{address}/metrics", timeout=20).status_code == 200
        finally:
            wait.set()
        assert answer.result().status_code == 200


def test_other_threads_go_on_while_a_prompt_is_encoded() -> None:
    tokenizer, ticks, done = train_bpe(["the quick brown fox"], 300), 0, threading.Event()
    text = "the quick brown fox " * 20_000

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.001):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        time.sleep(0.02)
        before = ticks
        tokenizer.encode_prompt(text)
        during = ticks - before
    finally:
        done.set()
        thread.join()
    assert during >= 5


@pytest.mark.parametrize(
    "value",
    [
        None, 1.5, "é\n\"", [], {}, {"a": []}, list(range(65)), [{"b": [None] * 70}] * 66,
        {"choices": [{"text": "x", "experts": [[[0, 1], [2, 3]]] * 80}], "usage": {"total": 1}},
    ],
)  # fmt: skip
def test_json_in_parts_is_json(value: Any) -> None:
    assert json_text(value) == json.dumps(value, ensure_ascii=False, separators=(",", ":"))
