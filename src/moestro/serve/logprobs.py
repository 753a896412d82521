"""How likely tokens were, in the shapes of OpenAI's completions and of its chat."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from moestro.infer.writing import Piece, Scored
from moestro.streaming import StreamDecoder
from moestro.text import Tokenizer


def name_of(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; special ones as they are spelled."""
    special = tokenizer.specials.get(token)
    if special is not None or token >= tokenizer.vocab_size:
        return special or ""
    return tokenizer.decode([token])


def echoed(tokenizer: Tokenizer, prompt: str | Sequence[int], tokens: Sequence[int]) -> list[str]:
    """What each token of an echoed prompt adds to the text; joined, they are the echo.

    A character that several tokens spell comes with the last of them, as while a text is written.

    Args:
        tokenizer: has read the prompt.
        prompt: as it was given.
        tokens: what the model reads of it.
    """
    if isinstance(prompt, str):
        _, ends = tokenizer.encode_placed(prompt)
        starts, covered = list[int](), 0
        for token, end in zip(tokens, ends or [0], strict=True):
            inside = end == covered > 0 and token not in tokenizer.specials
            starts.append(max([covered - inside, *starts[-1:]]))
            covered = max(covered, end)
        stops = [*starts[1:], len(prompt)]
        return [prompt[start:stop] for start, stop in zip(starts, stops, strict=True)]
    # The model may know more tokens than the tokenizer.
    stream, known = StreamDecoder(tokenizer), tokenizer.vocab_size
    texts = [stream.push(token) if token < known else "" for token in tokens]
    return [*texts[:-1], texts[-1] + stream.flush()]


def of_completion(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    texts: Sequence[str],
    scored: Sequence[Scored | None],
    offset: int = 0,
) -> dict[str, Any]:
    """Tokens, their log-probabilities, the likeliest beside them, and where each begins.

    Args:
        tokenizer: spells them.
        tokens: of the prompt, of the text, or of both.
        texts: what each adds to the text.
        scored: of each; None for the first of a prompt, before which nothing stands.
        offset: characters before the first.
    """
    return {
        "tokens": [name_of(tokenizer, token) for token in tokens],
        "token_logprobs": [None if each is None else each.logprob for each in scored],
        "top_logprobs": [_top(tokenizer, each) for each in scored],
        "text_offset": list(accumulate(map(len, texts), initial=offset))[:-1],
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
