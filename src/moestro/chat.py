"""Chat templates: messages to the text of a prompt, as the model's makers wrote it down.

A template is a program in jinja2 that comes with the weights; sandbox.py runs it. It sees what
transformers would show it: the messages, the special tokens by name, `raise_exception`,
`strftime_now`, a `tojson` that escapes no HTML, `break` and `continue`.

A message that spells out a special token has the same text as the template's own token, and
becomes that token when the prompt is encoded, as in transformers. Check untrusted text for
such spellings first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moestro.errors import DataError
from moestro.sandbox import MARKS, RefusedError, render
from moestro.strictjson import read_object

SETTINGS, TEMPLATE, MORE_TEMPLATES = (
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates",
)
# What tokenizer_config.json calls the tokens that a template may name.
TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
_GENERATION = re.compile(r"\{%-?\+?\s*generation\b")
# Characters; published ones have some 20 thousand at most.
LONGEST_TEMPLATE = 2**18

# What a message calls the model's thoughts; templates ask for the first, gpt-oss' for the second.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")

# Variables of a template that are not the caller's own: a conversation says them itself.
_SAID = ("messages", "add_generation_prompt", "reply", "tools")

Message = Mapping[str, Any]


class ChatTemplate(NamedTuple):
    """A checkpoint's way to write a conversation as one text.

    Attributes:
        source: The template.
        tokens: Special tokens by the name that the template knows them by, such as bos_token.
    """

    source: str
    tokens: Mapping[str, str]

    def render(
        self, messages: Sequence[Message], /, *, reply: bool = True, **variables: object
    ) -> str:
        """The text of a conversation, special tokens spelled out.

        Args:
            messages: Each at least with `role` and `content`; plain data, as in JSON. A value of
                None, such as content beside tool calls, counts as not given. Thoughts may go by
                any name of `THOUGHTS`. A developer is the system, which every template knows.
            reply: End with what begins the model's reply (`add_generation_prompt`).
            variables: What else this template takes, such as `tools` or `enable_thinking`.

        Raises:
            DataError: the template refuses the messages, fails, or is not safe to run.
        """
        return self._render(messages, reply, variables)

    @property
    def marks(self) -> bool:
        """Whether {% generation %} blocks say what a model is to learn."""
        return _GENERATION.search(self.source) is not None

    def render_marked(
        self, messages: Sequence[Message], /, **variables: object
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a whole conversation, and [from, to) of each {% generation %} block in it.

        Raises:
            DataError: as `render`; or a message holds U+FDD0 or U+FDD1, which mark the blocks.
        """
        if any(mark in json.dumps([*messages, variables], ensure_ascii=False) for mark in MARKS):
            raise DataError("a message holds U+FDD0 or U+FDD1, which are no characters; remove it")
        begin, end = MARKS
        text, *blocks = self._render(messages, False, variables, marks=True).split(begin)
        spans = []
        for block in blocks:
            inner, _, after = block.partition(end)
            spans.append((len(text), len(text) + len(inner)))
            text += inner + after
        return text, spans

    def _render(
        self,
        messages: Sequence[Message],
        reply: bool,
        variables: Mapping[str, object],
        marks: bool = False,
    ) -> str:
        messages = list(map(_as_templates_ask, _plain(messages)))
        given = {"tools": None, "documents": None, **self.tokens, **_plain(variables)}
        given |= {"messages": messages, "add_generation_prompt": reply}
        try:
            return render(self.source, given, marks=marks)
        except RefusedError as error:
            raise DataError(f"the chat template refuses these messages: {error}") from None


def from_json(text: str) -> Any:
    """What a text says as JSON, {} if it is empty; the text itself if it is none.

    So a call's arguments are given to templates, which write objects out.
    """
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text


def set_elsewhere(variables: Mapping[str, Any]) -> str | None:
    """The first of a person's template variables that the conversation itself says; None: none."""
    return next((name for name in _SAID if name in variables), None)


def load_chat(folder: Path, name: str = "default") -> ChatTemplate:
    """Read the chat template of a checkpoint's folder.

    A file chat_template.jinja comes before the templates in tokenizer_config.json.
    """
    path, settings = folder / SETTINGS, {}
    if path.exists():
        settings = read_object(path, DataError, "fetch it again", finite=False)
    templates = _files(folder) or _listed(settings.get("chat_template"), path)
    if not templates:
        raise DataError(
            f"{folder} has no chat template: neither {TEMPLATE} nor chat_template in {SETTINGS}; "
            "it may be a base model: give it a plain prompt, without --chat"
        )
    if name not in templates:
        raise DataError(
            f"{folder} has no chat template {name!r}; it has {', '.join(sorted(templates))}"
        )
    source = templates[name]
    if len(source) > LONGEST_TEMPLATE:
        raise DataError(
            f"the chat template of {folder} has {len(source):,} characters; at most "
            f"{LONGEST_TEMPLATE:,} are read"
        )
    tokens = {}
    for key in TOKENS:
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[key] = token
    return ChatTemplate(source, tokens)


def _files(folder: Path) -> dict[str, str]:
    """Templates that have a file of their own, by name."""
    paths = {path.stem: path for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    if (folder / TEMPLATE).exists():
        paths = {"default": folder / TEMPLATE, **paths}
    found = {}
    for name, path in paths.items():
        try:
            found[name] = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}); fetch it again") from None
    return found


def _listed(value: Any, path: Path) -> dict[str, str]:
    """The templates in tokenizer_config.json: none, one text, or a list of named ones."""
    if value is None:
        return {}
    entries = [{"name": "default", "template": value}] if isinstance(value, str) else value
    try:
        found = {entry["name"]: entry["template"] for entry in entries}
    except (TypeError, KeyError):
        found = {"": None}
    if not all(isinstance(text, str) for text in (*found, *found.values())):
        raise DataError(
            f"{path}: chat_template is neither a text nor a list of {{name, template}}; "
            "fetch it again"
        )
    return found


def _as_templates_ask(message: Message) -> dict[str, Any]:
    """A message without values of None, by the role and the names of thoughts that they know."""
    given = {key: value for key, value in message.items() if value is not None}
    if given.get("role") == "developer":
        given["role"] = "system"
    for name in THOUGHTS:
        if name in given:
            return {"thinking": given[name], **given, "reasoning_content": given[name]}
    return given


def _plain(value: Any) -> Any:
    """A copy that is made of JSON's types alone, so that no object's method reaches a template."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"chat messages are plain data, as in JSON ({error})") from None
