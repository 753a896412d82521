"""Calls and thoughts, as each family of models writes them."""

import itertools
import json
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.infer.writing import Constraint, Piece
from moestro.serve.constraints import json_of
from moestro.serve.grammars import Grammars
from moestro.serve.replies import Reply
from moestro.serve.schema import ChatRequest
from moestro.serve.thoughts import Thoughts, marks_of
from moestro.serve.tools import BARE, FORMS, HARMONY, Form, Reader, form_of, grammar
from moestro.text import ByteTokenizer

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "where": {"type": "array", "items": {"type": "string"}},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city"],
}
SCHEMAS = {"weather": PARAMETERS, "now": {"type": "object", "properties": {}}}
ROME, OSLO = {"city": "Rome, 1", "days": 3, "where": ["a<b"], "unit": "C"}, {"city": "42"}


class Case(NamedTuple):
    """What marks a template, and how it writes ROME, then OSLO, then a call without arguments."""

    source: str
    rome: str
    oslo: str
    now: str
    parted: str
    begin: str = ""
    end: str = ""


CASES = {
    "hermes": Case(
        "<tool_call>",
        f'<tool_call>\n{{"name": "weather", "arguments": {json.dumps(ROME)}}}\n</tool_call>',
        f'<tool_call>\n{{"name": "weather", "arguments": {json.dumps(OSLO)}}}\n</tool_call>',
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "\n",
    ),
    "qwen3-coder": Case(
        "<tool_call>\n<function=example_function_name>",
        "<tool_call>\n<function=weather>\n<parameter=city>\nRome, 1\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n"
        '<parameter=where>\n["a<b"]\n</parameter>\n<parameter=unit>\nC\n</parameter>\n'
        "</function>\n</tool_call>",
        "<tool_call>\n<function=weather>\n<parameter=city>\n42\n</parameter>\n"
        "</function>\n</tool_call>",
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "\n",
    ),
    "glm-4.5": Case(
        "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome, 1</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n"
        '<arg_key>where</arg_key>\n<arg_value>["a<b"]</arg_value>\n'
        "<arg_key>unit</arg_key>\n<arg_value>C</arg_value>\n</tool_call>",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>42</arg_value>\n</tool_call>",
        "<tool_call>now\n</tool_call>",
        "\n",
    ),
    "deepseek-v3": Case(
        "<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + name + '\\n' + '```json'",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        f"{json.dumps(ROME)}\n```<｜tool▁call▁end｜>",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        f"{json.dumps(OSLO)}\n```<｜tool▁call▁end｜>",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>",
        "\n", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
    ),
    "deepseek-v3.1": Case(
        "<｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' + arguments",
        f"<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{json.dumps(ROME)}<｜tool▁call▁end｜>",
        f"<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{json.dumps(OSLO)}<｜tool▁call▁end｜>",
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
        "", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
    ),
}  # fmt: skip
NAMES = st.sampled_from(list(CASES))
PLACES = st.lists(st.integers(0, 999))


def form_like(case: Case) -> Form:
    return form_of("{{ tools }}" + case.source)


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in itertools.pairwise(ends)]


def read(form: Form, parts: list[str]) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    reader, said, calls = Reader(form, SCHEMAS), "", []
    for part in parts:
        more, found = reader.push(part)
        said, calls = said + more, calls + found
    more, found = reader.flush()
    return said + more, [(each.name, json.loads(each.arguments)) for each in [*calls, *found]]


def test_each_form_has_marks_of_its_own() -> None:
    assert len({id(form_like(case)) for case in CASES.values()}) == len(CASES)
    assert [form for _, form in FORMS if form_of("tools" + "".join(_)) is not form] == []


@given(NAMES, PLACES)
def test_calls_are_read_however_a_reply_is_cut(name: str, places: list[int]) -> None:
    case = CASES[name]
    one = f"I ask.\n\n{case.begin}{case.rome}{case.end}"
    assert read(form_like(case), cut(one, places)) == ("I ask.", [("weather", ROME)])
    several = case.parted.join((case.rome, case.oslo, case.now))
    found = read(form_like(case), cut(case.begin + several + case.end, places))
    assert found[1] == [("weather", ROME), ("weather", OSLO), ("now", {})]
    assert not found[0].strip()


