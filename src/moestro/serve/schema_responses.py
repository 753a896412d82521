"""What requests to /v1/responses may say, and the conversation that they mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from moestro.serve import errors
from moestro.serve.schema import Body, ChatRequest, FunctionName, Part, check_parts

# What items need that are read.
_NEEDED = {
    "message": ("role", "content"), "function_call": ("name",), "function_call_output": ("output",),
}  # fmt: skip


class Item(Body):
    """A message, a call, or what a call gave; others, such as reasoning, are passed by."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        for name in _NEEDED.get(self.type, ()):
            if getattr(self, name) is None:
                raise ValueError(f"an item of type {self.type} needs {name}")
        if self.type in _NEEDED:
            check_parts(self.content)
            check_parts(self.output)
        return self


class FlatTool(Body):
    """A tool; those that are no functions are passed by."""

    type: str
    name: FunctionName | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _has_a_name(self) -> Self:
        if self.type == "function" and self.name is None:
            raise ValueError("a tool of type function needs name")
        return self


class FlatChoice(Body):
    """The function that has to be called."""

    type: Literal["function"]
    name: str


class TextFormat(Body):
    """What form the text has."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextOptions(Body):
    """How the text is written."""

    format: TextFormat | None = None


class ResponsesRequest(Body):
    """Of /v1/responses; nothing is kept, so that each request has the whole conversation."""

    model: str | None = None
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    seed: int | None = None
    text: TextOptions | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    background: bool | None = None

    def as_chat(self) -> ChatRequest:
        """The same as a conversation.

        Raises:
            ApiError: it leans on something that is not kept here.
            ValidationError: it is no conversation.
        """
        for name in ("previous_response_id", "background"):
            if getattr(self, name):
                raise errors.refused(
                    f"{name} is not supported, since nothing is kept here; send the whole "
                    "conversation as input",
                    name,
                )
        messages = list(self._messages())
        if not messages:
            raise errors.refused(
                "input has no message, no call, and nothing that one gave", "input"
            )
        choice: Any = self.tool_choice
        if isinstance(choice, FlatChoice):
            choice = {"type": "function", "function": {"name": choice.name}}
        same = ("model", "stream", "temperature", "top_p", "seed", "parallel_tool_calls")
        return ChatRequest.model_validate(
            {name: getattr(self, name) for name in same}
            | {
                "messages": messages,
                "max_completion_tokens": self.max_output_tokens,
                "response_format": self._format(),
                "tools": [_tool(each) for each in self.tools or ()],
                "tool_choice": choice,
            }
        )

    def _messages(self) -> Iterator[dict[str, Any]]:
        if self.instructions:
            yield {"role": "system", "content": self.instructions}
        if isinstance(self.input, str):
            yield {"role": "user", "content": self.input}
            return
        calls: list[dict[str, Any]] = []
        for item in self.input:
            if item.type == "function_call":
                function = {"name": item.name, "arguments": item.arguments or "{}"}
                calls.append({"id": item.call_id, "function": function})
                continue
            if calls:
                yield {"role": "assistant", "content": None, "tool_calls": calls}
                calls = []
            if item.type == "message":
                yield {"role": item.role, "content": _plain(item.content)}
            elif item.type == "function_call_output":
                yield {
                    "role": "tool", "content": _plain(item.output), "tool_call_id": item.call_id,
                }  # fmt: skip
        if calls:
            yield {"role": "assistant", "content": None, "tool_calls": calls}

    def _format(self) -> dict[str, Any] | None:
        wish = self.text.format if self.text is not None else None
        if wish is None:
            return None
        if wish.type != "json_schema":
            return {"type": wish.type}
        if wish.schema_ is None:
            raise errors.refused("text.format of type json_schema needs a schema", "text.format")
        return {"type": wish.type, "json_schema": {"schema": wish.schema_}}


def _plain(content: str | list[Part] | None) -> Any:
    if isinstance(content, list):
        return [part.model_dump() for part in content]
    return content


def _tool(tool: FlatTool) -> dict[str, Any]:
    if tool.type != "function":
        return {"type": tool.type}
    function = {
        "name": tool.name, "description": tool.description, "parameters": tool.parameters,
    }  # fmt: skip
    return {"type": "function", "function": function}
