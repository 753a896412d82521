"""A conversation made ready for the engine: its tokens, its grammar, and how a reply is read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from moestro.chat import from_json, set_elsewhere
from moestro.errors import DataError
from moestro.serve import errors, tools
from moestro.serve.constraints import json_of, of_json
from moestro.serve.engine import Ask
from moestro.serve.replies import Reply
from moestro.serve.schema import CalledFunction, ChatMessage, ChatRequest, Function
from moestro.serve.served import Served, encode_all
from moestro.serve.state import State
from moestro.serve.thoughts import Thoughts, marks_of


class Turn(NamedTuple):
    """The model's turn in a conversation.

    Attributes:
        asks: a request for each reply.
        new_reply: begins a reply.
    """

    asks: list[Ask]
    new_reply: Callable[[], Reply]

    @property
    def read(self) -> int:
        """Tokens of the conversation so far."""
        return len(self.asks[0].tokens)


async def prepare(state: State, wanted: ChatRequest) -> Turn:
    """Make a conversation ready.

    Raises:
        ApiError: it is for another model, too long, or asks for what this one cannot do.
    """
    served = state.served
    served.check_name(wanted.model)
    source, functions = served.chat().source, wanted.functions
    form = tools.form_of(source) if functions or wanted.tool_choice == "required" else None
    text = await conversation(served, wanted)
    (tokens,) = await encode_all(served, [text], templated=True)
    marks = marks_of(source)
    opened = marks is not None and text.rstrip().endswith(marks[0])
    thinking = marks[1] if marks is not None and opened else ""
    make = None
    for grammar, param in await asyncio.to_thread(_grammars, wanted, form, thinking):
        make = await state.grammars.make(grammar, param)
    most = wanted.max_completion_tokens
    most = wanted.max_tokens if most is None else most
    asks = served.asks(wanted, [tokens], most)
    if make is not None:
        asks = [ask._replace(constraint=make()) for ask in asks]
    # Special tokens are left out of a text; those that are marks of it are not.
    written = "".join((form.text if form is not None else "", *(marks or ())))
    shown = frozenset(name for name in served.tokenizer.specials.values() if name in written)
    asks = [ask._replace(special=shown) for ask in asks]
    schemas = {name: each.parameters or {} for name, each in functions.items()}

    def new_reply() -> Reply:
        reader = None
        if form is not None:
            reader = tools.Reader(form, schemas, several=wanted.several_calls)
        return Reply(Thoughts(opened, marks) if marks is not None else None, reader)

    return Turn(asks, new_reply)


async def conversation(served: Served, wanted: ChatRequest) -> str:
    """The text of a conversation, up to where the reply begins."""
    described = [_described(each) for each in wanted.functions.values()]
    variables = wanted.chat_template_kwargs or {}
    return await rendered(served, wanted.messages, variables, described)


def _grammars(wanted: ChatRequest, form: tools.Form | None, thinking: str) -> list[tuple[str, str]]:
    """The grammars to make, and their fields; replies are held to the last, which has the others.

    Each field's own is made as well, so that an error names the field that it comes from.
    """
    wish, schema = wanted.response_format, None
    if wish is not None and wish.type != "text":
        schema = wish.json_schema.schema_ if wish.json_schema is not None else wish.schema_
        schema = {"type": "object"} if schema is None else schema
    found = []
    if schema is not None:
        found.append((of_json(schema, thinking=thinking), "response_format"))
    if form is not None:
        otherwise = json_of(schema) if schema is not None else None
        grammar = tools.grammar(wanted, form, thinking=thinking, otherwise=otherwise)
        if grammar is not None:
            found.append((grammar, "tools"))
    return found


def _described(function: Function) -> dict[str, Any]:
    """A function as templates know it."""
    return {"type": "function", "function": function.model_dump(exclude_none=True)}


async def rendered(
    served: Served,
    messages: Sequence[ChatMessage],
    variables: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    reply: bool = True,
) -> str:
    """The text of a conversation.

    Args:
        served: whose template writes it.
        messages: the conversation.
        variables: what else the template takes.
        tools: what the model may call.
        reply: end with what begins the model's reply.
    """
    template, plain = served.chat(), [_plain(message) for message in messages]
    if (name := set_elsewhere(variables)) is not None:
        raise errors.refused(
            f"chat_template_kwargs cannot set {name}", f"chat_template_kwargs.{name}"
        )
    more = {**variables, **({"tools": list(tools)} if tools else {})}
    try:
        return await asyncio.to_thread(lambda: template.render(plain, reply=reply, **more))
    except DataError as error:
        raise errors.refused(str(error), "messages") from None


def _plain(message: ChatMessage) -> dict[str, Any]:
    """A message as templates know it."""
    plain: dict[str, Any] = {"role": message.role, "content": message.text}
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            plain[name] = value
    thoughts = message.reasoning_content or message.reasoning
    if thoughts is not None:
        plain["reasoning_content"] = thoughts
    if message.tool_calls:
        plain["tool_calls"] = [
            {"id": call.id, "type": "function", "function": _called(call.function)}
            for call in message.tool_calls
        ]
    return plain


def _called(function: CalledFunction) -> dict[str, Any]:
    """A call with its arguments as an object, which is what templates write out."""
    return {"name": function.name, "arguments": from_json(function.arguments)}
