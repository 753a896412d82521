"""What requests to /v1/messages may say (Anthropic's shape), and the conversation they mean."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from moestro.serve.schema import MOST_STOPS, Body, ChatRequest, FunctionName, Stop

_READ = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")


class Block(Body):
    """A part of a message."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        if self.type not in _READ:
            raise ValueError(
                f"a block of type {self.type[:40]!r} is not read; known are {', '.join(_READ)}"
            )
        if self.type == "text" and self.text is None:
            raise ValueError("a block of type text needs text")
        if self.type == "tool_use" and self.name is None:
            raise ValueError("a block of type tool_use needs name")
        return self


class Message(Body):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class InputTool(Body):
    """A tool; those that Anthropic's own servers run have no schema and are passed by."""

    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class InputChoice(Body):
    """Whether, and which, tool is called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountRequest(Body):
    """Of /v1/messages/count_tokens: a conversation."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)]
    system: str | list[Block] | None = None
    tools: list[InputTool] | None = None
    tool_choice: InputChoice | None = None

    def as_chat(self) -> ChatRequest:
        """The same as OpenAI has it.

        Raises:
            ValidationError: it is no conversation.
        """
        return ChatRequest.model_validate(self._values())

    def _values(self) -> dict[str, Any]:
        choice = self.tool_choice
        kinds: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none"}
        wish = None
        if choice is not None:
            function = {"type": "function", "function": {"name": choice.name or ""}}
            wish = kinds.get(choice.type, function)
        return {
            "model": self.model,
            "messages": list(self._messages()),
            "tools": [_tool(each) for each in self.tools or () if each.input_schema is not None],
            "tool_choice": wish,
            "parallel_tool_calls": not (choice and choice.disable_parallel_tool_use),
        }

    def _messages(self) -> Iterator[dict[str, Any]]:
        if self.system:
            yield {"role": "system", "content": _text(self.system)}
        for message in self.messages:
            if isinstance(message.content, str):
                yield {"role": message.role, "content": message.content}
            else:
                yield from _of_blocks(message.role, message.content)


class MessagesRequest(CountRequest):
    """Of /v1/messages: a conversation whose next message is wanted."""

    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None

    def _values(self) -> dict[str, Any]:
        same = ("max_tokens", "stream", "temperature", "top_p", "top_k")
        own = {name: getattr(self, name) for name in same}
        return {**super()._values(), **own, "stop": self.stop_sequences}


def _text(content: str | Sequence[Block] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(block.text or "" for block in content)


def _of_blocks(role: str, blocks: Sequence[Block]) -> Iterator[dict[str, Any]]:
    """The results of tools, each a message, then what else the message has."""
    for block in blocks:
        if block.type == "tool_result":
            yield {
                "role": "tool", "content": _text(block.content), "tool_call_id": block.tool_use_id,
            }  # fmt: skip
    calls = [
        {"id": block.id, "function": {"name": block.name, "arguments": json.dumps(block.input)}}
        for block in blocks
        if block.type == "tool_use"
    ]
    thoughts = "".join(block.thinking or "" for block in blocks)
    texts = [block for block in blocks if block.type == "text"]
    if texts or calls or not any(block.type == "tool_result" for block in blocks):
        message: dict[str, Any] = {"role": role, "content": _text(texts)}
        yield (
            message
            | ({"tool_calls": calls} if calls else {})
            | ({"reasoning_content": thoughts} if thoughts else {})
        )


def _tool(tool: InputTool) -> dict[str, Any]:
    function = {
        "name": tool.name, "description": tool.description, "parameters": tool.input_schema,
    }  # fmt: skip
    return {"type": "function", "function": function}
