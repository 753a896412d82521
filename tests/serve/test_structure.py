"""Replies in a form: JSON of a schema, calls of tools, thoughts set apart."""

import itertools
import json
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI

from moestro.serve.served import Served
from moestro.serve.tools import BARE, HERMES, Reader

from .serving import at_work, state_of
from .test_chat import HELLO, post

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Oslo", "Lima"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "travel", "parameters": SCHEMA}},
    {"type": "web_search"},
]
MARKED = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}"
    "{% for message in messages %}<|user|>{{ message.content }}{% endfor %}<|reply|>"
)


@pytest.fixture(scope="module")
def marked(served: Served):
    """A client of a model whose template writes calls between marks, and opens thoughts."""
    assert served.template is not None
    source = MARKED + "{% if think %}<think>\n{% endif %}{# </think> #}"
    other = served._replace(template=served.template._replace(source=source))
    with at_work(state_of(other)) as address:
        yield OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def check(text: str | None) -> dict[str, Any]:
    assert text is not None
    found = json.loads(text)
    assert set(found) == {"city", "days"}
    assert found["city"] in ("Rome", "Oslo", "Lima")
    assert 1 <= found["days"] <= 9
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_json_of_a_schema(client: OpenAI, stream: bool) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA}}
    for seed in range(3):
        asked: Any = {"model": "tiny", "messages": HELLO, "seed": seed, "temperature": 2}
        answer = client.chat.completions.create(**asked, response_format=form, stream=stream)
        if stream:
            chunks = list(answer)
            text = "".join(each.choices[0].delta.content or "" for each in chunks)
            finish = chunks[-1].choices[0].finish_reason
        else:
            text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
        check(text)
        assert finish == "stop"


def test_several_replies_are_held_each_by_itself(client: OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA}}
    asked: Any = {"model": "tiny", "messages": HELLO, "seed": 1, "temperature": 3}
    answer = client.chat.completions.create(**asked, response_format=form, n=4)
    found = [check(choice.message.content) for choice in answer.choices]
    assert len({str(each) for each in found}) > 1


def test_any_json(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, seed=3, response_format={"type": "json_object"}, max_tokens=80
    )
    text = answer.choices[0].message.content
    assert text
    assert text[0] == "{"
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_any_json_with_a_schema_beside_it(address: str) -> None:
    form = {"type": "json_object", "schema": SCHEMA}
    body = post(address, messages=HELLO, seed=3, temperature=2, response_format=form).json()
    check(body["choices"][0]["message"]["content"])


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"type": "json_object", "schema": 123}, "schema"),
        ({"type": "json_object", "schema": {"type": "hiccup"}}, "hiccup"),
        ({"type": "json_schema"}, "needs json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "schema is required"),
        ({"type": "yaml"}, "is not allowed"),
        *(
            ({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}, said)
            for schema, said in (
                ({"not": {}}, "not"),
                ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
                ({"type": "strange"}, "strange"),
                ({"$ref": "#/nowhere"}, "nowhere"),
            )
        ),
    ],
)
def test_what_cannot_be_kept_to_is_named(address: str, form: Any, said: str) -> None:
    response = post(address, messages=HELLO, response_format=form)
    assert response.status_code == 400
    error = response.json()["error"]
    assert said in error["message"]
    assert error["param"].startswith("response_format")
    assert "llguidance" not in error["message"]


