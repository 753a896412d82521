"""/v1/responses, as the openai package and what speaks nothing else see it."""

import json
from typing import Any

import openai
import pytest
from openai import OpenAI

from .scripted import NAN, counting, reciting
from .serving import at_work
from .test_chat import HELLO, post
from .test_structure import SCHEMA, check

ASKED: Any = {"model": "tiny", "input": "Hello", "max_output_tokens": 12, "extra_body": {"seed": 7}}
TOOLS: Any = [
    {"type": "function", "name": "travel", "parameters": SCHEMA, "strict": True},
    {"type": "web_search"},
]
IMAGE = {"type": "input_image", "image_url": "x"}
FLY = {"type": "function", "name": "fly"}
UNKNOWN = {"format": {"type": "json_schema", "schema": {"not": {"type": "string"}}}}


def test_the_same_text_as_chat(client: OpenAI) -> None:
    chat = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12, seed=7)
    found = client.responses.create(**ASKED)
    assert found.output_text == chat.choices[0].message.content
    assert found.status in ("completed", "incomplete")
    assert (found.status == "incomplete") == (chat.choices[0].finish_reason == "length")
    assert found.usage is not None
    assert chat.usage is not None
    assert found.usage.input_tokens == chat.usage.prompt_tokens
    assert found.usage.output_tokens == chat.usage.completion_tokens


def test_a_stream_of_typed_events(client: OpenAI) -> None:
    whole = client.responses.create(**ASKED)
    events: list[Any] = list(client.responses.create(**ASKED, stream=True))
    assert [each.sequence_number for each in events] == list(range(len(events)))
    names = [each.type for each in events]
    assert names[:4] == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added",
    ]  # fmt: skip
    assert names[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
        f"response.{whole.status}",
    ]  # fmt: skip
    assert set(names[4:-4]) == {"response.output_text.delta"}
    text = "".join(each.delta for each in events[4:-4])
    assert text == events[-4].text == whole.output_text == events[-1].response.output_text
    assert events[-1].response.usage == whole.usage


@pytest.mark.parametrize("stream", [False, True])
def test_a_call(client: OpenAI, stream: bool) -> None:
    asked: Any = {
        "model": "tiny", "input": "Hello", "tools": TOOLS, "extra_body": {"seed": 7},
        "tool_choice": {"type": "function", "name": "travel"},
    }  # fmt: skip
    if stream:
        events: list[Any] = list(client.responses.create(**asked, stream=True))
        done = [e for e in events if e.type == "response.function_call_arguments.done"]
        deltas = [e for e in events if e.type == "response.function_call_arguments.delta"]
        assert "".join(each.delta for each in deltas) == done[0].arguments
        output = events[-1].response.output
    else:
        output = client.responses.create(**asked).output
    (call,) = output
    assert (call.type, call.name) == ("function_call", "travel")
    check(call.arguments)
    follow: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        {"type": "reasoning", "summary": []},
        {"type": "function_call", "call_id": call.call_id, "name": "travel", "arguments": "{}"},
        {"type": "function_call_output", "call_id": call.call_id, "output": "done"},
    ]
    after = client.responses.create(
        model="tiny", input=follow, tools=TOOLS, max_output_tokens=3, instructions="Be brief."
    )
    assert after.status


def test_text_of_a_schema(client: OpenAI) -> None:
    text: Any = {"format": {"type": "json_schema", "name": "trip", "schema": SCHEMA}}
    check(client.responses.create(model="tiny", input="Hello", text=text).output_text)


CALL = '<tool_call>\n{"name": "travel", "arguments": {}}\n</tool_call>'
REPLIES: dict[str, tuple[list[str], int]] = {  # what each has, and how much of it is thoughts
    "<think>Hé</think>\nYes.": (["reasoning:Hé", "message:Yes."], len(b"<think>H\xc3\xa9")),
    "<think>Hm. And": (["reasoning:Hm. And"], len("<think>Hm. And")),
    "<think></think>": (["message:"], 0),
    "": (["message:"], 0),
    f"One.\n{CALL}\nTwo.{CALL}{CALL}": (
        ["message:One.", "function_call:{}", "message:\nTwo.", *["function_call:{}"] * 2], 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", REPLIES)
def test_a_stream_has_the_items_of_the_whole(text: str) -> None:
    """In the order in which they were written."""
    tool = {"type": "function", "name": "travel", "parameters": {"type": "object"}}
    asked: Any = {"input": "Hello", "temperature": 0, "tools": [tool]}
    with at_work(reciting(text)) as address:
        whole = post(address, "/v1/responses", **asked).json()
        streamed = post(address, "/v1/responses", **asked, stream=True).text
    *_, (_, last) = (each.split("\ndata: ") for each in streamed.strip().split("\n\n"))
    want, reasoned = REPLIES[text]
    for found in (whole, json.loads(last)["response"]):
        items = [
            f"{each['type']}:{each.get('arguments') or each['content'][0]['text']}"
            for each in found["output"]
        ]
        assert items == want
        assert found["usage"]["output_tokens_details"]["reasoning_tokens"] == reasoned


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "reasoning"}]}, "input"),
        ({"input": [{"content": "a"}]}, "input.0"),
        ({"input": [{"role": "user"}]}, "input.0"),
        ({"input": [{"role": "user", "content": "a"}, {"type": "function_call"}]}, "input.1"),
        ({"input": [{"type": "function_call_output"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [IMAGE]}], "instructions": "a"}, "input.0"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input.0.role"),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"input": "a", "text": UNKNOWN}, "text.format"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "a", "tools": [{"type": "function"}]}, "tools.0"),
        ({"input": "a", "tools": [{"type": "function", "name": "a b"}]}, "tools.0.name"),
        ({"input": "a", "tools": TOOLS, "tool_choice": FLY}, "tool_choice"),
        ({"input": [{"type": "function_call_output", "output": "a"}]}, "input"),
    ],
)
def test_what_is_refused(address: str, wrong: dict[str, Any], param: str) -> None:
    """By the names of this route's fields; the template knows no results without tools."""
    response = post(address, "/v1/responses", **wrong)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert "response_format" not in error["message"]


def test_another_model(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="gpt-5", input="a")


def test_an_error_in_a_stream_is_an_event() -> None:
    _, state = counting()
    from moestro.chat import ChatTemplate

    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    state = state._replace(served=state.served._replace(template=template))
    with at_work(state) as address:
        response = post(address, "/v1/responses", input=NAN, stream=True)
    last = response.text.strip().split("\n\n")[-1]
    assert last.startswith("event: response.failed\ndata: ")
    assert "NaN" in last
