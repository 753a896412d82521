"""Conversations in .jsonl files: the usual shapes read into one, and refused where they are not it.

    {"messages": [{"role": "user", "content": …}, …], "tools": […]}      OpenAI's, TRL's
    {"prompt": …, "completion": …}                                       texts, or messages both
    {"conversations": [{"from": "human", "value": …}, …], "system": …}   ShareGPT's
    {"text": …}                                                          all of it is learned

"chat_template_kwargs" of a line are variables of its template, such as "enable_thinking".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moestro.config import DataConfig
from moestro.data.documents import read_lines, source_files
from moestro.errors import DataError
from moestro.text import utf8

ROLES = ("system", "developer", "user", "assistant", "tool")
# What ShareGPT's "from" says → role.
_FROM = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant",
    "assistant": "assistant", "tool": "tool", "observation": "tool",
}  # fmt: skip
_SHAPES = "messages, prompt and completion, conversations (with from and value), or text"


class Chat(NamedTuple):
    """One conversation, or one text.

    Attributes:
        where: Its file and line, for messages.
        messages: Of roles in `ROLES`; empty for a text.
        first: The assistant's turns from this message on are learned.
        variables: Of the template, such as tools.
        prompt: The beginning of a text that is not learned.
        completion: The rest of it.
    """

    where: str
    messages: tuple[Mapping[str, Any], ...] = ()
    first: int = 0
    variables: Mapping[str, Any] = {}
    prompt: str = ""
    completion: str = ""

    @property
    def turns(self) -> list[int]:
        """Numbers of the messages to learn: the assistant's."""
        own = enumerate(self.messages)
        return [n for n, each in own if each["role"] == "assistant" and n >= self.first]


def read_chats(cfg: DataConfig) -> Iterator[Chat]:
    """Every conversation of `cfg.sources`, in the order of files and lines.

    Raises:
        DataError: a file cannot be read; or a line has none of the shapes, an unknown role, or
            nothing of the assistant's.
    """
    for file in source_files(cfg):
        for _, where, record in read_lines(file.path):
            try:
                chat = _chat(where, record)
                if not chat.completion and not chat.turns:
                    raise DataError(
                        "nothing to learn: there is no turn of the assistant (or no completion); "
                        "add one, or leave the line out"
                    )
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            yield chat


def _chat(where: str, record: Any) -> Chat:
    if not isinstance(record, dict):
        raise DataError(f"not a JSON object; expected one with {_SHAPES}")
    variables = _variables(record)
    if "messages" in record:
        return Chat(where, _messages(record["messages"]), 0, variables)
    if "conversations" in record:
        spoken = _list(record["conversations"], "conversations")
        messages = [_renamed(each) for each in spoken]
        if isinstance(record.get("system"), str):
            messages.insert(0, {"role": "system", "content": record["system"]})
        return Chat(where, _messages(messages), 0, variables)
    if "completion" in record:
        prompt, completion = record.get("prompt"), record["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return Chat(where, prompt=_text(prompt), completion=_text(completion))
        before = _messages(prompt)
        return Chat(where, (*before, *_messages(completion)), len(before), variables)
    if isinstance(record.get("text"), str):
        return Chat(where, completion=_text(record["text"]))
    known = ", ".join(map(repr, record)) or "none"
    raise DataError(f"its fields are {known}; expected {_SHAPES}")


def _variables(record: Mapping[str, Any]) -> dict[str, Any]:
    stated = record.get("chat_template_kwargs") or {}
    if not isinstance(stated, dict):
        raise DataError("chat_template_kwargs is not an object of the template's variables")
    return {**stated, **({"tools": record["tools"]} if record.get("tools") else {})}


def _messages(given: Any) -> tuple[Mapping[str, Any], ...]:
    messages = _list(given, "messages")
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise DataError(f"message {number} has the role {role!r}; known are {', '.join(ROLES)}")
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise DataError(f"message {number} ({role}) has neither content nor tool_calls")
        if not isinstance(content, str | list | None):
            raise DataError(
                f"message {number} ({role}) has the content {content!r}; it is a text, or a list "
                "of parts"
            )
        _text(content if isinstance(content, str) else "")
    return tuple(messages)


def _renamed(spoken: Any) -> dict[str, Any]:
    """A turn of ShareGPT's as a message."""
    said = spoken.get("from") if isinstance(spoken, dict) else None
    if not isinstance(said, str) or said not in _FROM:
        raise DataError(f"a turn is from {said!r}; known are {', '.join(_FROM)}")
    return {"role": _FROM[said], "content": spoken.get("value")}


def _list(given: Any, name: str) -> Sequence[Any]:
    if not isinstance(given, list) or not given:
        raise DataError(f"{name} is not a list of at least one")
    return given


def _text(text: str) -> str:
    utf8(text)
    return text
