"""What Prometheus reads."""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import pytest

from .scripted import NAN, counting
from .serving import at_work


def figures(address: str) -> dict[str, float]:
    text = httpx.get(f"{address}/metrics").text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_requests_and_tokens_are_counted() -> None:
    _, state = counting()
    with at_work(state) as address:
        path, own = f"{address}/v1/completions", '{model_name="counting"}'
        for stream in (False, True):
            body = {"prompt": "abc", "max_tokens": 5, "n": 2, "stream": stream}
            assert httpx.post(path, json=body).status_code == 200
        assert httpx.post(path, json={"prompt": "a", "stop": "c"}).status_code == 200
        assert httpx.post(path, json={"prompt": NAN}).status_code == 500
        found = figures(address)
    assert found[f"moestro:prompt_tokens_total{own}"] == 4 * 3 + 1 + 1
    assert found[f"moestro:generation_tokens_total{own}"] == 4 * 5 + 2
    ended = 'moestro:request_success_total{finished_reason="%s",model_name="counting"}'
    assert found[ended % "length"] == 4
    assert found[ended % "stop"] == 1
    assert found[f"moestro:request_failure_total{own}"] == 1
    assert found[f"moestro:time_to_first_token_seconds_count{own}"] == 5
    assert found[f"moestro:e2e_request_latency_seconds_count{own}"] == 5
    assert found[f"moestro:inter_token_latency_seconds_count{own}"] == 4 * 4 + 1
    assert found[f"moestro:num_requests_running{own}"] == 0


def test_waiting_reading_and_writing_add_up_to_the_whole() -> None:
    """The second text waits until the first is done, whose last step is held up."""
    model, state = counting(max_live=1)
    with at_work(state) as address, ThreadPoolExecutor(2) as threads:
        model.go.clear()
        for _ in range(2):
            body = {"prompt": "abc", "max_tokens": 2}
            threads.submit(httpx.post, f"{address}/v1/completions", json=body)
        while state.engine.waiting < 1:
            time.sleep(0.01)
        time.sleep(0.3)
        model.go.set()
        threads.shutdown()
        found = figures(address)
    queue, prefill, decode, whole = (
        found[f'moestro:{name}_seconds_sum{{model_name="counting"}}']
        for name in (
            "request_queue_time", "request_prefill_time", "request_decode_time",
            "e2e_request_latency",
        )
    )  # fmt: skip
    assert queue > 0.3
    assert prefill > 0.3
    assert decode < 0.3
    assert queue + prefill + decode == pytest.approx(whole)


def test_the_load_of_experts(serving) -> None:
    address = serving()
    name = 'moestro:expert_load_max_over_mean{layer="%d",model_name="tiny"}'
    assert [figures(address)[name % layer] for layer in (0, 1)] == [0.0, 0.0]
    body = {"prompt": "some text", "max_tokens": 20, "seed": 1}
    assert httpx.post(f"{address}/v1/completions", json=body).status_code == 200
    load = httpx.get(f"{address}/v1/routing").json()["load"]
    want = [max(row) * len(row) / sum(row) for row in load]
    assert [figures(address)[name % layer] for layer in (0, 1)] == pytest.approx(want)
