"""From text to a model's input: a decoder continues it, an encoder-decoder fills its gaps.

A gap in a source is written `<extra_id_0>`, `<extra_id_1>` and so on, as T5's tokenizer spells it;
an encoder-decoder that learned to fill gaps answers with each gap's mark and what belongs there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from moestro.config import NetworkConfig
from moestro.errors import DataError
from moestro.text import Tokenizer

# As many as T5's tokenizer has.
MOST_GAPS = 100
_GAP = re.compile(r"(<extra_id_\d+>)")


class Prompt(NamedTuple):
    """A prompt as the model gets it.

    Attributes:
        tokens: Ids, at least one, at most the model's context.
        dropped: Tokens left out because the context was full: a decoder's first, a source's last.
    """

    tokens: list[int]
    dropped: int


def encode(cfg: NetworkConfig, tokenizer: Tokenizer, prompt: str | Sequence[int]) -> Prompt:
    """What a model of these settings reads of text, or of its tokens.

    Raises:
        DataError: the model does not know a token.
    """
    context, vocab_size = cfg.attention.context, cfg.vocab_size
    if cfg.has_encoder:
        what, found = "the source", encode_source(tokenizer, prompt, context, vocab_size)
    else:
        what, found = "the prompt", encode_prompt(tokenizer, prompt, context)
    check_known(found.tokens, vocab_size, tokenizer, what)
    return found


def encode_prompt(tokenizer: Tokenizer, prompt: str | Sequence[int], context: int) -> Prompt:
    """Turn text, or its tokens, into at most `context` tokens, keeping the last ones.

    An empty prompt becomes the end-of-text token, after which a new document begins.
    """
    tokens = tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)
    tokens = tokens or [tokenizer.end_of_text]
    return Prompt(tokens[-context:], max(0, len(tokens) - context))


def encode_source(
    tokenizer: Tokenizer, source: str | Sequence[int], context: int, vocab_size: int
) -> Prompt:
    """Turn text, or its tokens, into at most `context` tokens, keeping the first ones and an end.

    Args:
        tokenizer: The one that the model was trained with.
        source: Text, in which gaps may be written, or its tokens.
        context: Most tokens to keep.
        vocab_size: The model's, V.
    """
    if isinstance(source, str):
        gaps = gap_tokens(tokenizer, vocab_size)
        beyond = {name for name, token in gaps.items() if token >= tokenizer.vocab_size}
        if beyond:
            parts = filter(None, _GAP.split(source))
            pieces = ([gaps[part]] if part in beyond else tokenizer.encode(part) for part in parts)
            tokens = [token for piece in pieces for token in piece]
        else:
            tokens = tokenizer.encode_prompt(source)
    else:
        tokens = list(source)
        check_known(tokens, vocab_size, tokenizer, "the source")
    end = tokens.pop() if tokens and tokens[-1] in tokenizer.ends else tokenizer.end_of_text
    most = context - 1
    return Prompt([*tokens[:most], end], max(0, len(tokens) - most))


def gap_tokens(tokenizer: Tokenizer, vocab_size: int) -> dict[str, int]:
    """The ids of the gaps, by how they are written.

    They are the tokenizer's own where it has them, else what is left of the model's vocabulary
    beyond it, from the end down (T5, and `moestro.data.spans`).

    Args:
        tokenizer: The one that the model was trained with.
        vocab_size: The model's, V.
    """
    found = {}
    for number in range(MOST_GAPS):
        name, beyond = f"<extra_id_{number}>", vocab_size - 1 - number
        known = tokenizer.encode_prompt(name, templated=True)
        if len(known) == 1:
            found[name] = known[0]
        elif beyond >= tokenizer.vocab_size:
            found[name] = beyond
    return found


def check_known(ids: Iterable[Any], vocab_size: int, tokenizer: Tokenizer, what: str) -> None:
    """Refuse ids outside a model's vocabulary, as where its tokenizer has more tokens.

    Args:
        ids: What is to be read.
        vocab_size: The model's, V.
        tokenizer: The model's.
        what: What to call the text.

    Raises:
        DataError: names the first of them.
    """
    for each in ids:
        if type(each) is not int:
            raise DataError(
                f"{what} has {each!r:.80} of type {type(each).__name__}; a token is a whole number "
                f"from 0 to {vocab_size - 1}, the model's vocabulary"
            )
        if not 0 <= each < vocab_size:
            known = 0 <= each < tokenizer.vocab_size
            name = tokenizer.specials.get(each) or (tokenizer.decode([each]) if known else "")
            raise DataError(
                f"{what} has token {each}{f', {name!r},' if name else ''} but the model's "
                f"vocabulary is 0 to {vocab_size - 1}; leave that token out, or use the tokenizer "
                "that the model was trained with"
            )
