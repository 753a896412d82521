"""One text as it is generated: tokens chosen, decoded, held back while they may change.

A special token that does not end the text is shown as a break, that is as the end of a line, so
that what it sets apart does not run together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from moestro.infer.channels import FINAL, Channels
from moestro.infer.sampling import Past, SamplingConfig, new_generator, next_tokens, penalised
from moestro.streaming import StreamDecoder
from moestro.text import Tokenizer

Finish = Literal["stop", "length", "end_of_text"]
# Sampling takes as long as the tokens are many; below this share it is worth while to pick them.
_FEW = 8


class Scored(NamedTuple):
    """How likely a token was, by the model's logits as they are: no penalty, no temperature.

    Attributes:
        token: Its id.
        logprob: Its natural logarithm.
        top: The likeliest tokens and theirs, as many as were asked for, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Piece(NamedTuple):
    """One generated token.

    Attributes:
        text: What it adds to the text; empty while a character is incomplete, for the token that
            ends the text, and from where a stop string begins.
        token: Its id.
        experts: The first expert that it met in each MoE layer, in the order of
            `model.moe_layers`, -1 where none took it; () for a dense model and for the end of text.
        finish: Why the text ends with this token; None while it goes on.
        channel: The part of the reply that its text is in, see `moestro.infer.channels`.
        scored: How likely it was; None where that was not asked for.
        stop: The stop string that the text ends before.
    """

    text: str
    token: int
    experts: tuple[int, ...] = ()
    finish: Finish | None = None
    channel: str = FINAL
    scored: Scored | None = None
    stop: str | None = None


def score(logits_1V: Tensor, token: int, top: int) -> Scored:
    """How likely a token was, and which `top` tokens were likeliest; the lower id of equals."""
    logprobs_V = logits_1V[0].detach().to("cpu", torch.float64).log_softmax(-1)
    top = min(top, len(logprobs_V))
    if not top:
        return Scored(token, float(logprobs_V[token]), ())
    likely_N = (logprobs_V >= logprobs_V.topk(top).values[-1]).nonzero()[:, 0]
    order_N = likely_N[logprobs_V[likely_N].argsort(descending=True, stable=True)][:top]
    pairs = zip(order_N.tolist(), logprobs_V[order_N].tolist(), strict=True)
    return Scored(token, float(logprobs_V[token]), tuple(pairs))


class Constraint(Protocol):
    """What the final channel of a text may be; one object for each text."""

    def allowed(self) -> Tensor:
        """Whether each token may come next: bool on the CPU; tokens past its end may not."""

    def push(self, token: int) -> None:
        """Take the token that was chosen."""


