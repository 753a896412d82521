"""Conversations as tokens, each with whether it is a label: what the assistant wrote, and no other.

Where a turn of the assistant lies in the rendered text, the template says itself by its
{% generation %} blocks; or the text of the messages before it, with what begins a reply, and the
text up to it are beginnings of the whole one. A template of neither kind is refused, since a wrong
mask trains without complaint. A turn is learned to the token that ends it, if there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moestro.chat import THOUGHTS, ChatTemplate
from moestro.config import ChatConfig
from moestro.data.chats import Chat
from moestro.errors import DataError
from moestro.text import Tokenizer


class Labelled(NamedTuple):
    """The tokens of a document, and which of them are to be predicted."""

    tokens: list[int]
    labels: list[bool]


def label(
    chat: Chat, tokenizer: Tokenizer, template: ChatTemplate | None, cfg: ChatConfig
) -> Iterator[Labelled]:
    """The documents of a conversation: one, or one for each turn of the assistant.

    Raises:
        DataError: there is no template, it refuses the messages, or the assistant's turns cannot
            be found in its text.
    """
    try:
        if not chat.messages:
            yield _plain(chat, tokenizer)
            return
        if template is None:
            raise DataError(
                "the model has no chat template, so it knows no conversations; give prompt and "
                "completion as texts, or put a chat_template.jinja beside the model"
            )
        if cfg.turns == "all":
            yield _masked(tokenizer, *_rendered(chat, template, chat.turns))
            return
        for turn in chat.turns:
            upto = chat._replace(messages=chat.messages[: turn + 1])
            yield _masked(tokenizer, *_rendered(upto, template, [turn]))
    except DataError as error:
        raise DataError(f"{chat.where}: {error}") from None


def _plain(chat: Chat, tokenizer: Tokenizer) -> Labelled:
    """A text as in training; one with a prompt as in generating. The end of text is a label."""
    if not chat.prompt:
        tokens = tokenizer.encode(chat.completion)
        return Labelled([*tokens, tokenizer.end_of_text], [True] * (len(tokens) + 1))
    tokens, ends = tokenizer.encode_placed(chat.prompt + chat.completion)
    labels = [end > len(chat.prompt) for end in ends]
    if tokens and tokens[-1] in tokenizer.ends:
        labels[-1] = True  # where the tokenizer adds it, it stands for no text
        return Labelled(tokens, labels)
    return Labelled([*tokens, tokenizer.end_of_text], [*labels, True])


def _rendered(
    chat: Chat, template: ChatTemplate, turns: Sequence[int]
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and [from, to) of the turns wanted."""
    if not template.marks:
        text = template.render(chat.messages, reply=False, **chat.variables)
        return text, [_span(chat, template, turn, text) for turn in turns]
    text, spans = template.render_marked(chat.messages, **chat.variables)
    own = [n for n, each in enumerate(chat.messages) if each["role"] == "assistant"]
    if len(spans) != len(own):
        raise DataError(
            f"the chat template marks {len(spans)} passages by {{% generation %}} in a "
            f"conversation with {len(own)} turns of the assistant; it must mark each turn, and "
            "nothing else"
        )
    return text, [span for n, span in zip(own, spans, strict=True) if n in turns]


def _span(chat: Chat, template: ChatTemplate, turn: int, text: str) -> tuple[int, int]:
    """Where a turn of the assistant lies in the text, found by rendering what is before it."""
    try:
        before = template.render(chat.messages[:turn], reply=True, **chat.variables)
        upto = template.render(chat.messages[: turn + 1], reply=False, **chat.variables)
    except DataError as error:
        raise DataError(
            f"the assistant's turn (message {turn}) cannot be found: the chat template takes the "
            f"whole conversation, but not its beginning ({error}); use a template with "
            "{% generation %}"
        ) from None
    if text.startswith(upto) and upto.startswith(before) and len(upto) > len(before):
        return len(before), len(upto)
    if before.startswith(upto.rstrip()) and not _says_something(chat.messages[turn]):
        raise DataError(
            f"the assistant's turn (message {turn}) is empty, and the chat template writes nothing "
            'for it that could be learned; leave the turn out, or give it "weight": 0'
        )
    last = turn == len(chat.messages) - 1
    advice = "use a template with {% generation %}"
    if not last:
        advice += ", or --set data.chat.turns=each, which learns each turn from its own beginning"
    raise DataError(
        f"the assistant's turn (message {turn}) cannot be found: the chat template "
        f"{'begins a reply otherwise than it writes one' if last else 'rewrites earlier turns'}; "
        f"{advice}"
    )


def _says_something(message: Mapping[str, Any]) -> bool:
    """Whether there is more in a message than blanks."""
    text = (message.get("content") or "").strip()
    return bool(text or message.get("tool_calls") or any(map(message.get, THOUGHTS)))


def _masked(tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]]) -> Labelled:
    """A token is a label if its last character lies in a span, up to a token that ends a turn."""
    tokens, ends = tokenizer.encode_placed(text, templated=True)
    labels = [False] * len(tokens)
    for start, stop in spans:
        for place, (token, end) in enumerate(zip(tokens, ends, strict=True)):
            labels[place] |= start < end <= stop
            if start < end <= stop and token in tokenizer.ends and text[end:stop].isspace():
                break
    return Labelled(tokens, labels)
