"""Generating text: one request or many together, each streamed as its tokens are chosen."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.errors import MoestroError
from moestro.infer.decoding import Decoding, Routed, decoding_of
from moestro.infer.prefixes import Prefixes
from moestro.infer.prompts import encode, gap_tokens
from moestro.infer.sampling import SamplingConfig
from moestro.infer.writing import Constraint, Piece, Scored, Writer, score
from moestro.models.build import Model
from moestro.models.cache import KVCache
from moestro.models.encdec import START_TOKEN
from moestro.text import Tokenizer

# Requests that run together; each holds a cache.
MOST_LIVE = 16


def stream(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    sampling: SamplingConfig,
    special: bool = False,
) -> Iterator[Piece]:
    """Continue a prompt, or answer it, yielding each token as soon as its text is certain.

    Text that may be the beginning of a stop string waits until it is known not to be one. A token
    is yielded after it has itself passed through the model, since only then are its experts known.
    An encoder-decoder's prompt is its source; its answer begins after START_TOKEN.

    Args:
        model: In eval mode.
        tokenizer: The one that the model was trained with.
        prompt: Text of any length, or its tokens; see `prompts.encode` for what is kept of it.
        sampling: How to choose tokens and when to stop.
        special: Spell special tokens out; otherwise one that does not end the text is a line's end
            (gaps of an encoder-decoder always appear as they are written).

    Yields:
        One Piece per generated token; the texts joined are the continuation, without the stop
        string. The last one, and only that one, has a `finish`.

    Raises:
        MoestroError: the model is in training mode, does not know a token of the prompt, or its
            logits allow no choice.
    """
    for _, piece in generate_batch(model, tokenizer, [prompt], [sampling], special):
        yield piece


def generate_batch(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    samplings: Sequence[SamplingConfig],
    special: bool = False,
) -> Iterator[tuple[int, Piece]]:
    """Continue several prompts together; each result is independent of the others.

    Args:
        model: In eval mode.
        tokenizer: The one that the model was trained with.
        prompts: As for `stream`, of any lengths.
        samplings: One for each prompt, or one for all.
        special: As for `stream`.

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
        session.add(prompt, sampling, special)
    while session.live:
        yield from session.step()
        for error in session.failed.values():
            raise error


def _spelled(tokenizer: Tokenizer, special: bool | Collection[str]) -> dict[int, str]:
    """The special tokens that are spelled out, and how."""
    chosen = tokenizer.specials.values() if special is True else special or ()
    return {token: name for token, name in tokenizer.specials.items() if name in chosen}


@dataclass
class _Live:
    """A request whose prompt is being read, or whose text is being written."""

    number: int
    writer: Writer
    decoding: Decoding
    past: KVCache | None  # None while it waits
    prompt: list[int]  # what is not read yet
    passed: list[int]  # what is
    routed: list[Routed] | None  # of what has passed, where that is wanted
    scored: list[Scored] | None = None  # of the prompt, where that is wanted
    top: int = 0
    logits_1V: Tensor | None = None  # of its next token


