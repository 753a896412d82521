"""/v1/messages, as the anthropic package sees it."""

import json
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic
from openai import OpenAI

from moestro.chat import ChatTemplate

from .scripted import NAN, counting, reciting
from .serving import at_work
from .test_chat import HELLO, post
from .test_structure import SCHEMA, check

ASKED: Any = {
    "model": "tiny", "messages": HELLO, "max_tokens": 12, "extra_body": {"temperature": 0.0},
}  # fmt: skip
TOOLS: Any = [
    {"name": "travel", "input_schema": SCHEMA},
    {"type": "web_search_20250305", "name": "web_search"},
]


@pytest.fixture(scope="module")
def speaker(address: str):
    with Anthropic(base_url=address, api_key="none", max_retries=0) as found:
        yield found


def test_the_same_text_as_chat(speaker: Anthropic, client: OpenAI) -> None:
    chat = client.chat.completions.create(**ASKED)
    found = speaker.messages.create(**ASKED)
    assert found.content[0].type == "text"
    assert found.content[0].text == chat.choices[0].message.content
    reasons = {"length": "max_tokens", "stop": "end_turn"}
    assert found.stop_reason == reasons[chat.choices[0].finish_reason]
    assert chat.usage is not None
    assert found.usage.input_tokens == chat.usage.prompt_tokens
    assert found.usage.output_tokens == chat.usage.completion_tokens
    assert speaker.messages.count_tokens(
        model="tiny", messages=HELLO
    ).input_tokens == found.usage.input_tokens  # fmt: skip


def test_a_stream(speaker: Anthropic) -> None:
    whole = speaker.messages.create(**ASKED)
    with speaker.messages.stream(**ASKED) as stream:
        names = [event.type for event in stream]
        final = stream.get_final_message()
    assert final.content[0].type == whole.content[0].type == "text"
    assert final.content[0].text == whole.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.stop_reason == whole.stop_reason
    assert names[0] == "message_start"
    assert names[-1] == "message_stop"


def test_a_stop_sequence(speaker: Anthropic) -> None:
    found = speaker.messages.create(**{**ASKED, "max_tokens": 40})
    assert found.content[0].type == "text"
    text = found.content[0].text
    stop = text[len(text) // 2 :][:3]
    cut = speaker.messages.create(
        **{**ASKED, "max_tokens": 40}, stop_sequences=["never said", stop]
    )
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
    assert cut.content[0].type == "text"
    assert cut.content[0].text == text[: text.index(stop)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_and_what_it_gave(speaker: Anthropic, stream: bool) -> None:
    asked: Any = {
        **ASKED, "max_tokens": 200, "tools": TOOLS,
        "tool_choice": {"type": "tool", "name": "travel"}, "system": "Be brief.",
    }  # fmt: skip
    if stream:
        with speaker.messages.stream(**asked) as events:
            found = events.get_final_message()
    else:
        found = speaker.messages.create(**asked)
    (block,) = found.content
    assert block.type == "tool_use"
    assert found.stop_reason == "tool_use"
    check(json.dumps(block.input))
    messages: Any = [
        *HELLO,
        {"role": "assistant", "content": [block.model_dump()]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": block.id, "content": "done"},
                {"type": "text", "text": "And?"},
            ],
        },
    ]
    after = speaker.messages.create(model="tiny", messages=messages, tools=TOOLS, max_tokens=2)
    assert after.usage.output_tokens <= 2


def test_a_stream_has_the_blocks_of_the_whole() -> None:
    """In the order in which they were written."""
    call = '<tool_call>\n{"name": "travel", "arguments": {}}\n</tool_call>'
    text = f"<think>Hm.</think>One.\n{call}\nTwo.{call}{call}"
    asked: Any = {"model": "counting", "messages": HELLO, "max_tokens": 900}
    asked["extra_body"] = {"temperature": 0}
    asked["tools"] = [{"name": "travel", "input_schema": {"type": "object"}}]
    with at_work(reciting(text)) as address, Anthropic(base_url=address, api_key="none") as speaker:
        whole = speaker.messages.create(**asked)
        with speaker.messages.stream(**asked) as stream:
            final = stream.get_final_message()
    for found in (whole, final):
        assert [
            each.thinking if each.type == "thinking" else each.text if each.type == "text" else {}
            for each in found.content
        ] == ["Hm.", "One.", {}, "\nTwo.", {}, {}]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"extra_body": {"temperature": -1}},
        {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "fly"}},
    ],
)
def test_what_is_refused(speaker: Anthropic, wrong: dict[str, Any]) -> None:
    with pytest.raises(anthropic.BadRequestError):
        speaker.messages.create(**{**ASKED, **wrong})


def test_an_error_names_the_message_that_was_given(address: str) -> None:
    """Not its place among those that the template gets, where the system's comes first."""
    block: Any = {"type": "tool_use", "id": "a", "input": {}}
    messages = [*HELLO, {"role": "assistant", "content": [block]}]
    asked: Any = {**ASKED, "messages": messages, "system": "Be brief."}
    said = post(address, "/v1/messages", **asked).json()["error"]["message"]
    assert said.startswith("messages.1.content.0 = ")
    tools = [TOOLS[1], {"name": "a b", "input_schema": {}}]
    said = post(address, "/v1/messages", **{**ASKED, "tools": tools}).json()["error"]["message"]
    assert said.startswith("tools.1.name = 'a b' is not allowed")


def test_errors_have_its_shape(address: str, speaker: Anthropic) -> None:
    response = post(address, "/v1/messages", **{**ASKED, "model": "speaker"})
    assert response.status_code == 404
    assert response.json()["type"] == "error"
    assert response.json()["error"]["type"] == "not_found_error"
    response = post(address, "/v1/messages", model="tiny", messages=HELLO)
    assert (response.status_code, response.json()["type"]) == (400, "error")
    assert response.json()["error"]["message"] == "max_tokens is required and was not given"
    with pytest.raises(anthropic.APIStatusError) as caught:
        speaker.messages.create(**{**ASKED, "messages": [{"role": "user", "content": "x" * 600}]})
    assert caught.value.status_code == 413


def test_an_error_in_a_stream_is_an_event() -> None:
    _, state = counting()
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    state = state._replace(served=state.served._replace(template=template))
    body: Any = {"messages": [{"role": "user", "content": NAN}], "max_tokens": 3, "stream": True}
    with at_work(state) as address:
        response = post(address, "/v1/messages", **body)
    last = response.text.strip().split("\n\n")[-1]
    assert last.startswith("event: error\ndata: ")
    assert "NaN" in last