MARKS = (
    "</tool_call>", "</function>", "</parameter>", "</arg_value>", "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁end｜>", "<tool_call>", "<parameter=x>", "<｜tool▁calls▁begin｜>", " and ",
)  # fmt: skip


@given(NAMES, PLACES, st.lists(st.sampled_from(MARKS), max_size=4))
def test_an_argument_may_spell_marks_out(name: str, places: list[int], marks: list[str]) -> None:
    case, form, city = CASES[name], form_like(CASES[name]), f"say {' '.join(marks)} here"
    call = case.begin + case.oslo.replace("42", city) + case.end
    assert taken(held(form, tool_choice="auto")(), call) == len(call.encode())
    assert read(form, cut(f"So:\n{call}", places)) == ("So:", [("weather", {"city": city})])


@given(NAMES, PLACES)
def test_a_call_behind_one_that_is_none(name: str, places: list[int]) -> None:
    case = CASES[name]
    bad = case.begin + case.rome.replace("weather", "wether") + case.end
    good = case.begin + case.oslo + case.end
    found = read(form_like(case), cut(f"{bad} so\n{good}", places))
    assert found == (f"{bad} so", [("weather", OSLO)])


@given(NAMES, st.integers(1, 60))
def test_what_is_no_call_stays_text(name: str, place: int) -> None:
    """Another function, and a call that ends in its middle, where a name or its arguments lack."""
    case, form = CASES[name], form_like(CASES[name])
    other = (case.begin + case.rome + case.end).replace("weather", "wether")
    assert read(form, [other]) == (other, [])
    half = (case.begin + case.rome)[: len(case.begin) + place]
    assert read(form, [half]) == (half, [])


GRAMMARS = Grammars(ByteTokenizer())


@cache
def compiled(text: str) -> Callable[[], Constraint]:
    return GRAMMARS.constraint(text, "tools")


def held(
    form: Form, *, otherwise: str | None = None, thinking: str = "", **asked: Any
) -> Callable[[], Constraint]:
    """Makes what holds a reply with tools."""
    tools = [
        {"type": "function", "function": {"name": each, "parameters": schema}}
        for each, schema in SCHEMAS.items()
    ]
    wanted = ChatRequest.model_validate(
        {"messages": [{"role": "user", "content": "a"}], "tools": tools, **asked}
    )
    found = grammar(wanted, form, thinking=thinking, otherwise=otherwise)
    assert found is not None
    return compiled(found)


def taken(constraint: Constraint, text: str) -> int:
    """How many bytes of a text are allowed."""
    for place, byte in enumerate(text.encode()):
        if not constraint.allowed()[byte]:
            return place
        constraint.push(byte)
    return len(text.encode())


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_grammar_takes_what_the_model_was_taught(name: str, choice: str) -> None:
    case, end = CASES[name], ByteTokenizer.end_of_text
    new = held(form_like(case), tool_choice=choice)
    calls = case.begin + case.parted.join((case.rome, case.now, case.oslo)) + case.end
    right = new()
    for byte in calls.encode():
        assert right.allowed()[byte]
        right.push(byte)
    assert right.allowed()[end]
    wrong = new()
    before = (case.begin + case.rome).partition("weather")[0].encode()
    for byte in before:
        wrong.push(byte)
    assert [chr(n) for n in wrong.allowed().nonzero()[:, 0].tolist()] == ["n", "w"]
    if choice == "required":
        assert not new().allowed()[end]


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("several", [False, True])
def test_every_call_is_held_not_the_first_alone(name: str, several: bool) -> None:
    """In a second block too the schema holds; where one call may come, no other begins."""
    case, end = CASES[name], ByteTokenizer.end_of_text
    new = held(form_like(case), tool_choice="auto", parallel_tool_calls=several)
    good = f"I ask.\n{case.begin}{case.rome}{case.end}"
    bad = good.replace("weather", "whether")
    one = new()
    assert taken(one, good) == len(good.encode())
    assert one.allowed()[end]
    after = taken(one, f"\n{bad}")
    assert after == (len(f"\n{bad}".partition("hether")[0].encode()) if several else 0)
    assert taken(text := new(), "a < b, no call") == 14
    assert text.allowed()[end]


