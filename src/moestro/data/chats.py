"""Conversations in .jsonl files: the usual shapes read into one, and refused where they are not it.

    {"messages": [{"role": "user", "content": …}, …], "tools": […]}      OpenAI's, TRL's
    {"prompt": …, "completion": …}                                       texts, or messages both
    {"conversations": [{"from": "human", "value": …}, …], "system": …}   ShareGPT's
    {"text": …}                                                          all of it is learned

"system" beside messages is the first of them; content may be a list of parts that have text.
"chat_template_kwargs" of a line are variables of its template, such as "enable_thinking". A turn of
the assistant with "weight": 0 (OpenAI's) is context alone. Tools, calls and variables may be the
JSON of these as a text: so Arrow's tables keep what has other fields in each line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moestro.chat import THOUGHTS, from_json, set_elsewhere
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
        """Numbers of the messages to learn: the assistant's, but those of weight 0."""
        return [
            n
            for n, each in enumerate(self.messages)
            if each["role"] == "assistant" and n >= self.first and each.get("weight") != 0
        ]


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
                        "nothing to learn: there is no turn of the assistant (or no completion), "
                        "or each has the weight 0; add one, or leave the line out"
                    )
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            yield chat


def _chat(where: str, record: Any) -> Chat:
    if not isinstance(record, dict):
        raise DataError(f"not a JSON object; expected one with {_SHAPES}")
    # One table of lines of several shapes has null for what a line has not.
    record = {name: value for name, value in record.items() if value is not None}
    variables = _variables(record)
    if "messages" in record:
        return Chat(where, _after_system(record, _messages(record["messages"])), 0, variables)
    if "conversations" in record:
        spoken = _list(record["conversations"], "conversations")
        messages = _messages([_renamed(each) for each in spoken])
        return Chat(where, _after_system(record, messages), 0, variables)
    if "completion" in record:
        return _prompted(where, record, variables)
    if isinstance(record.get("text"), str):
        return Chat(where, completion=_text(record["text"]))
    known = ", ".join(map(repr, record)) or "none"
    raise DataError(f"its fields are {known}; expected {_SHAPES}")


def _prompted(where: str, record: Mapping[str, Any], variables: Mapping[str, Any]) -> Chat:
    """A prompt and its completion, both of them texts or both messages."""
    prompt, completion = record.get("prompt"), record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if _system(record):
            raise DataError(
                f"system is {_short(record['system'])}, but prompt and completion are texts, in "
                "which it has no place; write it into the prompt, or give lists of messages"
            )
        return Chat(where, prompt=_text(prompt), completion=_text(completion))
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise DataError(
            f"prompt is {_short(prompt)} and completion {_short(completion)}; give two texts, "
            "or two lists of messages"
        )
    learned = _messages(completion)
    messages = _after_system(record, (*_messages(prompt), *learned))
    return Chat(where, messages, len(messages) - len(learned), variables)


def _system(record: Mapping[str, Any]) -> str:
    """What stands in "system" beside the messages; empty where there is none."""
    given = record.get("system")
    return "" if given is None else _content("system", given)


def _after_system(
    record: Mapping[str, Any], messages: tuple[Mapping[str, Any], ...]
) -> tuple[Mapping[str, Any], ...]:
    """The messages, with what stands in "system" beside them as the first."""
    if not (text := _system(record)):
        return messages
    for number, message in enumerate(messages):
        if message["role"] in ("system", "developer"):
            raise DataError(
                f"system is {_short(text)}, but message {number} ({message['role']}) is the "
                "system's too; leave one of them out"
            )
    return ({"role": "system", "content": text}, *messages)


def _variables(record: Mapping[str, Any]) -> dict[str, Any]:
    stated = _unpacked(record.get("chat_template_kwargs") or {}, dict, "chat_template_kwargs")
    if (name := set_elsewhere(stated)) is not None:
        raise DataError(f"chat_template_kwargs cannot set {name}; leave it out")
    tools = _unpacked(record.get("tools") or [], list, "tools")
    _check_texts("chat_template_kwargs", stated)
    _check_texts("tools", tools)
    return {**stated, **({"tools": tools} if tools else {})}


