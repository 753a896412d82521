"""What requests may say: the fields that clients send, checked before anything is computed.

A field that is not known is passed by, as OpenAI's clients send many; a value of null is as good
as no value.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_TEXTS = 128
MOST_STOPS = 16
MOST_LOGPROBS = 20

Token = Annotated[int, Field(ge=0)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]


class Body(BaseModel):
    """Base of every request and of its parts."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class StreamOptions(Body):
    """What a stream has beside its text."""

    include_usage: bool | None = None
    include_experts: bool | None = None


class Generation(Body):
    """What all requests for text share; see `moestro.infer.sampling.SamplingConfig`."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_TEXTS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logit_bias: dict[str, float] | None = None
    return_routed_experts: bool | None = None
    return_routed_weights: bool | None = None
    routed_experts_format: Literal["lists", "base64"] | None = None

    @property
    def top(self) -> int | None:
        """How many likeliest tokens are told beside each; None: nothing of the kind."""
        return None

    @property
    def prompt_scored(self) -> bool:
        """Whether the same is told of the prompt's tokens."""
        return False

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with what it used."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def tells_experts(self) -> bool:
        """Whether each chunk of a stream has its token, and the first expert in each mixture."""
        return bool(self.stream_options and self.stream_options.include_experts)

    @property
    def routed(self) -> bool:
        """Whether the experts of each token are wanted."""
        return bool(self.return_routed_experts or self.return_routed_weights)

    @property
    def count(self) -> int:
        """Texts for each prompt."""
        return self.n or 1

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options belong to a stream; add stream: true")
        return self


class CompletionRequest(Generation):
    """Of /v1/completions: a text, or several, to be continued."""

    prompt: (
        str
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MOST_TEXTS)]
        | Annotated[
            list[Annotated[list[Token], Field(min_length=1)]],
            Field(min_length=1, max_length=MOST_TEXTS),
        ]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    suffix: str | None = None

    @property
    def top(self) -> int | None:
        """See `Generation`."""
        return self.logprobs

    @property
    def prompt_scored(self) -> bool:
        """See `Generation`."""
        return self.echo is True and self.logprobs is not None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as tokens."""
        given = self.prompt
        if isinstance(given, str) or isinstance(given[0], int):
            return [given]
        return list(given)


class Part(Body):
    """A part of a message's content."""

    type: str
    text: str | None = None


def check_parts(content: str | list[Part] | None) -> None:
    """Refuse parts that are no text."""
    for part in content if isinstance(content, list) else ():
        if part.text is None:
            raise ValueError(
                f"a part of type {part.type[:40]!r} has no text, and text is all that is read"
            )


class CalledFunction(Body):
    """The function that a model called."""

    name: str
    arguments: str = "{}"


class ToolCall(Body):
    """A call that an earlier reply made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError(f"a message of role {self.role} needs content")
        check_parts(self.content)
        return self

    @property
    def text(self) -> str | None:
        """All of its text."""
        if isinstance(self.content, list):
            return "".join(part.text or "" for part in self.content)
        return self.content


class JsonSchema(Body):
    """What a reply's JSON has to be."""

    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
    """What form a reply has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    # As llama.cpp's server and others take it, with json_object.
    schema_: dict[str, Any] | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("the type json_schema needs json_schema: {name, schema}")
        return self


class Function(Body):
    """What a model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    """A tool; those that are no functions are passed by."""

    type: str
    function: Function | None = None

    @model_validator(mode="after")
    def _has_its_function(self) -> Self:
        if self.type == "function" and self.function is None:
            raise ValueError("a tool of type function needs function: {name, parameters}")
        return self


class ChosenFunction(Body):
    """The function that has to be called."""

    name: str


class ChosenTool(Body):
    """The tool that has to be called."""

    type: Literal["function"]
    function: ChosenFunction


class ChatRequest(Generation):
    """Of /v1/chat/completions: a conversation whose next message is wanted."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _asks_for_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs belong to logprobs; add logprobs: true")
        return self

    @property
    def top(self) -> int | None:
        """See `Generation`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def functions(self) -> dict[str, Function]:
        """What the model may call, by name."""
        if self.tool_choice == "none":
            return {}
        found = [tool.function for tool in self.tools or () if tool.type == "function"]
        return {each.name: each for each in found if each is not None}

    @property
    def several_calls(self) -> bool:
        """Whether a reply may have more than one call."""
        return self.parallel_tool_calls is not False and not isinstance(
            self.tool_choice, ChosenTool
        )


class TokenizeRequest(Body):
    """Of /tokenize: a text, or a conversation; `content` is what llama.cpp calls the prompt."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        given = [x for x in (self.prompt, self.content, self.messages) if x is not None]
        if len(given) != 1:
            raise ValueError("give one of prompt, content and messages")
        return self


class DetokenizeRequest(Body):
    """Of /detokenize."""

    model: str | None = None
    tokens: list[Token]
