"""Chat templates against transformers, and templates that mean harm."""

import json
from pathlib import Path

import pytest
import tokenizers

from moestro import sandbox
from moestro.chat import LONGEST_TEMPLATE, ChatTemplate, load_chat
from moestro.errors import DataError
from moestro.text import load_tokenizer

INSTRUCT = """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('roles must alternate: user, assistant, user') }}
{%- endif %}
{% if message.role == 'user' %}
    {{- '[INST] ' ~ message.content ~ ' [/INST]' }}
{%- else %}
    {{- ' ' + message.content|trim + eos_token }}
{%- endif %}{% endfor %}"""

TURNS = """{%- macro turn(role, text) %}<|im_start|>{{ role }}
{{ text }}<|im_end|>
{% endmacro %}
{%- set ns = namespace(last=-1, count=0) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" and message.content is string %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- if messages[0].role != 'system' %}{{- turn('system', 'You help.') }}{% endif %}
{%- if tools %}{{- turn('system', 'Tools:\n' ~ (tools|map('tojson')|join('\n'))) }}{% endif %}
{%- for message in messages %}
    {%- set text = message.content %}
    {%- if '</think>' in text and loop.index0 < ns.last %}
        {%- set text = text.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {%- generation %}{{- turn(message.role, text|replace('\r\n', '\n')) }}{% endgeneration %}
    {%- set ns.count = ns.count + 1 %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""

CHANNELS = """{%- macro parameters(tool) %}
    {%- for name, kind in tool.parameters.properties|dictsort %}
        {{- "  " + name + ": " + kind.type|default('any') + ",\\n" }}
    {%- endfor %}
{%- endmacro %}
<|start|>system<|message|>Reasoning: {{ reasoning_effort|default("medium") }}
{{- "\\n" ~ ('%s tools' % (tools or [])|length) }}<|end|>
{%- for tool in tools or [] %}{{ parameters(tool.function) }}{% endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|start|>assistant<|channel|>final<|message|>' ~ message.content }}
        {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
    {%- else %}
        {{- '<|start|>' ~ message.role ~ '<|message|>' ~ message.content|trim ~ '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}
{{- messages|selectattr('role', 'equalto', 'user')|list|length|string|center(5)|upper|indent(2) }}
{{- {'é': [1, none, true], 'a': '<&>'}|tojson(indent=2, sort_keys=true) }}"""

TALK = [
    {"role": "user", "content": " How many? \r\n<b>漢字</b> "},
    {"role": "assistant", "content": '<think>two, or\nthree</think>\n\nTwo, "I" think. '},
    {"role": "user", "content": "Really <|im_end|> and </s>?", "name": None},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"properties": {"b": {"type": "number"}, "a": {"description": "<é>"}}},
    },
}
MARKS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|message|>"]


@pytest.fixture(scope="module")
def tokenizer():
    """A transformers tokenizer of bytes and MARKS that puts <s> before a text."""
    transformers = pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE({mark: place for place, mark in enumerate(alphabet)}, [])
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(MARKS)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<|end|>"
    )


@pytest.mark.parametrize("reply", [True, False])
@pytest.mark.parametrize(
    ("source", "variables"),
    [
        (INSTRUCT, {}),
        (TURNS, {}),
        (TURNS, {"tools": [TOOL], "enable_thinking": False}),
        (CHANNELS, {}),
        (CHANNELS, {"tools": [TOOL], "reasoning_effort": "high"}),
    ],
)
def test_text_and_tokens_are_those_of_transformers(tokenizer, tmp_path, source, variables, reply):
    tokenizer.chat_template = source
    tokenizer.save_pretrained(tmp_path)
    wanted = tokenizer.apply_chat_template(
        TALK, tokenize=False, add_generation_prompt=reply, **variables
    )
    text = load_chat(tmp_path).render(TALK, reply=reply, **variables)
    assert text == wanted
    tokens = tokenizer.apply_chat_template(
        TALK, add_generation_prompt=reply, return_dict=False, **variables
    )
    assert load_tokenizer(tmp_path).encode_prompt(text, templated=True) == tokens


CALLS = """{% for message in messages %}{{ message.role }}:
{%- if message['content'] is none %} none{% elif message.content is defined %} is{% endif %}
{%- if 'content' in message %} in{% endif %} {{ message.content }}{{ message.get('content', 'x') }}
{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{%- if "thinking" in message %}<|channel|>analysis{{ message.thinking }}{% endif %}
{%- if message.tool_calls %}{% for call in message.tool_calls %}{{ call.function|tojson }}
{{- call.id is none }}{% endfor %}{% endif %}{{ message|tojson }}
{% endfor %}{{ tools is none }}{{ documents is none }}"""
CALL = {"id": None, "type": "function", "function": {"name": "add", "arguments": {"a": None}}}


@pytest.mark.parametrize(
    "reply",
    [
        {"content": None, "tool_calls": [CALL]},
        {"tool_calls": [CALL]},
        {"content": "", "tool_calls": None},
        {"content": None, "tool_calls": [CALL], "reasoning": "so"},
        {"content": None, "tool_calls": [CALL], "thinking": "so", "reasoning": "then"},
        {"content": None, "tool_calls": [CALL], "reasoning_content": "so", "thinking": "then"},
        {"content": "4", "reasoning_content": None, "thinking": "", "reasoning": "then"},
    ],
)
def test_null_and_thoughts_are_shown_as_by_transformers(tokenizer, reply):
    talk = [TALK[0], {"role": "assistant", **reply}, {"role": "tool", "content": "3"}]
    wanted = tokenizer.apply_chat_template(talk, chat_template=CALLS, tokenize=False)
    assert ChatTemplate(CALLS, {}).render(talk, reply=False) == wanted


@pytest.mark.parametrize("marks", [False, True])
def test_a_developer_is_the_system_to_every_template(marks):
    """Asked for a reply and learned alike."""
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    template, talk = ChatTemplate(source, {}), [{"role": "developer", "content": "Be short."}]
    text = template.render_marked(talk)[0] if marks else template.render(talk)
    assert text == "system: Be short."


def test_a_prompt_is_encoded_as_transformers_does(tokenizer, tmp_path):
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    for text in ("plain é", "<|im_start|>user\nhi</s> there", ""):
        assert ours.encode_prompt(text) == tokenizer(text).input_ids
    assert ours.encode_prompt("a</s>")[0] == tokenizer.bos_token_id
    assert not set(ours.encode("a</s>")) & set(tokenizer.all_special_ids)
    assert ours.ends == {tokenizer.eos_token_id}
    with pytest.raises(DataError, match=r"no chat template.*without --chat"):
        load_chat(tmp_path)


def write(folder: Path, **settings: object) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_where_a_template_is_found(tmp_path):
    named = [{"name": "default", "template": "A"}, {"name": "tools", "template": "B"}]
    write(tmp_path, chat_template=named, bos_token={"content": "<s>"}, eos_token="</s>")
    assert load_chat(tmp_path).source == "A"
    assert load_chat(tmp_path, "tools").source == "B"
    assert load_chat(tmp_path).tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    with pytest.raises(DataError, match="no chat template 'rag'; it has default, tools"):
        load_chat(tmp_path, "rag")
    write(tmp_path, chat_template="C")
    assert load_chat(tmp_path).source == "C"
    (tmp_path / "chat_template.jinja").write_text("D")
    assert load_chat(tmp_path).source == "D"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("E")
    assert load_chat(tmp_path, "rag").source == "E"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "list instead of an object"),
        ('{"chat_template": 3}', "neither a text nor a list"),
        ('{"chat_template": [{"name": "a"}]}', "neither a text nor a list"),
        (json.dumps({"chat_template": "x" * (LONGEST_TEMPLATE + 1)}), "at most 262,144"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load_chat(tmp_path)


def rendered(source: str, **variables: object) -> str:
    return ChatTemplate(source, {}).render([{"role": "user", "content": "hi"}], **variables)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no system role') }}", "refuses these messages: no system role"),
        ("a\n{% for %}", "fails in line 2"),
        ("{{ messages[0].content.x.y }}", "'str object' has no attribute 'x'"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% include 'x' %}", "no loader|not safe|fails"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("(" * 9 + "{{ " + "(" * 60_000, "fails"),
    ],
)
def test_templates_that_fail_say_so(source, message):
    with pytest.raises(DataError, match=message):
        rendered(source)


GROW = "{% set ns = namespace(x='x', l=[]) %}{% for i in range(99) %}"
FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ (messages|attr('__class__')).x }}",
        "{{ strftime_now.__code__.co_code }}",
        "{% set ns = namespace(_Namespace__attrs=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}{{ ns['_x'] }}",
        "{{ namespace(**{'__class__': 1}) }}",
        "{{ 'x' * 999999999999 }}",
        "{{ [0] * 999999999999 }}",
        "{{ 99 ** 99999999 }}",
        "{{ 'x'|center(999999999999) }}",
        "{{ 'x'.ljust(999999999999) }}",
        "{{ 'a\n'|indent(999999999) }}",
        "{{ [1]|tojson(indent=999999999) }}",
        "{{ [[1]]|batch(999999999, 1)|list }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%999999999d'|format(1) }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 999999999) }}",
        "{{ (1).to_bytes(999999999) }}",
        f"{GROW}{{% set ns.x = ns.x ~ ns.x %}}{{% endfor %}}",
        f"{GROW}{{% set ns.x = ns.x + ns.x %}}{{% endfor %}}",
        f"{GROW}{{% set ns.x = ns.x * 9 %}}{{% endfor %}}",
        f"{GROW}{{% set ns.x = ns.x|replace('x', 'xx') %}}{{% endfor %}}",
        f"{GROW}{{% set ns.x = ns.x.replace('', ns.x) %}}{{% endfor %}}",
        f"{GROW}{{% set ns.x = ns.x.join([ns.x, ns.x]) %}}{{% endfor %}}",
        f"{GROW}{{% set ns.x = [ns.x, ns.x]|join(ns.x) %}}{{% endfor %}}",
        f"{GROW}{{% set ns.x = '%s%s' % (ns.x, ns.x) %}}{{% endfor %}}",
        f"{GROW}{{% set ns.x = '{{0}}{{0}}'.format(ns.x) %}}{{% endfor %}}",
        GROW + "{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}{% endfor %}",
        f"{GROW}{{% set ns.l = [ns.l, ns.l] %}}{{% endfor %}}{{{{ ns.l }}}}",
        f"{GROW}{{% set ns.l = [ns.l, ns.l] %}}{{% endfor %}}{{{{ ns.l|tojson }}}}",
        f"{GROW}{{% set ns.x = (ns.x == 'x') * 7 + 9 * (ns.x|int + 9) ** 9 %}}{{% endfor %}}",
        f"{FOREVER}{{% endfor %}}{{% endfor %}}",
        f"{FOREVER}some text{{% endfor %}}{{% endfor %}}",
        "{% macro f() %}{% endmacro %}" + FOREVER + "{{ f() }}{% endfor %}{% endfor %}",
        f"{{% set x %}}{FOREVER}{'long ' * 999}{{% endfor %}}{{% endfor %}}{{% endset %}}",
        "{% for i in range(99999) %}" + "text " * 999 + "{% endfor %}",
    ],
)
def test_harmful_templates_are_refused(source, monkeypatch):
    # So that no test takes seconds.
    monkeypatch.setattr(sandbox, "MOST_SECONDS", 0.3)
    monkeypatch.setattr(sandbox, "MOST_MEMORY", 2**28)
    with pytest.raises(DataError, match="not safe to run"):
        rendered(source)


def test_a_long_conversation_is_not_too_much():
    words = "a word and another\n" * 10
    talk = [{"role": "user", "content": words}, {"role": "assistant", "content": words}] * 1000
    text = ChatTemplate(TURNS, {}).render(talk)
    assert text.count("<|im_start|>") == 2002


def test_messages_are_data():
    class Odd:
        def __str__(self) -> str:
            return "odd"

    with pytest.raises(DataError, match="plain data"):
        ChatTemplate("", {}).render([{"role": "user", "content": Odd()}])
    assert rendered("{{ strftime_now('%Y')|length }}{{ dict(a=1).a }}") == "41"


def test_variables_of_any_name_reach_the_template():
    """Those of the method's own arguments too."""
    given = {"self": 1, "variables": 2, "marks": 3}
    template = ChatTemplate("{{ variables }}{{ marks }}{{ messages[0].role }}", {})
    assert template.render([{"role": "user"}], **given) == "23user"
    assert template.render_marked([{"role": "user"}], **given) == ("23user", [])
