"""Conversations, as the openai package and plain HTTP see them."""

import json
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai import OpenAI

HELLO: Any = [{"role": "user", "content": "Hello"}]


def post(address: str, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    return httpx.post(f"{address}{path}", json=body, timeout=60)


def events(response: httpx.Response) -> list[Any]:
    """What follows `data: ` in a stream, parsed but for the end's mark."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_seed_gives_the_same_answer_streamed_or_not(client: OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": HELLO, "seed": 7, "max_tokens": 20}
    whole = client.chat.completions.create(**asked)
    text = whole.choices[0].message.content
    assert text
    assert whole.choices[0].finish_reason in ("stop", "length")
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
    other = client.chat.completions.create(**{**asked, "seed": 8})
    assert other.choices[0].message.content != text


def test_no_seed_is_not_always_the_same(client: OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 30, "temperature": 2}
    texts = {client.chat.completions.create(**asked).choices[0].message.content for _ in range(3)}
    assert len(texts) > 1


def test_the_shape_of_a_stream(address: str) -> None:
    """A role first, then text, then a reason, then what was used, all of one id."""
    options = {"include_usage": True}
    found = events(
        post(address, messages=HELLO, stream=True, stream_options=options, max_tokens=5, seed=1)
    )
    first, *texts, last, used = found
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert texts
    assert all(set(each["choices"][0]["delta"]) == {"content"} for each in texts)
    assert all(each["choices"][0]["finish_reason"] is None for each in [first, *texts])
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "length"
    assert used["choices"] == []
    assert used["usage"]["completion_tokens"] == 5
    assert [each["usage"] for each in found[:-1]] == [None] * (len(found) - 1)
    assert len({each["id"] for each in found}) == 1
    assert {each["object"] for each in found} == {"chat.completion.chunk"}


def test_usage_is_absent_from_a_stream_that_did_not_ask(address: str) -> None:
    found = events(post(address, messages=HELLO, stream=True, max_tokens=3))
    assert all("usage" not in each for each in found)


def test_usage_counts_the_tokens_of_the_template(client: OpenAI) -> None:
    used = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4, seed=1).usage
    assert used is not None
    assert used.prompt_tokens == len("Hello") + 3  # <s><|user|>Hello<|reply|>
    assert used.completion_tokens == 4
    assert used.total_tokens == used.prompt_tokens + 4
    assert used.prompt_tokens_details is not None
    assert used.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_are_never_shown(client: OpenAI, stream: bool) -> None:
    asked: Any = {"model": "tiny", "messages": HELLO, "seed": 3, "max_tokens": 60}
    text = client.chat.completions.create(**asked).choices[0].message.content
    assert text
    stop = text[10:13]
    for given in (stop, ["never said", stop]):
        answer = client.chat.completions.create(**asked, stop=given, stream=stream)
        if stream:
            chunks = list(answer)
            got = "".join(c.choices[0].delta.content or "" for c in chunks)
            last: Any = chunks[-1].choices[0]
        else:
            last = answer.choices[0]
            got = last.message.content
        assert got == text[: text.index(stop)]
        assert (last.finish_reason, last.stop_reason) == ("stop", stop)


def test_several_answers_have_seeds_of_their_own(client: OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 12}
    three = client.chat.completions.create(**asked, n=3, seed=5)
    alone = [client.chat.completions.create(**asked, seed=5 + i) for i in range(3)]
    texts = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert texts == [each.choices[0].message.content for each in alone]
    chunks = list(client.chat.completions.create(**asked, n=3, seed=5, stream=True))
    streamed = ["", "", ""]
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_max_completion_tokens_comes_before_max_tokens(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=9, max_completion_tokens=2, seed=1
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2


def test_greedy_settings_leave_no_choice(client: OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 12}
    texts = {
        client.chat.completions.create(**asked, **settings).choices[0].message.content
        for settings in (
            {"temperature": 0},
            {"extra_body": {"top_k": 1}},
            {"extra_body": {"min_p": 1.0}},
            {"top_p": 1e-9},
        )
    }
    assert len(texts) == 1


def test_content_may_come_in_parts(address: str) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    asked: Any = {"seed": 1, "max_tokens": 8}
    whole = post(address, messages=HELLO, **asked).json()
    split = post(address, messages=[{"role": "user", "content": parts}], **asked).json()
    assert split["choices"][0]["message"] == whole["choices"][0]["message"]


def test_a_developer_is_the_system(address: str) -> None:
    answers = [
        post(
            address, messages=[{"role": role, "content": "Be brief."}, *HELLO], seed=1, max_tokens=8
        ).json()["choices"]
        for role in ("system", "developer")
    ]
    assert answers[0] == answers[1]


WRONG: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": []}, "messages"),
    ({}, "messages"),
    ({"messages": HELLO, "stop": 5}, "stop"),
    ({"messages": HELLO, "stop": [""]}, "stop.0"),
    ({"messages": HELLO, "temperature": -1}, "temperature"),
    ({"messages": HELLO, "temperature": "hot"}, "temperature"),
    ({"messages": HELLO, "max_tokens": 0}, "max_tokens"),
    ({"messages": HELLO, "max_tokens": -1}, "max_tokens"),
    ({"messages": HELLO, "n": 0}, "n"),
    ({"messages": HELLO, "stream": "yes"}, "stream"),
    ({"messages": HELLO, "top_p": 0}, "top_p"),
    ({"messages": HELLO, "logit_bias": {"99999": 1}}, "logit_bias"),
    ({"messages": HELLO, "logit_bias": {"x": 1}}, "logit_bias"),
    ({"messages": HELLO, "logit_bias": {"5": 101}}, "logit_bias"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
    ({"messages": HELLO, "chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs.messages"),
]


@pytest.mark.parametrize(("body", "param"), WRONG)
def test_what_is_wrong_is_named(address: str, body: dict[str, Any], param: str | None) -> None:
    response = post(address, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]


def test_the_package_raises_its_own_errors(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature = -1 is not allowed"):
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=-1)
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.chat.completions.create(model="gpt-4", messages=HELLO)


def test_a_prompt_longer_than_the_context_is_never_cut(address: str) -> None:
    response = post(address, messages=[{"role": "user", "content": "x" * 600}])
    assert response.status_code == 413
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (603, 512)


def test_an_answer_ends_where_the_context_does(address: str) -> None:
    body = post(
        address, messages=[{"role": "user", "content": "x" * 500}], max_tokens=4000, seed=2
    ).json()
    assert body["usage"]["total_tokens"] <= 512
    assert body["choices"][0]["finish_reason"] in ("length", "stop")
