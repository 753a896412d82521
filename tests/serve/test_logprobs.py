"""How likely tokens were, as evaluation harnesses and OpenAI's package read it."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI

from moestro.checkpoints.opening import open_checkpoint
from moestro.data.windows import HeldOut
from moestro.infer import engine
from moestro.infer.sampling import SamplingConfig
from moestro.serve.logprobs import echoed
from moestro.serve.served import Served, serve_model
from moestro.text import ByteTokenizer, Tokenizer
from moestro.train.evaluate import evaluate

from ..vocabularies import byte_fallback
from .serving import at_work, state_of
from .test_chat import HELLO, events, post


def likely(served: Served, tokens: list[int]) -> tuple[list[float], list[bool]]:
    """Of each token but the first: its log-probability, and whether it is the likeliest."""
    with torch.no_grad():
        logits_SV = served.model(torch.tensor([tokens])).logits[0, :-1]
    logprobs_SV = logits_SV.double().log_softmax(-1)
    picked_S = torch.tensor(tokens[1:])
    own = logprobs_SV.gather(1, picked_S[:, None])[:, 0]
    return own.tolist(), (logprobs_SV.argmax(-1) == picked_S).tolist()


def harness(choice: Any, context: int) -> tuple[float, bool]:
    """What lm-eval makes of a choice: the continuation's likelihood, and whether it is greedy."""
    own = choice["logprobs"]["token_logprobs"][context:-1]
    tops = choice["logprobs"]["top_logprobs"][context:-1]
    return sum(own), all(one == max(top.values()) for one, top in zip(own, tops, strict=True))


@pytest.mark.parametrize("stream", [False, True])
def test_a_harness_gets_the_likelihood_of_a_continuation(
    address: str, served: Served, stream: bool
) -> None:
    sampling = SamplingConfig(temperature=0, max_tokens=3)
    greedy = [p.token for p in engine.stream(served.model, served.tokenizer, [5, 6], sampling)]
    prompts = [[1, 2, 3, 40, 41, 42, 43], [5, 6, *greedy]]
    asked: dict[str, Any] = {
        "prompt": prompts, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0,
        "seed": 1234,
    }  # fmt: skip
    if stream:
        choices = [{"text": "", "logprobs": {}} for _ in prompts]
        for each in events(post(address, "/v1/completions", **asked, stream=True)):
            for part in each["choices"]:
                choice = choices[part["index"]]
                choice["text"] += part["text"]
                for name, values in part["logprobs"].items():
                    choice["logprobs"][name] = choice["logprobs"].get(name, []) + values
    else:
        choices = post(address, "/v1/completions", **asked).json()["choices"]
    for prompt, choice in zip(prompts, choices, strict=True):
        assert len(choice["logprobs"]["tokens"]) == len(prompt) + 1
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert choice["logprobs"]["top_logprobs"][0] is None
        own, best = likely(served, prompt)
        for context in (1, 3):
            found, is_greedy = harness(choice, context)
            assert found == pytest.approx(sum(own[context - 1 :]), abs=1e-3)
            assert is_greedy == all(best[context - 1 :])
        assert choice["text"].startswith(served.tokenizer.decode(prompt))
    assert harness(choices[1], 2)[1]
    assert not harness(choices[0], 1)[1]