CHOICES: list[Any] = ["required", {"type": "function", "function": {"name": "travel"}}]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("form", ["bare", "marked"])
def test_a_call_that_has_to_be(client: OpenAI, marked: OpenAI, choice: Any, form: str) -> None:
    used = {"bare": client, "marked": marked}[form]
    asked: Any = {
        "model": "tiny", "messages": HELLO, "tools": TOOLS, "tool_choice": choice, "seed": 2,
        "parallel_tool_calls": False,
    }  # fmt: skip
    (answer,) = used.chat.completions.create(**asked).choices
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    (call,) = answer.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "travel"
    check(call.function.arguments)
    chunks = list(used.chat.completions.create(**asked, stream=True))
    deltas = [each for c in chunks for each in c.choices[0].delta.tool_calls or []]
    assert [each.index for each in deltas] == [0]
    assert deltas[0].id
    assert deltas[0].function is not None
    assert deltas[0].function.arguments == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_conversation_goes_on_after_a_call(client: OpenAI) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "travel", "arguments": '{"a": 1}'}}
    messages: Any = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "done"},
    ]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, tools=TOOLS, max_tokens=3, tool_choice="auto"
    )
    assert answer.choices[0].message.tool_calls is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}},
        {"tool_choice": "required"},
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tools": TOOLS, "tool_choice": "sometimes"},
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
            "tool_choice": "required",
        },
    ],
)
def test_tools_that_cannot_be(address: str, wrong: dict[str, Any]) -> None:
    response = post(address, messages=HELLO, **wrong)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("tool")


@pytest.mark.parametrize("source", ["{{ messages }}", "{{ tools }}[]"])
def test_templates_that_know_no_tools(served: Served, source: str) -> None:
    """A call that is asked for and cannot be is an error, never a silent text."""
    assert served.template is not None
    other = served._replace(template=served.template._replace(source=source))
    with at_work(state_of(other)) as address:
        asked: Any = {"messages": HELLO, "tools": TOOLS, "max_tokens": 2}
        status = 200 if source.endswith("[]") else 400
        assert post(address, **asked).status_code == status
        assert post(address, **asked, tool_choice="none").status_code == 200


