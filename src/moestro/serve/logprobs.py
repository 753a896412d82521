"""How likely tokens were, in the shapes of OpenAI's completions and of its chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moestro.infer.writing import Piece, Scored
from moestro.text import Tokenizer


def name_of(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; special ones as they are spelled."""
    special = tokenizer.specials.get(token)
    if special is not None or token >= tokenizer.vocab_size:
        return special or ""
    return tokenizer.decode([token])


def of_completion(
    tokenizer: Tokenizer, tokens: Sequence[int], scored: Sequence[Scored | None], offset: int = 0
) -> dict[str, Any]:
    """Tokens, their log-probabilities, the likeliest beside them, and where each begins.

    Args:
        tokenizer: spells them.
        tokens: of the prompt, of the text, or of both.
        scored: of each; None for the first of a prompt, before which nothing stands.
        offset: characters before the first.
    """
    names = [name_of(tokenizer, token) for token in tokens]
    offsets = [offset]
    for token, name in zip(tokens, names, strict=True):
        offsets.append(offsets[-1] + (0 if token in tokenizer.specials else len(name)))
    return {
        "tokens": names,
        "token_logprobs": [None if each is None else each.logprob for each in scored],
        "top_logprobs": [_top(tokenizer, each) for each in scored],
        "text_offset": offsets[:-1],
    }


def _top(tokenizer: Tokenizer, scored: Scored | None) -> dict[str, float] | None:
    """The likeliest tokens by name, the token itself among them; of one name the likelier."""
    if scored is None:
        return None
    found: dict[str, float] = {}
    for token, logprob in (*scored.top, (scored.token, scored.logprob)):
        found.setdefault(name_of(tokenizer, token), logprob)
    return found


def of_chat(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> dict[str, Any]:
    """The tokens of a reply, without the one that ends it."""
    content = []
    for piece in pieces:
        if piece.scored is not None and piece.finish != "end_of_text":
            own = _entry(tokenizer, piece.token, piece.scored.logprob)
            tops = [_entry(tokenizer, token, logprob) for token, logprob in piece.scored.top]
            content.append({**own, "top_logprobs": tops})
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    name = name_of(tokenizer, token)
    known = None if "\ufffd" in name else list(name.encode())
    return {"token": name, "logprob": logprob, "bytes": known}