def test_bits_per_byte_are_those_of_evaluate(address: str, served: Served) -> None:
    """lm-eval's rolling likelihood, window by window, and `moestro eval` on the same text."""
    text = "".join(
        f"line {number} of a text, and what it says: {number**3}\n" for number in range(30)
    )
    tokens_NS = torch.tensor(served.tokenizer.encode(text)[: 4 * 201]).view(4, 201)
    want = evaluate(served.model, {"text": HeldOut(tokens_NS, 1.0)}, batch_size=2)["text"]
    asked: dict[str, Any] = {"max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    answer = post(address, "/v1/completions", prompt=tokens_NS.tolist(), **asked).json()
    told = [choice["logprobs"]["token_logprobs"][1:-1] for choice in answer["choices"]]
    assert [len(each) for each in told] == [200] * 4
    found = -math.fsum(itertools.chain.from_iterable(told)) / math.log(2) / 800
    assert found == pytest.approx(want, rel=1e-6)


def test_echo_of_a_text_and_nothing_more(address: str) -> None:
    asked: dict[str, Any] = {"prompt": "Once", "echo": True, "max_tokens": 0}
    plain = post(address, "/v1/completions", **asked).json()
    assert plain["choices"][0]["text"] == "Once"
    assert plain["choices"][0]["logprobs"] is None
    assert plain["choices"][0]["finish_reason"] == "length"
    assert plain["usage"]["completion_tokens"] == 0
    scored = post(address, "/v1/completions", **asked, logprobs=0).json()["choices"][0]["logprobs"]
    assert scored["tokens"] == ["<s>", "O", "n", "c", "e"]
    assert scored["text_offset"] == [0, 0, 1, 2, 3]
    assert [len(each) for each in scored["top_logprobs"][1:]] == [1] * 4
    whole = post(address, "/v1/completions", prompt="Once", echo=True, max_tokens=4, seed=1).json()
    bare = post(address, "/v1/completions", prompt="Once", max_tokens=4, seed=1).json()
    assert whole["choices"][0]["text"] == "Once" + bare["choices"][0]["text"]


@pytest.mark.parametrize("context", [None, 5])
def test_an_echo_that_fills_the_context(folder: Path, context: int | None) -> None:
    """The model's own, and less: of nothing to be written, nothing needs room."""
    served = serve_model("tiny", open_checkpoint(folder).model, folder, context)
    prompt = [1, 2, 3, 4, 5] * (served.context // 5) + [6] * (served.context % 5)
    asked: dict[str, Any] = {"prompt": prompt, "echo": True, "max_tokens": 0, "logprobs": 0}
    with at_work(state_of(served)) as address:
        whole = post(address, "/v1/completions", **asked).json()
        assert whole["usage"]["prompt_tokens"] == whole["usage"]["total_tokens"] == served.context
        own, _ = likely(served, prompt)
        found = whole["choices"][0]["logprobs"]["token_logprobs"]
        assert found == [None, *(pytest.approx(each, abs=1e-4) for each in own)]
        for more, said in (
            ({"prompt": [*prompt, 1]}, f"{served.context} tokens; send a shorter prompt"),
            ({"max_tokens": 1}, "of which the answer needs at least 1"),
            ({"echo": False, "max_tokens": 1}, "of which the answer needs at least 1"),
        ):
            refused = post(address, "/v1/completions", **asked | more)
            assert refused.status_code == 413
            assert said in refused.json()["error"]["message"]


def joined(chunks: list[Any]) -> dict[str, Any]:
    """The text and its log-probabilities, from a stream of one choice."""
    text, logprobs = "", dict[str, list[Any]]()
    for (choice,) in (each["choices"] for each in chunks):
        text += choice["text"]
        for name, values in choice["logprobs"].items():
            logprobs.setdefault(name, []).extend(values)
    return {"text": text, "logprobs": logprobs}


@pytest.mark.parametrize("echo", [False, True])
def test_where_each_token_begins(address: str, echo: bool) -> None:
    """Bytes at random: characters of several tokens, broken ones, and special tokens."""
    asked: dict[str, Any] = {
        "prompt": "hé🎻 x", "echo": echo, "max_tokens": 120, "temperature": 3, "top_k": 0,
        "logprobs": 0, "logit_bias": {"259": 8},
    }  # fmt: skip
    for seed in range(2):
        whole = post(address, "/v1/completions", **asked, seed=seed).json()["choices"][0]
        chunks = events(post(address, "/v1/completions", **asked, seed=seed, stream=True))
        assert joined(chunks) == {"text": whole["text"], "logprobs": whole["logprobs"]}
        text, offsets = whole["text"], whole["logprobs"]["text_offset"]
        if echo:
            assert offsets[:10] == [0, 0, 1, 1, 2, 2, 2, 2, 3, 4]
            assert offsets[10] == len("hé🎻 x")
        assert any(len(char.encode()) > 1 for char in text)
        assert "<|reply|>" in whole["logprobs"]["tokens"]
        seen = 0
        for token, offset in zip(whole["logprobs"]["tokens"], offsets, strict=True):
            if len(token) == 1 and token != "\ufffd":
                # A byte that began a character, and did not, comes with the next token.
                assert text[offset:].lstrip("\ufffd")[0] == token
                seen += 1
        assert seen > 10


@pytest.mark.parametrize(
    ("tokenizer", "text", "parts"),
    [
        (ByteTokenizer(), "aé", ["a", "", "é"]),
        (ByteTokenizer(), "", [""]),
        (
            byte_fallback(),
            "ab ü</s> 🎻x",
            ["a", "b", " ", "", "ü", "</s>", "", " ", *[""] * 3, "🎻", "x"],
        ),
    ],
)
def test_an_echo_by_token(tokenizer: Tokenizer, text: str, parts: list[str]) -> None:
    tokens = tokenizer.encode_prompt(text) or [tokenizer.end_of_text]
    found = echoed(tokenizer, text, tokens)
    assert "".join(found) == text
    assert found == parts
    plain = echoed(tokenizer, tokens, tokens)
    assert "".join(plain) == tokenizer.decode(tokens)
    assert [len(each) for each in plain if each] == [1] * len(tokenizer.decode(tokens))
    beyond = tokenizer.vocab_size + 1
    assert echoed(tokenizer, [beyond, *tokens], [beyond, *tokens]) == ["", *plain]


def test_the_bits_do_not_depend_on_echo(address: str) -> None:
    asked: dict[str, Any] = {"prompt": "Once", "max_tokens": 6, "seed": 3, "logprobs": 3}
    bare = post(address, "/v1/completions", **asked).json()["choices"][0]["logprobs"]
    whole = post(address, "/v1/completions", **asked, echo=True).json()["choices"][0]["logprobs"]
    assert whole["token_logprobs"][5:] == bare["token_logprobs"]
    assert whole["top_logprobs"][5:] == bare["top_logprobs"]


@pytest.mark.parametrize("stream", [False, True])
def test_those_of_a_reply(client: OpenAI, stream: bool) -> None:
    asked: Any = {
        "model": "tiny", "messages": HELLO, "seed": 3, "max_tokens": 10, "logprobs": True,
        "top_logprobs": 2,
    }  # fmt: skip
    if stream:
        entries = []
        text = ""
        for chunk in client.chat.completions.create(**asked, stream=True):
            text += chunk.choices[0].delta.content or ""
            entries += (chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or []
    else:
        choice = client.chat.completions.create(**asked).choices[0]
        assert choice.logprobs is not None
        entries, text = choice.logprobs.content or [], choice.message.content or ""
    assert entries
    assert all(each.logprob <= 0 and len(each.top_logprobs) == 2 for each in entries)
    assert all(each.top_logprobs[0].logprob >= each.logprob for each in entries)
    shown = [each.token for each in entries if "\ufffd" not in each.token]
    assert all(token in text or token.startswith("<") for token in shown)
    assert all(each.bytes == list(each.token.encode()) for each in entries if each.bytes)


def test_top_without_logprobs_is_refused(address: str) -> None:
    response = post(address, messages=HELLO, top_logprobs=2)
    assert response.status_code == 400
    assert "logprobs: true" in response.json()["error"]["message"]
    assert post(address, messages=HELLO, logprobs=True, top_logprobs=21).status_code == 400
