"""Streaming text from a prompt: prefill once, then one token at a time through the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moestro.errors import MoestroError
from moestro.infer.sampling import SamplingConfig, new_generator, next_tokens
from moestro.models.cache import KVCache
from moestro.models.decoder import Decoder, DecoderOutput
from moestro.models.encdec import EncDec, EncDecOutput
from moestro.moe.routing import Routing
from moestro.text import StreamDecoder, Tokenizer

Finish = Literal["stop", "length", "end_of_text"]
Step = Callable[[Sequence[int]], DecoderOutput | EncDecOutput]


class Piece(NamedTuple):
    """One generated token.

    Attributes:
        text: What it adds to the text; empty while a character is incomplete, for the token that
            ends the text, and from where a stop string begins.
        token: Its id.
        experts: The first expert that it met in each MoE layer, in the order of
            `model.moe_layers`, -1 where none took it; () for a dense model and for the end of text.
        finish: Why the text ends with this token; None while it goes on.
    """

    text: str
    token: int
    experts: tuple[int, ...] = ()
    finish: Finish | None = None


class Prompt(NamedTuple):
    """A prompt as the model gets it.

    Attributes:
        tokens: Ids, at least one, at most the model's context.
        dropped: Tokens left out at the start because the context was full.
    """

    tokens: list[int]
    dropped: int


def encode_prompt(tokenizer: Tokenizer, prompt: str | Sequence[int], context: int) -> Prompt:
    """Turn text, or its tokens, into at most `context` tokens, keeping the last ones.

    An empty prompt becomes the end-of-text token, after which a new document begins.
    """
    tokens = tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)
    tokens = tokens or [tokenizer.end_of_text]
    return Prompt(tokens[-context:], max(0, len(tokens) - context))


def stream(
    model: Decoder, tokenizer: Tokenizer, prompt: str | Sequence[int], sampling: SamplingConfig
) -> Iterator[Piece]:
    """Continue a prompt, yielding each token as soon as its text is certain.

    Text that may be the beginning of a stop string waits until it is known not to be one. A token
    is yielded after it has itself passed through the model, since only then are its experts known.

    Args:
        model: In eval mode.
        tokenizer: The one that the model was trained with.
        prompt: Text of any length, or its tokens; see `encode_prompt` for what is kept of it.
        sampling: How to choose tokens and when to stop.

    Yields:
        One Piece per generated token; the texts joined are the continuation, without the stop
        string. The last one, and only that one, has a `finish`.

    Raises:
        MoestroError: the model is in training mode, has no room for the tokenizer's vocabulary, or
            its logits allow no choice.
    """
    check_ready(model, tokenizer)
    tokens, _ = encode_prompt(tokenizer, prompt, model.cfg.attention.context)
    cache = model.new_cache(1)
    yield from generate(lambda new: _forward(model, new, cache), tokens, tokenizer, sampling)


def check_ready(model: Decoder | EncDec, tokenizer: Tokenizer) -> None:
    """Refuse to generate with a model in training mode, or too small for the tokenizer.

    Raises:
        MoestroError: it is one of them.
    """
    if model.training:
        raise MoestroError("the model is in training mode; call model.eval() before generating")
    if model.cfg.vocab_size < tokenizer.vocab_size:
        raise MoestroError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the model only "
            f"{model.cfg.vocab_size}; use the tokenizer that the model was trained with"
        )


def generate(
    step: Step,
    start: Sequence[int],
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    marks: Mapping[int, str] | None = None,
) -> Iterator[Piece]:
    """Choose token after token until one ends the text; see `stream` for what is yielded.

    Args:
        step: Passes tokens through the model, which remembers those before them.
        start: What the model reads before the first token that is chosen.
        tokenizer: The one that the model was trained with.
        sampling: How to choose tokens and when to stop.
        marks: Text of tokens that are none of the tokenizer's, or no text to it.
    """
    gate = _StopGate(sampling.stop)
    for piece in _tokens(step, start, tokenizer, sampling, marks or {}):
        yield from gate.push(piece)
        if gate.stopped:
            return


def _tokens(
    step: Step,
    start: Sequence[int],
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    marks: Mapping[int, str],
) -> Iterator[Piece]:
    """Every generated token with its text, before any thought of stop strings."""
    decoder = StreamDecoder(tokenizer)
    generator = new_generator(sampling)
    # A vocabulary padded to a round number has ids that mean nothing.
    size = max([tokenizer.vocab_size, *(token + 1 for token in marks)])
    nameless = [token for token in range(tokenizer.vocab_size, size) if token not in marks]
    output = step(start)
    for number in range(1, sampling.max_tokens + 1):
        logits_BV = output.logits[:, -1, :size]
        if nameless:
            nameless_N = torch.tensor(nameless, device=logits_BV.device)
            logits_BV = logits_BV.index_fill(1, nameless_N, -torch.inf)
        token = int(next_tokens(logits_BV, sampling, [generator]))
        if token in tokenizer.ends:
            yield Piece(decoder.flush(), token, (), "end_of_text")
            return
        text = decoder.flush() + marks[token] if token in marks else decoder.push(token)
        output = step([token])
        experts = tuple(first_expert(routing) for routing in output.routings)
        last = number == sampling.max_tokens
        yield Piece(
            text + decoder.flush() if last else text, token, experts, "length" if last else None
        )


@torch.inference_mode()
def _forward(model: Decoder, tokens: Sequence[int], cache: KVCache) -> DecoderOutput:
    device = next(model.parameters()).device
    tokens_BS = torch.tensor([tokens], dtype=torch.int64, device=device)
    output: DecoderOutput = model(tokens_BS, cache=cache)
    return output


def first_expert(routing: Routing) -> int:
    """The expert with the most say on the last token of a Routing; -1 if none took it.

    For token choice that is the first one chosen.
    """
    mine_R = routing.tokens_R == routing.num_tokens - 1
    experts_R: Tensor = routing.experts_R[mine_R]
    if experts_R.numel() == 0:
        return -1
    best = 0 if routing.top_k else int(routing.weights_R[mine_R].argmax())
    return int(experts_R[best])


class _StopGate:
    """Holds pieces back while their text may belong to a stop string.

    The stop string that is complete first counts, whatever the tokens' borders; of two that end
    together, the longer.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held: list[Piece] = []
        self.stopped = False

    def push(self, piece: Piece) -> Iterator[Piece]:
        """Take one piece; yield those whose text is now certain."""
        self._held.append(piece)
        text = "".join(each.text for each in self._held)
        start = find_stop(text, self._stops)
        if start is not None:
            self.stopped = True
            self._held[-1] = piece._replace(finish="stop")
            yield from _cut(self._held, start)
            return
        certain = len(text) if piece.finish else len(text) - _beginning(text, self._stops)
        while self._held and len(self._held[0].text) <= certain:
            certain -= len(self._held[0].text)
            yield self._held.pop(0)


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string that is complete first begins in `text`; None without one."""
    found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    return min(found)[1] if found else None


def _beginning(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` with which some stop string begins."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


def _cut(pieces: Sequence[Piece], length: int) -> Iterator[Piece]:
    """The same pieces, with the first `length` characters of their text."""
    for piece in pieces:
        yield piece._replace(text=piece.text[:length])
        length = max(0, length - len(piece.text))