@pytest.mark.parametrize("thinking", ["", "</think>"])
@pytest.mark.parametrize("name", list(CASES))
def test_beside_a_form_for_text_a_reply_is_a_call_or_has_it(name: str, thinking: str) -> None:
    case, form = CASES[name], form_like(CASES[name])
    call = case.begin + case.oslo + case.end
    otherwise, thoughts = json_of({"enum": [{"x": 1}]}), "Hm.</think>\n" if thinking else ""
    new = held(form, tool_choice="auto", otherwise=otherwise, thinking=thinking)
    for reply, length in (
        (call, len(call.encode())),
        ('{"x": 1}', 8),
        ("I ask.", 0),
        ('{"x": 2}', 6),
        (call.replace("weather", "whether"), len(call.partition("eather")[0].encode())),
    ):
        one = new()
        assert taken(one, thoughts + reply) == len(thoughts) + length
        assert bool(one.allowed()[ByteTokenizer.end_of_text]) == (length == len(reply.encode()))


@pytest.mark.parametrize("name", ["bare", *CASES, "harmony"])
def test_of_calls_that_nothing_holds_the_first_is_told(name: str) -> None:
    if name == "harmony":
        reply = harmony(
            f"commentary to=functions.weather|{json.dumps(OSLO)}||commentary to=functions.now|{{}}",
            several=False,
        )
        assert ([each.name for each in reply.calls], reply.content) == (["weather"], "")
        return
    form, both = (
        BARE,
        f'[{{"name": "weather", "arguments": {json.dumps(OSLO)}}}, {{"name": "now"}}]',
    )
    if name != "bare":
        case = CASES[name]
        form = form_like(case)
        both = case.begin + case.parted.join((case.oslo, case.now)) + case.end
    reader = Reader(form, SCHEMAS, several=False)
    calls = [*reader.push(both)[1], *reader.flush()[1]]
    assert [each.name for each in calls] == ["weather"]


def harmony(text: str, *, several: bool = True) -> Reply:
    """A reply of gpt-oss in its channels, as `infer.channels` names them."""
    reply = Reply(None, Reader(HARMONY, SCHEMAS, several=several))
    parts = [part.split("|") for part in text.split("||")]
    for channel, said in parts:
        for letter in said:
            reply.push(Piece(letter, 0, channel=channel))
        reply.push(Piece("\n", 0, channel=""))
    reply.push(Piece("", 0, finish="end_of_text", channel=channel))
    return reply


def test_a_channel_calls() -> None:
    reply = harmony('analysis|Hm.||commentary to=functions.weather|{"city": "42"}')
    assert (reply.reasoning, reply.content, reply.finish) == ("Hm.", "", "tool_calls")
    assert [(each.name, json.loads(each.arguments)) for each in reply.calls] == [("weather", OSLO)]
    reply = harmony('commentary to=functions.weather|{"city": ||commentary to=functions.now|{}')
    assert [each.name for each in reply.calls] == ["now"]
    assert reply.content == '{"city": '
    reply = harmony("commentary to=functions.other|{}||commentary to=python|1||final|{1}")
    assert (reply.calls, reply.content, reply.reasoning) == ([], "{}{1}", "1")


THOUGHTS = {
    ("<think>\nHm.</think>\n\nYes.", False): ("Hm.", "Yes."),
    ("Hm.</think>Yes.", True): ("Hm.", "Yes."),
    (" <think>Hm, <b> and </th", False): ("Hm, <b> and </th", ""),
    ("No <think>thoughts</think>", False): ("", "No <think>thoughts</think>"),
    ("\n<thin air", False): ("", "\n<thin air"),
    ("", True): ("", ""),
    ("[THINK]a]b[/THINK]c", False): ("a]b", "c"),
    ("<seed:think>a<b</seed:think>\nc", False): ("a<b", "c"),
    ("◁think▷a◁b◁/think▷c", False): ("a◁b", "c"),
}


@given(st.sampled_from(list(THOUGHTS)), PLACES)
def test_thoughts_are_found_however_a_reply_is_cut(
    case: tuple[str, bool], places: list[int]
) -> None:
    text, opened = case
    reader, thought, said = Thoughts(opened, marks_of(text) or ("<think>", "</think>")), "", ""
    for part in cut(text, places):
        more = reader.push(part)
        thought, said = thought + more[0], said + more[1]
    more = reader.flush()
    assert (thought + more[0], said + more[1]) == THOUGHTS[case]