def test_thoughts_come_first_and_the_form_after_them(marked: OpenAI) -> None:
    """The prompt opens thoughts: what comes before their end is held to nothing."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA}}
    answer = marked.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=30, seed=1, response_format=form,
        extra_body={"chat_template_kwargs": {"think": True}},
    )  # fmt: skip
    message: Any = answer.choices[0].message
    assert not message.content
    assert message.reasoning_content == message.reasoning != ""


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
REPLIES = {
    f"I ask.\n\n{CALL}": ("I ask.", ['{"a": 1}']),
    f"{CALL}\n{CALL}": ("", ['{"a": 1}'] * 2),
    f"{CALL} and": (" and", ['{"a": 1}']),
    "a < b, <tool> or <tool_cal": ("a < b, <tool> or <tool_cal", []),
    "<tool_call>nonsense</tool_call>": ("<tool_call>nonsense</tool_call>", []),
    '<tool_call>{"name": "g", "arguments": {}}</tool_call>': (
        '<tool_call>{"name": "g", "arguments": {}}</tool_call>', [],
    ),
    '<tool_call>\n{"name": "f", "arguments": {"a": 1}}': ("", ['{"a": 1}']),
    "line\n\nline\n": ("line\n\nline\n", []),
}  # fmt: skip
BARE_REPLIES = {
    '{"name": "f", "parameters": {"a": 1}}': ("", ['{"a": 1}']),
    ' [{"name": "f", "arguments": {}}, {"name": "f"}]': ("", ["{}", "{}"]),
    '{"other": 1}': ('{"other": 1}', []),
    '{"name": "f"': ('{"name": "f"', []),
    'Hi {"name": "f", "arguments": {}}': ('Hi {"name": "f", "arguments": {}}', []),
}


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in itertools.pairwise(ends)]


@given(st.sampled_from([*REPLIES, *BARE_REPLIES]), st.lists(st.integers(0, 99)))
def test_calls_are_found_however_a_reply_is_cut(text: str, places: list[int]) -> None:
    form, want = (HERMES, REPLIES[text]) if text in REPLIES else (BARE, BARE_REPLIES[text])
    reader, said, calls = Reader(form, {"f": {}}), "", []
    for part in cut(text, places):
        more, found = reader.push(part)
        said, calls = said + more, calls + found
    more, found = reader.flush()
    assert (said + more, [each.arguments for each in [*calls, *found]]) == want


def test_a_wrong_form_is_the_packages_error(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="cannot be kept to"):
        client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}},
            },
        )


def endless(**more: Any) -> dict[str, Any]:
    """A schema whose last part refers to itself and nothing else."""
    own = {"allOf": [{"$ref": "#/$defs/own"}]}
    first = {"type": "object", "properties": more, "required": list(more), "$defs": {"own": own}}
    return {**first, "additionalProperties": False}


@pytest.mark.parametrize("where", ["response_format", "tools"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_text_that_cannot_go_on_is_the_requests_fault_and_no_news(
    address: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
    where: str, stream: bool,
) -> None:  # fmt: skip
    """Neither the log nor the answer tells the text so far, or the schema."""
    schema = endless(key={"const": "KEPT PRIVATE"}, last={"$ref": "#/$defs/own"})
    asked: dict[str, Any] = {"response_format": {"type": "json_object", "schema": schema}}
    if where == "tools":
        function = {"name": "f", "parameters": schema}
        tools = [{"type": "function", "function": function}]
        asked = {"tools": tools, "tool_choice": "required"}
    response = post(address, messages=HELLO, seed=1, stream=stream, **asked)
    assert response.status_code == (200 if stream else 400)
    last = response.text.split("data: ")[-2] if stream else response.text
    error = json.loads(last)["error"]
    assert "refers to itself without end" in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "no_choice")
    told = caplog.text + "".join(capfd.readouterr())
    assert not any(word in told + error["message"] for word in ("PRIVATE", "json", "const"))


def test_a_schema_that_refers_to_itself_alone_is_refused_at_once(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    form = {"type": "json_object", "schema": {"$ref": "#"}}
    response = post(address, messages=HELLO, response_format=form, stream=True)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "response_format"
    assert not caplog.text


def test_a_form_for_text_holds_beside_tools(marked: OpenAI) -> None:
    schema = {"enum": [{"x": 1}]}
    asked: Any = {"type": "json_schema", "name": "x", "schema": schema}
    wish: Any = {"type": "json_schema", "json_schema": asked}
    found = set()
    for seed in range(6):
        message = marked.chat.completions.create(
            model="tiny", messages=HELLO, tools=TOOLS, response_format=wish, seed=seed,
            temperature=3, parallel_tool_calls=False,
        ).choices[0].message  # fmt: skip
        for call in message.tool_calls or ():
            assert call.type == "function"
            check(call.function.arguments)
        assert message.content is None or json.loads(message.content) == {"x": 1}
        found.add(message.content is None)
    assert found == {False, True}
    flat: Any = [{"type": "function", **TOOLS[0]["function"], "strict": None}]
    answer = marked.responses.create(
        model="tiny", input="Hello", tools=flat, text={"format": asked}, temperature=1,
        parallel_tool_calls=False,
    )  # fmt: skip
    (item,) = answer.output
    assert item.type == "function_call" or json.loads(answer.output_text) == {"x": 1}


@pytest.mark.parametrize("choice", ["auto", "required", "none"])
def test_a_form_for_text_beside_calls_without_marks(address: str, choice: str) -> None:
    """Nobody could tell one from the other, where both may come."""
    asked: Any = {"tools": TOOLS, "tool_choice": choice, "response_format": {"type": "json_object"}}
    response = post(address, messages=HELLO, **asked, max_tokens=2)
    assert response.status_code == (400 if choice == "auto" else 200)
    if choice == "auto":
        assert response.json()["error"]["param"] == "response_format"
        assert "without marks" in response.json()["error"]["message"]


@pytest.mark.parametrize("field", ["tools", "response_format"])
def test_of_tools_and_a_form_the_one_that_cannot_be_is_named(address: str, field: str) -> None:
    bad, good = {"not": {}}, {"type": "object"}
    function = {"name": "f", "parameters": bad if field == "tools" else good}
    form = {"type": "json_object", "schema": good if field == "tools" else bad}
    asked: Any = {"tools": [{"type": "function", "function": function}], "response_format": form}
    response = post(address, messages=HELLO, tool_choice="required", **asked)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
