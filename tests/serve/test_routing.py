"""Which experts took each token, beside a forward of the model itself."""

import base64
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import torch

from moestro.cli.main import main
from moestro.errors import DataError
from moestro.probe.recording.answers import Answered, trace_of_answers
from moestro.probe.recording.replay import agreement, replay
from moestro.probe.recording.tracefile import read_trace, write_parts
from moestro.serve.served import Served

from .test_chat import HELLO, events, post

ASKED: dict[str, Any] = {
    "messages": HELLO, "seed": 5, "max_tokens": 6, "return_routed_experts": True,
    "return_routed_weights": True,
}  # fmt: skip


def test_experts_and_weights_are_those_of_the_model(address: str, served: Served) -> None:
    body = post(address, **ASKED).json()
    (choice,) = body["choices"]
    prompt = post(address, "/tokenize", messages=HELLO).json()["tokens"]
    experts_TLK = torch.tensor(body["prompt_routed_experts"] + choice["routed_experts"])
    weights_TLK = torch.tensor(body["prompt_routed_weights"] + choice["routed_weights"])
    assert len(body["prompt_routed_experts"]) == len(prompt)
    assert experts_TLK.shape == weights_TLK.shape
    with torch.no_grad():
        routings = served.model(torch.tensor([prompt])).routings
    for layer, routing in enumerate(routings):
        assert torch.equal(experts_TLK[: len(prompt), layer], routing.experts_TK())
        torch.testing.assert_close(
            weights_TLK[: len(prompt), layer].flatten(), routing.weights_R, atol=1e-5, rtol=1e-4
        )
    assert len(choice["routed_experts"]) == body["usage"]["completion_tokens"]


def test_a_stream_and_another_form_say_the_same(address: str) -> None:
    whole = post(address, **ASKED).json()
    chunks = events(post(address, **ASKED, stream=True, routed_experts_format="base64"))
    last = chunks[-1]
    for found, want in (
        (last["prompt_routed_experts"], whole["prompt_routed_experts"]),
        (last["choices"][0]["routed_experts"], whole["choices"][0]["routed_experts"]),
        (last["choices"][0]["routed_weights"], whole["choices"][0]["routed_weights"]),
    ):
        array = np.frombuffer(base64.b64decode(found["data"]), found["dtype"])
        np.testing.assert_array_equal(array.reshape(found["shape"]), np.array(want, found["dtype"]))
    assert all("routed_experts" not in each["choices"][0] for each in chunks[:-1])


def test_texts_of_their_own(address: str) -> None:
    asked = {"prompt": "ab", "seed": 5, "max_tokens": 6, "return_routed_experts": True}
    body = post(address, "/v1/completions", **asked, n=2).json()
    assert len(body["prompt_routed_experts"]) == 3
    first, second = body["choices"]
    assert first["routed_experts"] != second["routed_experts"]
    assert "routed_weights" not in first
    alone = post(address, "/v1/completions", **{**asked, "seed": 6}).json()
    assert alone["choices"][0]["routed_experts"] == second["routed_experts"]


def test_not_asked_for_is_not_told(address: str) -> None:
    body = post(address, messages=HELLO, max_tokens=2).json()
    assert "prompt_routed_experts" not in body
    assert "routed_experts" not in body["choices"][0]


@pytest.mark.parametrize("wrong", [{"prompt": ["a", "b"]}, {"routed_experts_format": "pickle"}])
def test_what_is_refused(address: str, wrong: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"prompt": "a", "return_routed_experts": True, **wrong}
    assert post(address, "/v1/completions", **asked).status_code == 400


def test_the_load_since_the_beginning(serving) -> None:
    address = serving()
    before = httpx.get(f"{address}/v1/routing").json()
    assert before == {"model": "tiny", "layers": [0, 1], "num_experts": 4, "load": [[0] * 4] * 2}
    body = post(address, **ASKED).json()
    experts = body["prompt_routed_experts"] + body["choices"][0]["routed_experts"]
    after = httpx.get(f"{address}/v1/routing").json()["load"]
    for layer in range(2):
        chosen = [expert for token in experts for expert in token[layer]]
        assert after[layer] == [chosen.count(expert) for expert in range(4)]


def answered(address: str, text: str) -> tuple[Answered, list[int]]:
    """An answer with its routing, and its tokens."""
    body = post(address, **{**ASKED, "messages": [{"role": "user", "content": text}]}, stream=True,
                temperature=0, stream_options={"include_experts": True})  # fmt: skip
    chunks = events(body)
    last = chunks[-1]
    (own,) = last["choices"]
    prompt = last["prompt_routed_experts"]
    messages = [{"role": "user", "content": text}]
    read = post(address, "/tokenize", messages=messages).json()["tokens"]
    written = [
        c["choices"][0]["token"]["id"] for c in chunks if "token" in c.get("choices", [{}])[0]
    ]
    passed = [*read, *written][: len(prompt) + len(own["routed_experts"])]
    weights = last["prompt_routed_weights"] + own["routed_weights"]
    experts = prompt + own["routed_experts"]
    return Answered(passed, len(read), experts, weights), written


def test_an_answer_is_a_trace_that_replays(address: str, served: Served, tmp_path) -> None:
    told = httpx.get(f"{address}/v1/models").json()["data"][0]
    answers = [answered(address, text) for text in ("Hello", "another one")]
    trace = trace_of_answers(
        served.model, told["moe_layers"], told["num_experts"], [each for each, _ in answers]
    )
    write_parts(tmp_path / "answers.npz", [trace])
    trace = read_trace(tmp_path / "answers.npz")
    assert agreement(served.model, trace).tolist() == [1, 1]
    logits = [each for part in replay(served.model, trace) for each in part.logits]
    for (answer, written), logits_SV in zip(answers, logits, strict=True):
        # The recorded routing, forced on the model, writes the same text.
        chosen = logits_SV[answer.prompt - 1 :].argmax(-1)[: len(written)]
        assert chosen.tolist() == written
    with pytest.raises(DataError, match=r"\[token, mixture, choice\]"):
        trace_of_answers(served.model, (0, 1), 4, [answers[0][0]._replace(tokens=[1])])


def test_transformers_routes_alike_on_the_converted_folder(
    address: str, folder: Path, tmp_path: Path
) -> None:
    """What vLLM and SGLang are given to serve routes as this server does."""
    transformers = pytest.importorskip("transformers")
    assert main(["convert", str(folder), str(tmp_path / "hf"), "--to", "hf"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    answer, _ = answered(address, "Hello")
    with torch.no_grad():
        found = model(torch.tensor([answer.tokens]), output_router_logits=True).router_logits
    for layer, logits_TE in enumerate(found):
        best_TK = logits_TE.topk(2, -1).indices.sort(-1).values
        assert best_TK.tolist() == [sorted(token[layer]) for token in answer.experts_TLK]