class Writer:
    """One text as it is generated: chooses tokens, decodes them, and knows when it ends.

    Attributes:
        token: The one chosen last, which must pass through the model next.
        done: Nothing more is to come.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingConfig,
        marks: Mapping[int, str] | None = None,
        prompt: Sequence[int] = (),
        constraint: Constraint | None = None,
        top: int | None = None,
    ) -> None:
        """Begin a text.

        Args:
            tokenizer: The one that the model was trained with.
            sampling: How to choose tokens and when to stop.
            marks: Text of tokens that the tokenizer lacks or decodes to nothing.
            prompt: What the model reads before the first token that is chosen.
            constraint: What the text may be; None: anything.
            top: Say how likely each token was, beside so many others; None: do not.
        """
        self._top = top
        self._scored: Scored | None = None
        self.token, self.done, self._constraint = -1, False, constraint
        self._tokenizer, self._sampling, self._marks = tokenizer, sampling, marks or {}
        self._decoder, self._gate = StreamDecoder(tokenizer), _StopGate(sampling.stop)
        self._generator = new_generator(sampling)
        self._past, self._channels = Past(prompt), Channels(tokenizer, prompt)
        self._last = ""  # the last character so far
        self._number = 0
        # A vocabulary padded to a round number has ids that mean nothing.
        self._size = max([tokenizer.vocab_size, *(token + 1 for token in self._marks)])
        unnamed = set(range(tokenizer.vocab_size, self._size)) - self._marks.keys()
        self._nameless_N = torch.tensor(sorted(unnamed), dtype=torch.int64, device="cpu")

    def choose(self, logits_1V: Tensor) -> list[Piece]:
        """Choose the next token; returns what is certain if it ends the text."""
        plain_1V = logits_1V
        logits_1V = penalised(logits_1V, self._sampling, [self._past])[:, : self._size]
        if len(self._nameless_N):
            nameless_N = self._nameless_N.to(logits_1V.device)
            logits_1V = logits_1V.index_fill(1, nameless_N, -torch.inf)
        held = self._constraint if self._channels.current == FINAL else None
        ids_N = None
        if held is not None:
            logits_1V, ids_N = restricted(logits_1V, held.allowed())
        chosen = int(next_tokens(logits_1V, self._sampling, [self._generator]))
        self.token = chosen if ids_N is None else int(ids_N[chosen])
        if held is not None:
            held.push(self.token)
        if self._top is not None:
            self._scored = score(plain_1V, self.token, self._top)
        self._past.chosen[self.token] += 1
        if self.token not in self._tokenizer.ends:
            return []
        return self._push(self._decoder.flush(), (), "end_of_text")

    def passed(self, experts: tuple[int, ...]) -> list[Piece]:
        """Take the experts that the chosen token met; returns what is certain now."""
        if self.token in self._marks:
            text = self._decoder.flush() + self._marks[self.token]
        elif self.token in self._tokenizer.specials:
            text = self._decoder.flush()
            text += "\n" if (self._last + text)[-1:] not in ("", "\n") else ""
        else:
            text = self._decoder.push(self.token)
        self._number += 1
        finish: Finish | None = None
        if self._number == self._sampling.max_tokens:
            text, finish = text + self._decoder.flush(), "length"
        return self._push(text, experts, finish)

    def _push(self, text: str, experts: tuple[int, ...], finish: Finish | None) -> list[Piece]:
        self._last = (self._last + text)[-1:]
        piece = Piece(text, self.token, experts, finish, self._channels.current, self._scored)
        self._channels.push(self.token)
        pieces = list(self._gate.push(piece))
        self.done = finish is not None or self._gate.stopped
        return pieces


def restricted(logits_1V: Tensor, allowed_N: Tensor) -> tuple[Tensor, Tensor | None]:
    """The logits of what may be chosen, and its ids; of few tokens nothing else is computed.

    Args:
        logits_1V: of all tokens.
        allowed_N: of the first N; none of the others is allowed.

    Returns:
        The logits [1, n] of the n allowed tokens and their ids, or, where there are many or none,
        all logits with -inf in the place of the others, and None.
    """
    allowed_N = allowed_N[: logits_1V.shape[1]]
    if not 0 < int(allowed_N.count_nonzero()) * _FEW <= logits_1V.shape[1]:
        return masked(logits_1V, allowed_N), None
    ids_N = allowed_N.nonzero()[:, 0]
    return logits_1V[:, ids_N.to(logits_1V.device)], ids_N


def masked(logits_1V: Tensor, allowed_N: Tensor) -> Tensor:
    """The logits, -inf where a token is not allowed."""
    size = min(logits_1V.shape[1], len(allowed_N))
    allowed_N = allowed_N[:size].to(logits_1V.device)
    masked_1N = torch.where(allowed_N, logits_1V[:, :size], -torch.inf)
    if size == logits_1V.shape[1]:
        return masked_1N
    return torch.nn.functional.pad(masked_1N, (0, logits_1V.shape[1] - size), value=-torch.inf)


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
        found = find_stop(text, self._stops)
        if found is not None:
            start, stop = found
            self.stopped = True
            self._held[-1] = piece._replace(finish="stop", stop=stop)
            yield from _cut(self._held, start)
            return
        certain = len(text) if piece.finish else len(text) - _beginning(text, self._stops)
        while self._held and len(self._held[0].text) <= certain:
            certain -= len(self._held[0].text)
            yield self._held.pop(0)


def find_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the stop string that is complete first begins in `text`, and it; None without one."""
    found = [
        (text.index(stop) + len(stop), text.index(stop), stop) for stop in stops if stop in text
    ]
    return min(found)[1:] if found else None


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
