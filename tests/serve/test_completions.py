"""Texts that are continued."""

from typing import Any

import httpx2 as httpx
import pytest
import torch
from openai import OpenAI

from moestro.infer.engine import stream
from moestro.infer.sampling import SamplingConfig
from moestro.serve.served import Served

from .test_chat import events, post


def test_a_text_is_what_the_engine_writes(client: OpenAI, served: Served) -> None:
    sampling = SamplingConfig(seed=4, max_tokens=20, temperature=0.7, top_k=50)
    want = list(stream(served.model, served.tokenizer, "Once", sampling))
    got = client.completions.create(
        model="tiny", prompt="Once", seed=4, max_tokens=20, temperature=0.7
    )
    assert got.choices[0].text == "".join(piece.text for piece in want)
    assert got.usage is not None
    assert got.usage.completion_tokens == len(want)
    assert got.usage.prompt_tokens == len("<s>Once") - 2


def test_prompts_come_as_text_or_tokens_one_or_many(client: OpenAI, served: Served) -> None:
    asked: Any = {"model": "tiny", "seed": 1, "max_tokens": 8}
    tokens = [served.tokenizer.encode_prompt(text) for text in ("ab", "cd")]
    texts = []
    for prompt in (["ab", "cd"], tokens):
        choices = client.completions.create(**asked, prompt=prompt).choices
        assert [choice.index for choice in choices] == [0, 1]
        texts.append([choice.text for choice in choices])
    for prompt in ("ab", tokens[0]):
        texts.append([client.completions.create(**asked, prompt=prompt).choices[0].text])
    assert texts[0] == texts[1]
    assert texts[2] == texts[3] == texts[0][:1]


def test_sixteen_tokens_are_the_default(client: OpenAI) -> None:
    used = client.completions.create(model="tiny", prompt="Once", temperature=0).usage
    assert used is not None
    assert used.completion_tokens <= 16


def test_the_shape_of_a_stream(address: str) -> None:
    asked: Any = {"prompt": "Once", "seed": 3, "max_tokens": 6}
    whole = post(address, "/v1/completions", **asked).json()
    assert whole["object"] == "text_completion"
    assert whole["id"].startswith("cmpl-")
    options = {"include_usage": True}
    *chunks, used = events(
        post(address, "/v1/completions", **asked, stream=True, stream_options=options)
    )
    assert "".join(each["choices"][0]["text"] for each in chunks) == whole["choices"][0]["text"]
    reasons = [each["choices"][0]["finish_reason"] for each in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert (used["choices"], used["usage"]) == ([], whole["usage"])


def test_no_character_is_split(address: str) -> None:
    """Bytes at random make characters of several bytes, and parts of some."""
    asked: Any = {"prompt": "é", "max_tokens": 200, "temperature": 3, "top_k": 0}
    for seed in range(3):
        whole = post(address, "/v1/completions", **asked, seed=seed).json()["choices"][0]["text"]
        chunks = events(post(address, "/v1/completions", **asked, seed=seed, stream=True))
        assert "".join(each["choices"][0]["text"] for each in chunks) == whole


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([], "prompt"),
        ([[]], "prompt.0"),
        (5, "prompt"),
        ([1, "a"], None),
        ([-1], "prompt.0"),
        ([1, True], None),
        ({}, "prompt"),
    ],
)
def test_prompts_that_are_none(address: str, prompt: Any, param: str | None) -> None:
    response = post(address, "/v1/completions", prompt=prompt)
    assert response.status_code == 400
    found = response.json()["error"]["param"]
    assert found.startswith("prompt")
    if param:
        assert found == param


def test_tokens_that_the_model_does_not_know(address: str) -> None:
    response = post(address, "/v1/completions", prompt=[5, 260])
    assert response.status_code == 400
    assert "token 260" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff",
        b'{"prompt": NaN}',
        b"[" * 5000,
        b'{"prompt": 1e999}',
    ],
)
def test_bodies_that_are_no_requests(address: str, body: bytes) -> None:
    response = httpx.post(f"{address}/v1/completions", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_beginning_that_was_read_before_is_counted_and_changes_nothing(address: str) -> None:
    prompt = "A beginning that several requests have in common; " * 2
    asked: Any = {"seed": 2, "max_tokens": 6}
    alone = post(address, "/v1/completions", prompt=f"{prompt}one", **asked).json()
    again = post(address, "/v1/completions", prompt=f"{prompt}one", **asked).json()
    other = post(address, "/v1/completions", prompt=f"{prompt}two", **asked).json()
    assert again["choices"][0]["text"] == alone["choices"][0]["text"]
    cached = [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in (again, other)]
    read = again["usage"]["prompt_tokens"]
    assert cached[0] == read - 1
    assert len(prompt) // 2 < cached[1] < read


def test_a_bias_forces_and_forbids_tokens(address: str, served: Served) -> None:
    forced = served.tokenizer.encode("z")[0]
    asked: Any = {"prompt": "Once", "max_tokens": 5, "temperature": 0}
    told = post(address, "/v1/completions", **asked, logit_bias={str(forced): 100}).json()
    assert told["choices"][0]["text"] == "zzzzz"
    tokens = torch.tensor([served.tokenizer.encode_prompt("Once")])
    with torch.no_grad():
        best = served.model(tokens).logits[0, -1].argsort(descending=True).tolist()
    texts = [served.tokenizer.decode([token]) for token in best]
    # The best token but the first that is a text of its own; those before it are forbidden.
    place = next(n for n, text in enumerate(texts) if n and text.isascii() and text.isprintable())
    forbidden = {str(token): -100 for token in best[:place]}
    other = post(address, "/v1/completions", **asked | {"max_tokens": 1}, logit_bias=forbidden)
    assert other.json()["choices"][0]["text"] == texts[place]