class Session:
    """Requests that come and go, written together: a step takes one token of each.

    What a request gets depends on its prompt, its settings and its seed alone.

    Attributes:
        live: Requests that are not done.
        failed: Requests that ended with an error, by number; whoever reads it may empty it.
        scored: Of requests whose prompt is read and that wanted it, how likely each of its tokens
            was but the first, by number; whoever reads it may empty it.
        cached: Of requests that have begun, how many tokens of the prompt were not computed, since
            an earlier text began with them, by number; whoever reads it may empty it.
        routed: Of requests that are done and wanted it, the experts of every token that passed,
            by number; whoever reads it may empty it.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        most: int = MOST_LIVE,
        cache_bytes: int = 0,
        adapted: Mapping[str, Model] | None = None,
    ) -> None:
        """Open a session.

        Args:
            model: In eval mode; must not change meanwhile.
            tokenizer: The one that the model was trained with.
            most: Requests that run together; others wait for their turn.
            cache_bytes: Memory for the pasts of earlier texts: what a prompt shares with one of
                them is not computed again, which changes no bit; 0: no memory. A model without
                native steps keeps none, nor does one with longrope, since its numbers would change.
            adapted: The model with adapters, by what `add` calls them; in eval mode.

        Raises:
            MoestroError: the model is in training mode.
        """
        if model.training:
            raise MoestroError("the model is in training mode; call model.eval() before generating")
        self._tokenizer, self._cfg = tokenizer, model.cfg
        self._decoding = decoding_of(model)
        self._adapted = {name: decoding_of(each) for name, each in (adapted or {}).items()}
        self._most = most
        self._waiting: deque[_Live] = deque()
        self._running: list[_Live] = []
        self._count = 0
        self.failed: dict[int, MoestroError] = {}
        self.routed: dict[int, list[Routed]] = {}
        self.scored: dict[int, list[Scored]] = {}
        self.cached: dict[int, int] = {}
        self.prefixes: Prefixes | None = None
        if cache_bytes and self._decoding.cuts_exactly:
            self.prefixes = Prefixes(cache_bytes)

    @property
    def live(self) -> int:
        """Requests that are not done, waiting ones included."""
        return len(self._waiting) + len(self._running)

    @property
    def load_LE(self) -> Tensor | None:
        """How often each expert of each mixture was chosen so far; None before any was."""
        decodings = (self._decoding, *self._adapted.values())
        loads = [each.load_LE for each in decodings if each.load_LE is not None]
        return torch.stack(loads).sum(0) if loads else None

    def add(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingConfig,
        special: bool | Collection[str] = False,
        constraint: Constraint | None = None,
        routed: bool = False,
        top: int | None = None,
        prompt_scored: bool = False,
        adapter: str | None = None,
    ) -> int:
        """Take a request, which begins with a later `step`; returns its number, from 0.

        Args:
            prompt: As for `stream`.
            sampling: How to choose tokens and when to stop.
            special: As for `stream`, or the names of those to spell out.
            constraint: What the text may be; None: anything.
            routed: Keep the experts of its tokens, prompt and text, for the attribute `routed`.
            top: Say in each Piece how likely its token was, beside so many others; None: do not.
            prompt_scored: The same of the prompt's tokens, for the attribute `scored`.
            adapter: The adapters that the session was opened with; None: the model as it is.

        Raises:
            DataError: the prompt has a token that the model does not know.
            MoestroError: the prompt has no logits, since an encoder reads it.
        """
        if prompt_scored and self._cfg.has_encoder:
            raise MoestroError(
                "an encoder reads this model's prompt, which gives no logits between its tokens; "
                "leave the prompt's log-probabilities out"
            )
        tokenizer = self._tokenizer
        tokens, _ = encode(self._cfg, tokenizer, prompt)
        number, self._count = self._count, self._count + 1
        start, marks = tokens, _spelled(tokenizer, special)
        if self._cfg.has_encoder:
            gaps = gap_tokens(tokenizer, self._cfg.vocab_size)
            start, marks = [START_TOKEN], {token: name for name, token in gaps.items()} | marks
        writer = Writer(tokenizer, sampling, marks, start, constraint, top)
        decoding = self._decoding if adapter is None else self._adapted[adapter]
        live = _Live(number, writer, decoding, None, tokens, [], [] if routed else None)
        live.scored, live.top = [] if prompt_scored else None, top or 0
        self._waiting.append(live)
        return number

    def drop(self, number: int) -> None:
        """Forget a request, whether it waits or is being written; others go on unchanged."""
        self._waiting = deque(each for each in self._waiting if each.number != number)
        for each in self._running:
            if each.number == number:
                self._keep(each)
        self._running = [each for each in self._running if each.number != number]

    def step(self) -> list[tuple[int, Piece]]:
        """Write a token of every running request, and read a chunk of the next one's prompt.

        All pass through the model together, so that a long prompt holds the others up by no more
        than a chunk.

        A request whose logits allow no choice ends alone, in `failed`.

        Returns:
            (number of the request, Piece) of all text that is certain now.
        """
        if self._waiting and len(self._running) < self._most and not self._reading():
            self._begin(self._waiting.popleft())
        made: list[tuple[int, Piece]] = []
        for each in self._running:
            if each.logits_1V is not None:
                try:
                    made += [(each.number, piece) for piece in each.writer.choose(each.logits_1V)]
                except MoestroError as error:
                    self.failed[each.number] = error
                each.logits_1V = None  # it may be a part of those of a whole prompt
        self._leave()
        if self._running:
            made += self._pass()
            self._leave()
        return made

    def _begin(self, new: _Live) -> None:
        """Give a request its past: that of what it shares with a text before, if there is one."""
        found, known = None, 0
        prefixes = self._prefixes_of(new)
        if prefixes is not None and new.routed is None and new.scored is None:
            running = [
                (each.passed, each.past)
                for each in self._running
                if each.past is not None and each.decoding is self._decoding
            ]
            found = prefixes.find(new.prompt, running)
        if found is not None:
            known = found.position
        new.past = found or new.decoding.new()
        new.passed, new.prompt = new.prompt[:known], new.prompt[known:]
        self.cached[new.number] = known
        self._running.append(new)

    def _reading(self) -> bool:
        """Whether a prompt is being read in chunks; at most one at a time."""
        return any(each.prompt for each in self._running)

    def _pass(self) -> list[tuple[int, Piece]]:
        """What was chosen, and a chunk of a prompt, through the model, and with each adapter."""
        made: list[tuple[int, Piece]] = []
        for decoding in (self._decoding, *self._adapted.values()):
            live = [each for each in self._running if each.decoding is decoding]
            made += self._pass_through(decoding, live) if live else []
        return made

    def _pass_through(self, decoding: Decoding, live: Sequence[_Live]) -> list[tuple[int, Piece]]:
        made: list[tuple[int, Piece]] = []
        tokens = [self._chunk(each) or [each.writer.token] for each in live]
        pasts = [each.past for each in live if each.past is not None]
        told = [
            len(new) if each.prompt and each.scored is not None else 1
            for each, new in zip(live, tokens, strict=True)
        ]
        try:
            outputs = decoding.step(tokens, pasts, told)
        except BaseException:
            # Some layers may have the new tokens and others not: nothing goes on from such a past.
            self._running = [each for each in self._running if all(each is not one for one in live)]
            raise
        for each, new, passed in zip(live, tokens, outputs, strict=True):
            each.passed += new
            if each.prompt:
                each.prompt = each.prompt[len(new) :]
                if each.scored is not None:
                    self._score(each, new, passed.logits_NV)
            else:
                made += [(each.number, piece) for piece in each.writer.passed(passed.experts)]
            each.logits_1V = None if each.prompt else passed.logits_NV[-1:]
            if each.routed is not None:
                each.routed.append(passed.routed())
        return made

    def _chunk(self, each: _Live) -> list[int]:
        """What passes next of a prompt; nothing once it is read."""
        return each.prompt[: each.decoding.chunk(each.prompt, told=each.scored is not None)]

    def _score(self, each: _Live, new: Sequence[int], logits_NV: Tensor) -> None:
        """How likely the tokens of a prompt were that come after the new ones."""
        assert each.scored is not None
        following = [*new[1:], *each.prompt[:1]]
        for logits_1V, token in zip(logits_NV[:, None], following, strict=False):
            each.scored.append(score(logits_1V, token, each.top))
        if not each.prompt:
            self.scored[each.number] = each.scored

    def _leave(self) -> None:
        """Let requests go that are done."""
        left = []
        for each in self._running:
            if not each.writer.done and each.number not in self.failed:
                left.append(each)
                continue
            if each.routed is not None:
                self.routed[each.number] = each.routed
            self._keep(each)
        self._running = left

    def _keep(self, each: _Live) -> None:
        """Keep the past of a text that is done."""
        prefixes = self._prefixes_of(each)
        if prefixes is not None and each.past is not None and each.number not in self.failed:
            prefixes.keep(each.passed, each.past)

    def _prefixes_of(self, each: _Live) -> Prefixes | None:
        """What is known of earlier texts; nothing with adapters, which compute other pasts."""
        return self.prefixes if each.decoding is self._decoding else None