def _unpacked(given: Any, kind: type[list[Any]] | type[dict[Any, Any]], name: str) -> Any:
    """A list or an object, or what the JSON of one says."""
    found = from_json(given) if isinstance(given, str) else given
    if not isinstance(found, kind):
        what = "a list" if kind is list else "an object"
        raise DataError(f"{name} is {_short(given)}; it is {what}, or the JSON of one as a text")
    return found


def _short(given: Any) -> str:
    """What was given, for messages."""
    text = repr(given)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _messages(given: Any) -> tuple[Mapping[str, Any], ...]:
    return tuple(_message(number, one) for number, one in enumerate(_list(given, "messages")))


def _message(number: int, message: Any) -> Mapping[str, Any]:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(message, dict) or role not in ROLES:
        raise DataError(f"message {number} has the role {role!r}; known are {', '.join(ROLES)}")
    which, content = f"message {number} ({role})", message.get("content")
    if content is None and not message.get("tool_calls"):
        raise DataError(f"{which} has neither content nor tool_calls")
    _check_weight(which, role, message.get("weight"))
    for name in THOUGHTS:
        if not isinstance(message.get(name), str | None):
            raise DataError(f"{which} has the {name} {_short(message[name])}; it is a text")
    found = dict(message)
    if content is not None:
        found["content"] = _content(which, content)
    if message.get("tool_calls"):
        calls = _unpacked(message["tool_calls"], list, f"tool_calls of {which}")
        found["tool_calls"] = [_call(each) for each in calls]
    _check_texts(which, found)
    return found


def _content(which: str, given: Any) -> str:
    """A text, or the texts of parts joined, as the server joins them."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list) or not given:
        raise DataError(
            f"{which} has the content {_short(given)}; it is a text, or a list of parts such as "
            '{"type": "text", "text": …}'
        )
    for part in given:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise DataError(
                f"{which} has the part {_short(part)}, which has no text; text is all that is "
                'learned, so give {"type": "text", "text": …}, or leave the line out'
            )
    return "".join(part["text"] for part in given)


def _call(call: Any) -> Any:
    """A call with its arguments as an object, as the server gives them to templates."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"])}
    written = call.get("arguments")
    return {**call, "arguments": from_json(written)} if isinstance(written, str) else call


def _check_weight(which: str, role: str, weight: Any) -> None:
    """1, as if there were none, or 0; what is not the assistant's is never learned."""
    if weight is None:
        return
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(
            f"{which} has the weight {_short(weight)}; it is 0 (not learned) or 1 (learned)"
        )
    if weight == 1 and role != "assistant":
        raise DataError(
            f"{which} has the weight 1, but only turns of the assistant are learned; leave it out"
        )


def _renamed(spoken: Any) -> dict[str, Any]:
    """A turn of ShareGPT's as a message."""
    said = spoken.get("from") if isinstance(spoken, dict) else None
    if not isinstance(said, str) or said not in _FROM:
        raise DataError(f"a turn is from {said!r}; known are {', '.join(_FROM)}")
    kept = {"weight": spoken["weight"]} if "weight" in spoken else {}
    return {"role": _FROM[said], "content": spoken.get("value"), **kept}


def _list(given: Any, name: str) -> Sequence[Any]:
    if not isinstance(given, list) or not given:
        raise DataError(f"{name} is not a list of at least one")
    return given


def _check_texts(which: str, value: Any) -> None:
    """Refuse halves of surrogate pairs in a value, however deep."""
    left = [value]
    while left:
        match left.pop():
            case str(text):
                try:
                    utf8(text)
                except DataError as error:
                    raise DataError(f"{which}: {error}") from None
            case dict(fields):
                left += [*fields, *fields.values()]
            case list(items):
                left += items


def _text(text: str) -> str:
    utf8(text)
    return text
