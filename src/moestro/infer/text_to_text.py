"""Streaming text from an encoder-decoder: the source is read once, the answer token by token.

A gap in a text is written `<extra_id_0>`, `<extra_id_1>` and so on, as T5's tokenizer spells it;
an encoder-decoder that learned to fill gaps answers with each gap's mark and what belongs there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch

from moestro.infer.engine import Prompt, check_known, check_ready, generate
from moestro.infer.sampling import SamplingConfig
from moestro.infer.writing import Piece
from moestro.models.encdec import START_TOKEN, EncDec, EncDecCache, EncDecOutput
from moestro.text import Tokenizer

# As many as T5's tokenizer has.
MOST_GAPS = 100
_GAP = re.compile(r"(<extra_id_\d+>)")


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


def stream(
    model: EncDec,
    tokenizer: Tokenizer,
    source: str | Sequence[int],
    sampling: SamplingConfig,
    special: bool = False,
) -> Iterator[Piece]:
    """Answer a source, yielding each token as soon as its text is certain.

    The decoder begins with `moestro.models.encdec.START_TOKEN`. A token's `experts` are those of
    the decoder's mixtures, the last ones of `model.moe_layers`.

    Args:
        model: In eval mode.
        tokenizer: The one that the model was trained with.
        source: Text of any length, or its tokens; see `encode_source` for what is kept of it.
        sampling: How to choose tokens and when to stop.
        special: As for `moestro.infer.engine.stream`.

    Yields:
        As `moestro.infer.engine.stream`; gaps appear in the text as they are written.

    Raises:
        MoestroError: the model is in training mode, does not know a token of the source, or its
            logits allow no choice.
    """
    check_ready(model)
    vocab_size = model.cfg.vocab_size
    tokens, _ = encode_source(tokenizer, source, model.cfg.attention.context, vocab_size)
    check_known(tokens, vocab_size, tokenizer, "the source")
    marks = {token: name for name, token in gap_tokens(tokenizer, vocab_size).items()}
    marks |= tokenizer.specials if special else {}
    cache = _read(model, tokens)
    yield from generate(
        lambda new: _decode(model, new, cache), [START_TOKEN], tokenizer, sampling, marks
    )


@torch.inference_mode()
def _read(model: EncDec, tokens: Sequence[int]) -> EncDecCache:
    device = model.embed.weight.device
    source_BS = torch.tensor([tokens], dtype=torch.int64, device=device)
    return model.new_cache(model.encode(source_BS).memory)


@torch.inference_mode()
def _decode(model: EncDec, tokens: Sequence[int], cache: EncDecCache) -> EncDecOutput:
    device = model.embed.weight.device
    return model.decode(torch.tensor([tokens], dtype=torch.int64, device=device), cache)
