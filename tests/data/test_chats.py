"""Conversations are read as the server reads them, and what is none is named."""

import json

import pytest

from moestro.chat import from_json
from moestro.config import ChatConfig, DataConfig
from moestro.data.chats import read_chats
from moestro.errors import DataError
from moestro.serve.schema import ChatMessage

from .messages import ANSWER, ASK, CALL, SYSTEM, THOUGHT

DEVELOPER = {"role": "developer", "content": "Be long."}
SPOKEN = {
    "conversations": [
        {"from": "human", "value": ASK["content"]}, {"from": "gpt", "value": ANSWER["content"]},
    ]
}  # fmt: skip
TEXT, HALF = {"type": "text", "text": "Be short."}, {"type": "text", "text": "\ud800"}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}, "text": None}


def line(tmp_path, record):
    path = tmp_path / "chats.jsonl"
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    return DataConfig(sources=(str(path),), chat=ChatConfig())


def test_every_shape_becomes_the_same_conversation(tmp_path):
    shapes = [
        {"messages": [ASK, ANSWER]},
        {"prompt": [ASK], "completion": [ANSWER]},
        SPOKEN,
    ]
    for shape in shapes:
        (chat,) = read_chats(line(tmp_path, {**shape, "tools": [1]}))
        assert (chat.messages, chat.turns) == ((ASK, ANSWER), [1])
        assert chat.variables == {"tools": [1]}
    nothing = dict.fromkeys(("messages", "conversations", "completion", "text", "tools"))
    for shape in (*shapes, {"text": "a"}):
        assert list(read_chats(line(tmp_path, nothing | shape))) == list(
            read_chats(line(tmp_path, shape))
        )
    with_history = {"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]}
    (chat,) = read_chats(line(tmp_path, with_history))
    assert chat.turns == [3]


@pytest.mark.parametrize("before", [{"system": ""}, {"system": "Be short."}, {"system": [TEXT]}])
def test_system_beside_messages_is_the_first(before, tmp_path):
    shapes = [{"messages": [ASK, ANSWER]}, SPOKEN, {"prompt": [ASK], "completion": [ANSWER]}]
    first = [SYSTEM] if before["system"] else []
    for shape in shapes:
        (chat,) = read_chats(line(tmp_path, {**shape, **before}))
        assert chat.messages == (*first, ASK, ANSWER)
        assert chat.turns == [len(first) + 1]


def test_parts_are_joined_as_the_server_joins_them(tmp_path):
    asked = {"role": "user", "content": [TEXT, {"type": "text", "text": ""}, TEXT]}
    (chat,) = read_chats(line(tmp_path, {"messages": [asked, {**ANSWER, "content": [TEXT]}]}))
    assert [each["content"] for each in chat.messages] == ["Be short.Be short.", "Be short."]
    assert chat.messages[0]["content"] == ChatMessage(**asked).text


@pytest.mark.parametrize("tools", [[{"name": "sky"}], '[{"name": "sky"}]', [], "[]", "", None])
def test_tools_calls_and_variables_may_be_json_as_a_text(tools, tmp_path):
    called = {**CALL, "tool_calls": json.dumps(CALL["tool_calls"])}
    record = {"messages": [ASK, called], "tools": tools, "chat_template_kwargs": '{"a": [1]}'}
    (chat,) = read_chats(line(tmp_path, record))
    assert chat.messages == (ASK, CALL)
    wanted = {"tools": [{"name": "sky"}]} if tools and "sky" in str(tools) else {}
    assert chat.variables == {"a": [1], **wanted}


@pytest.mark.parametrize(
    ("written", "read"),
    [('{"at": "Bonn"}', {"at": "Bonn"}), ("", {}), ("not JSON", "not JSON"), ({"a": 1}, {"a": 1})],
)
@pytest.mark.parametrize("nested", [True, False])
def test_arguments_of_calls_are_what_the_server_gives_a_template(written, read, nested, tmp_path):
    def called(arguments):
        call = {"name": "sky", "arguments": arguments}
        return {**CALL, "tool_calls": [{"type": "function", "function": call} if nested else call]}

    (chat,) = read_chats(line(tmp_path, {"messages": [ASK, called(written)]}))
    assert chat.messages == (ASK, called(read))
    if isinstance(written, str):
        assert from_json(written) == read  # which serve calls


def test_weights_of_other_roles_and_of_sharegpt(tmp_path):
    spoken = [
        {"from": "human", "value": "a", "weight": None}, {"from": "gpt", "value": "b", "weight": 0},
        {"from": "human", "value": "c", "weight": 0}, {"from": "gpt", "value": "d", "weight": 1.0},
    ]  # fmt: skip
    (chat,) = read_chats(line(tmp_path, {"conversations": spoken}))
    assert chat.turns == [3]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": [ASK, {**ANSWER, "weight": 0}]}, "nothing to learn.*weight 0"),
        ({"messages": [ASK, {**ANSWER, "weight": 0.5}]}, r"message 1 \(assistant\) has the weight"),
        ({"messages": [ASK, {**ANSWER, "weight": True}]}, r"weight True; it is 0 \(not learned\)"),
        ({"messages": [ASK, {**ANSWER, "weight": "0"}]}, "weight '0'; it is 0"),
        ({"messages": [{**ASK, "weight": 1}, ANSWER]}, r"message 0 \(user\).*only turns of the"),
        ({"messages": [ASK, ANSWER], "tools": "sky"}, "tools is 'sky'; it is a list, or the JSON"),
        ({"messages": [ASK, ANSWER], "tools": '{"name": "sky"}'}, "tools is .*it is a list"),
        ({"messages": [ASK, ANSWER], "tools": "null"}, "tools is 'null'; it is a list"),
        ({"messages": [ASK, ANSWER], "tools": {"name": "sky"}}, "tools is .*it is a list"),
        ({"messages": [ASK, ANSWER], "tools": "[" * 10**5}, "tools is .*…; it is a list"),
        ({"messages": [ASK, {**CALL, "tool_calls": "x"}]}, r"tool_calls of message 1 \(assis"),
        ({"messages": [ASK, ANSWER], "chat_template_kwargs": "[]"}, "kwargs is .* an object"),
        *(
            ({"messages": [ASK, ANSWER], "chat_template_kwargs": {name: []}}, f"set {name}")
            for name in ("messages", "add_generation_prompt", "reply", "tools")
        ),
        ({"messages": [ASK]}, "no turn of the assistant"),
        ({"messages": [ASK, {"role": "robot", "content": "x"}]}, "role 'robot'; known are system"),
        ({"messages": [ASK, {"role": "assistant"}]}, "neither content nor tool_calls"),
        ({"messages": [ASK, {"role": "assistant", "content": 4}]}, "content 4; it is a text"),
        (
            {"messages": [ASK, {**ANSWER, "content": []}]},
            r"content \[\]; it is a text, or a list of",
        ),
        (
            {"messages": [{**ASK, "content": {"text": "x"}}, ANSWER]},
            "content {.*; it is a text, or",
        ),
        (
            {"messages": [{**ASK, "content": [IMAGE]}, ANSWER]},
            r"message 0 \(user\) .*no text; text is",
        ),
        ({"messages": [{**ASK, "content": ["x"]}, ANSWER]}, "the part 'x', which has no text"),
        ({"messages": [ASK, {**THOUGHT, "thinking": ["x"]}]}, "the thinking .*; it is a text"),
        ({"conversations": [{"from": "human", "value": [5]}]}, "the part 5, which has no text"),
        ({"messages": []}, "not a list of at least one"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "from 'bot'; known are"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "from .*human.*; known are"),
        ({"prompt": "a", "completion": [ANSWER]}, "prompt is 'a' and completion .*two texts, or"),
        ({"completion": "a"}, "prompt is None and completion 'a'; give two texts"),
        ({"messages": None}, "its fields are none; expected messages"),
        ({"question": "x"}, "its fields are 'question'; expected messages"),
        ({"text": ""}, "its fields are 'text'|nothing to learn"),
        ({"text": "\ud800"}, "half of a surrogate pair"),
        (
            {"messages": [ASK, {**ANSWER, "content": "\ud800"}]},
            r"message 1 \(assistant\): .*surrogate",
        ),
        ({"messages": [ASK, {**ANSWER, "content": [HALF]}]}, "message 1 .*surrogate"),
        ({"messages": [ASK, {**CALL, "tool_calls": [HALF]}]}, "message 1 .*surrogate"),
        ({"messages": [ASK, {**CALL, "tool_calls": json.dumps([HALF])}]}, "message 1 .*surrogate"),
        ({"messages": [ASK, ANSWER], "tools": [{"a": [HALF]}]}, "tools: .*surrogate"),
        ({"messages": [ASK, ANSWER], "tools": json.dumps([HALF])}, "tools: .*surrogate"),
        ({"messages": [ASK, ANSWER], "chat_template_kwargs": {"\ud800": 1}}, "kwargs: .*surrogate"),
        ({"messages": [SYSTEM, ASK, ANSWER], "system": "x"}, r"'x', but message 0 \(system\) is"),
        (
            {"messages": [ASK, DEVELOPER, ANSWER], "system": "x"},
            r"message 1 \(developer\) is the sys",
        ),
        ({"messages": [ASK, ANSWER], "system": 5}, "system has the content 5; it is a text"),
        ({**SPOKEN, "system": {"a": 1}}, "system has the content {.*; it is a text"),
        ({"prompt": [ASK], "completion": [SYSTEM, ANSWER], "system": "x"}, "but message 1"),
        ({"prompt": "a", "completion": "b", "system": "x"}, "'x', but prompt and completion are t"),
        ("[1]", "not a JSON object"),
        ("{", "is not JSON"),
    ],
)
def test_a_line_of_no_known_shape_is_named(record, words, tmp_path):
    with pytest.raises(DataError, match=words) as raised:
        list(read_chats(line(tmp_path, record)))
    assert "line 1" in str(raised.value)


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (("nothere.jsonl",), r"no such file or folder: nothere\.jsonl; give a \.jsonl file"),
        ((), "data.sources is empty"),
        (("builtin",), "'builtin', which is text, not conversations; give a .jsonl"),
    ],
)
def test_built_in_text_is_neither_read_nor_offered(sources, words):
    with pytest.raises(DataError, match=words) as raised:
        list(read_chats(DataConfig(sources=sources, chat=ChatConfig())))
    assert sources == ("builtin",) or "builtin" not in str(raised.value)
