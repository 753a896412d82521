"""Writing text: one request or many at once, each streamed as its tokens are chosen."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moestro.errors import MoestroError
from moestro.infer.decoding import Decoding, check_tokens, decoding_of, first_expert
from moestro.infer.sampling import SamplingConfig, new_generator, next_tokens
from moestro.models.decoder import Decoder, DecoderOutput
from moestro.models.encdec import EncDec, EncDecOutput
from moestro.text import StreamDecoder, Tokenizer

Finish = Literal["stop", "length", "end_of_text"]
Step = Callable[[Sequence[int]], DecoderOutput | EncDecOutput]
# Requests that write at once; each holds a cache.
MOST_LIVE = 16


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
    for _, piece in generate_batch(model, tokenizer, [prompt], [sampling]):
        yield piece


def generate_batch(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    samplings: Sequence[SamplingConfig],
) -> Iterator[tuple[int, Piece]]:
    """Continue several prompts at once; what one gets does not depend on the others.

    Args:
        model: In eval mode.
        tokenizer: The one that the model was trained with.
        prompts: As for `stream`, of any lengths.
        samplings: One for each prompt, or one for all.

    Yields:
        (number of the prompt, Piece), the pieces of each prompt as from `stream`.

    Raises:
        MoestroError: as for `stream`, or there are not as many samplings as prompts.
    """
    if len(samplings) == 1:
        samplings = list(samplings) * len(prompts)
    if len(samplings) != len(prompts):
        raise MoestroError(
            f"{len(prompts)} prompts came with {len(samplings)} sampling settings; give one for "
            "each, or one for all"
        )
    session = Session(model, tokenizer)
    for prompt, sampling in zip(prompts, samplings, strict=True):
        session.add(prompt, sampling)
    while session.live:
        yield from session.step()


class Writer:
    """One text as it is written: chooses tokens, spells them, and knows when it ends.

    Attributes:
        token: The one chosen last, which must pass through the model next.
        done: Nothing more is to come.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingConfig,
        marks: Mapping[int, str] | None = None,
    ) -> None:
        """Begin a text.

        Args:
            tokenizer: The one that the model was trained with.
            sampling: How to choose tokens and when to stop.
            marks: Text of tokens that are none of the tokenizer's, or no text to it.
        """
        self.token, self.done = -1, False
        self._tokenizer, self._sampling, self._marks = tokenizer, sampling, marks or {}
        self._decoder, self._gate = StreamDecoder(tokenizer), _StopGate(sampling.stop)
        self._generator = new_generator(sampling)
        self._number = 0
        # A vocabulary padded to a round number has ids that mean nothing.
        self._size = max([tokenizer.vocab_size, *(token + 1 for token in self._marks)])
        unnamed = set(range(tokenizer.vocab_size, self._size)) - self._marks.keys()
        self._nameless_N = torch.tensor(sorted(unnamed), dtype=torch.int64)

    def choose(self, logits_1V: Tensor) -> list[Piece]:
        """Choose the next token; returns what is certain if it ends the text."""
        logits_1V = logits_1V[:, : self._size]
        if len(self._nameless_N):
            nameless_N = self._nameless_N.to(logits_1V.device)
            logits_1V = logits_1V.index_fill(1, nameless_N, -torch.inf)
        self.token = int(next_tokens(logits_1V, self._sampling, [self._generator]))
        if self.token not in self._tokenizer.ends:
            return []
        return self._push(Piece(self._decoder.flush(), self.token, (), "end_of_text"))

    def passed(self, experts: tuple[int, ...]) -> list[Piece]:
        """Take the experts that the chosen token met; returns what is certain now."""
        if self.token in self._marks:
            text = self._decoder.flush() + self._marks[self.token]
        else:
            text = self._decoder.push(self.token)
        self._number += 1
        finish: Finish | None = None
        if self._number == self._sampling.max_tokens:
            text, finish = text + self._decoder.flush(), "length"
        return self._push(Piece(text, self.token, experts, finish))

    def _push(self, piece: Piece) -> list[Piece]:
        pieces = list(self._gate.push(piece))
        self.done = piece.finish is not None or self._gate.stopped
        return pieces


class _Live(NamedTuple):
    """A request that is being written."""

    number: int
    writer: Writer
    past: Any
    logits_1V: Tensor


class Session:
    """Requests that come and go, written together: a step takes one token of each.

    What a request gets depends on its prompt, its settings and its seed alone.

    Attributes:
        live: Requests that are not done.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, most: int = MOST_LIVE) -> None:
        """Open a session.

        Args:
            model: In eval mode; must not change meanwhile.
            tokenizer: The one that the model was trained with.
            most: Requests written at once; others wait for their turn.

        Raises:
            MoestroError: the model is in training mode, or too small for the tokenizer.
        """
        check_ready(model, tokenizer)
        self._tokenizer, self._context = tokenizer, model.cfg.attention.context
        self._decoding: Decoding = decoding_of(model)
        self._most, self._vocab_size = most, model.cfg.vocab_size
        self._waiting: deque[tuple[int, list[int], Writer]] = deque()
        self._running: list[_Live] = []
        self._count = 0

    @property
    def live(self) -> int:
        """Requests that are not done, waiting ones included."""
        return len(self._waiting) + len(self._running)

    def add(self, prompt: str | Sequence[int], sampling: SamplingConfig) -> int:
        """Take a request, which begins with a later `step`; returns its number, from 0.

        Raises:
            DataError: a token of the prompt is none of the model's.
        """
        tokens, _ = encode_prompt(self._tokenizer, prompt, self._context)
        check_tokens(tokens, self._vocab_size)
        number, self._count = self._count, self._count + 1
        self._waiting.append((number, tokens, Writer(self._tokenizer, sampling)))
        return number

    def drop(self, number: int) -> None:
        """Forget a request, whether it waits or is being written; others go on unchanged."""
        self._waiting = deque(each for each in self._waiting if each[0] != number)
        self._running = [each for each in self._running if each.number != number]

    def step(self) -> list[tuple[int, Piece]]:
        """Begin one waiting request, if there is room, and write a token of every running one.

        Returns:
            (number of the request, Piece) of all text that is certain now.

        Raises:
            MoestroError: the logits of a request allow no choice.
        """
        if self._waiting and len(self._running) < self._most:
            number, tokens, writer = self._waiting.popleft()
            past, passed = self._decoding.begin(tokens)
            self._running.append(_Live(number, writer, past, passed.logits_1V))
        made = [
            (each.number, piece)
            for each in self._running
            for piece in each.writer.choose(each.logits_1V)
        ]
        running = [each for each in self._running if not each.writer.done]
        if running:
            tokens_B = [each.writer.token for each in running]
            outputs = self._decoding.step(tokens_B, [each.past for each in running])
            for place, (each, passed) in enumerate(zip(running, outputs, strict=True)):
                made += [(each.number, piece) for piece in each.writer.passed(passed.experts)]
                running[place] = each._replace(logits_1V=passed.logits_1V)
        self._running = [each for each in running if not each.writer.done]
        return made


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
    writer = Writer(tokenizer, sampling, marks)
    output = step(start)
    while True:
        yield from writer.choose(output.logits[:, -1])
        if writer.done:
            return
        output = step([writer.token])
        yield from writer.passed(tuple(map(first_expert, output.routings)))
        if writer.done:
            return


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
