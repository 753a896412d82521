"""How tokens pass through a model: prompts in chunks, beside the next tokens of other sequences.

Each sequence gets the same bits whatever runs beside it: a step is either native, where no row
depends on another, or taken sequence by sequence. Native steps also give the same bits however a
prompt is cut, so a past can be continued and forked at any token; not where angles depend on the
length of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moestro.infer.native_decoder import NativeDecoder, Stepped, supports
from moestro.models.build import Model
from moestro.models.cache import KVCache
from moestro.models.encdec import START_TOKEN
from moestro.models.network import ModelOutput
from moestro.models.passing import CHUNK, MOST_LOGITS, chunked
from moestro.moe.routing import Routing

# Tokens whose experts may be counted later.
MOST_UNCOUNTED = 16


class Routed(NamedTuple):
    """Which experts took T tokens of a sequence in its L mixtures, the first choice first.

    Attributes:
        experts_TLK: int64; -1 where fewer than K did.
        weights_TLK: fp32; 0 there.
    """

    experts_TLK: Tensor
    weights_TLK: Tensor


class Passed(NamedTuple):
    """What new tokens of a sequence gave.

    Attributes:
        logits_NV: of the token after each of the last N of them, as many as were asked for.
        experts: the expert with the most say on the last of them in each mixture; see
            `Piece.experts`.
        routed: makes the experts of all of them.
    """

    logits_NV: Tensor
    experts: tuple[int, ...]
    routed: Callable[[], Routed]


class Decoding:
    """Tokens through the model's own forward, sequence by sequence."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._load_LE: Tensor | None = None

    @property
    def cuts_exactly(self) -> bool:
        """Whether a prompt gives the same bits however it is cut."""
        return False

    @property
    def load_LE(self) -> Tensor | None:
        """How often each expert of each mixture was chosen so far; None before any was."""
        return self._load_LE

    def new(self) -> KVCache:
        """The memory of a sequence that has not begun; `fork` it where two texts begin alike."""
        cache: KVCache = self.model.new_cache(1)
        return cache

    def read(self, past: KVCache, tokens: Sequence[int]) -> Passed:
        """Pass tokens of a prompt, at least one, after those already passed.

        A prompt may come in any number of calls, between steps of other sequences; not that of a
        model that is not `chunked`, which passes in one.
        """
        size = self.chunk(tokens)
        for start in range(0, len(tokens), size):
            (passed,) = self.step([tokens[start : start + size]], [past])
        return passed

    def chunk(self, tokens: Sequence[int], *, told: bool = False) -> int:
        """How many of a prompt's tokens go through in one pass; fewer if all logits are wanted."""
        if not chunked(self.model.cfg):
            return len(tokens)
        if not self.cuts_exactly:
            return CHUNK
        rows = MOST_LOGITS // self.model.cfg.vocab_size
        return max(1, min(CHUNK, rows)) if told else max(CHUNK, self.model.together or 0)

    def begin(self, tokens: Sequence[int]) -> tuple[KVCache, Passed]:
        """A new sequence that has read its prompt, and what the last token gave."""
        past = self.new()
        return past, self.read(past, tokens)

    def step(
        self, tokens: Sequence[Sequence[int]], pasts: Sequence[KVCache], told: Sequence[int] = ()
    ) -> list[Passed]:
        """Pass the next tokens of each sequence, at least one; its memory is extended in place.

        Those of a prompt, a chunk at a time, may pass beside one token of each running sequence.

        Args:
            tokens: of each sequence.
            pasts: their memories.
            told: after how many of each sequence's tokens, the last ones, logits are wanted; by
                default 1.
        """
        outputs = [self._forward(new, past) for new, past in zip(tokens, pasts, strict=True)]
        for output in outputs:
            if output.routings:
                self._count(torch.stack([each.counts_E().cpu() for each in output.routings]))
        wanted = told or [1] * len(outputs)
        return [_passed(*each) for each in zip(outputs, wanted, strict=True)]

    def _count(self, chosen_LE: Tensor) -> None:
        # Never in place: another thread may be reading it.
        self._load_LE = chosen_LE if self._load_LE is None else self._load_LE + chosen_LE

    @torch.inference_mode()
    def _forward(self, tokens: Sequence[int], cache: KVCache) -> ModelOutput:
        output: ModelOutput = self.model(self._ids(tokens), cache=cache)
        return output

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        device = next(self.model.parameters()).device
        return torch.tensor([tokens], dtype=torch.int64, device=device)


def decoding_of(model: Model) -> Decoding:
    """Native where `native_decoder.supports` says so, else the Python forward."""
    if model.cfg.has_encoder:
        return EncDecDecoding(model)
    return NativeDecoding(model) if supports(model) is None else Decoding(model)


class EncDecDecoding(Decoding):
    """The encoder reads the prompt, its source; the decoder's own text begins with START_TOKEN."""

    def new(self) -> KVCache:
        """See `Decoding`; the source is not read yet."""
        cache: KVCache = self.model.decoder.new_cache()
        return cache

    @torch.inference_mode()
    def _forward(self, tokens: Sequence[int], cache: KVCache) -> ModelOutput:
        """First the whole source, and START_TOKEN; later tokens are the decoder's own."""
        if cache.source is None:
            cache.source = self.model.look(self.model.encode(self._ids(tokens)).memory)
            tokens = [START_TOKEN]
        output: ModelOutput = self.model.decode(self._ids(tokens), cache)
        return output


class NativeDecoding(Decoding):
    """Prompts and steps in native code, tokens of all sequences together."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._native = NativeDecoder(model)
        # Counting takes as long as a layer, so single tokens wait for others.
        self._uncounted: list[Tensor] = []
        self._counting = Lock()

    @property
    def cuts_exactly(self) -> bool:
        """See `Decoding`; not where angles depend on the length of the text."""
        return chunked(self.model.cfg)

    @property
    def load_LE(self) -> Tensor | None:
        """See `Decoding`; another thread may ask."""
        with self._counting:
            self._count_all()
            return self._load_LE

    def step(
        self, tokens: Sequence[Sequence[int]], pasts: Sequence[KVCache], told: Sequence[int] = ()
    ) -> list[Passed]:
        """See `Decoding`."""
        told = told or [1] * len(tokens)
        stepped = self._native.step(tokens, pasts, told)
        last_B = [end - 1 for end in accumulate(map(len, tokens))]
        experts_LTK = stepped.experts_LTK
        first_BL: list[list[int]] = [[]] * len(tokens)
        if experts_LTK.numel():
            with self._counting:
                self._uncounted.append(experts_LTK)
                if sum(each.shape[1] for each in self._uncounted) >= MOST_UNCOUNTED:
                    self._count_all()
            first_BL = [experts_LTK[:, last, 0].tolist() for last in last_B]
        logits = torch.split(stepped.logits_NV, list(told))
        rows = zip(logits, first_BL, tokens, last_B, strict=True)
        return [
            Passed(
                logits_NV,
                tuple(experts),
                partial(_between, stepped, last + 1 - len(new), last),
            )
            for logits_NV, experts, new, last in rows
        ]

    def _count_all(self) -> None:
        """Count what waits for it, with the lock held."""
        if self._uncounted:
            experts_LTK = torch.cat(self._uncounted, 1)
            self._uncounted.clear()
            self._count(_counts(experts_LTK, self.model.cfg.moe.num_experts))


def _passed(output: ModelOutput, told: int) -> Passed:
    experts = tuple(first_expert(routing) for routing in output.routings)
    logits_NV = output.logits[0, -told:]
    if told < output.logits.shape[1]:
        logits_NV = logits_NV.clone()  # those of the whole prompt are not kept with it
    return Passed(logits_NV, experts, partial(_routed, output.routings))


def _counts(experts_LTK: Tensor, num_experts: int) -> Tensor:
    """How often each expert was chosen in each layer."""
    layers = len(experts_LTK)
    places_L11 = num_experts * torch.arange(layers, device="cpu")[:, None, None]
    counts = torch.bincount((experts_LTK + places_L11).flatten(), minlength=layers * num_experts)
    return counts.view(layers, num_experts)


def _between(stepped: Stepped, first: int, last: int) -> Routed:
    """The experts of the tokens from `first` to `last` of a native step."""
    experts_LTK = stepped.experts_LTK[:, first : last + 1]
    weights_LTK = stepped.weights_LTK[:, first : last + 1]
    return Routed(experts_LTK.transpose(0, 1), weights_LTK.transpose(0, 1))


def _routed(routings: Sequence[Routing]) -> Routed:
    """The experts of all tokens of one sequence."""
    if not routings:
        nothing = torch.zeros(0, 0, 0, dtype=torch.float32, device="cpu")
        return Routed(nothing.long(), nothing)
    layers = [_choices(routing) for routing in routings]
    widest = max(experts_TK.shape[1] for experts_TK, _ in layers)
    experts, weights = (
        [torch.nn.functional.pad(each, (0, widest - each.shape[1]), value=empty) for each in column]
        for column, empty in zip(zip(*layers, strict=True), (-1, 0.0), strict=True)
    )
    return Routed(torch.stack(experts, 1), torch.stack(weights, 1))


def _choices(routing: Routing) -> tuple[Tensor, Tensor]:
    """Experts and weights by token, [T, K], those that kept it; the heaviest first if K varies."""
    if routing.top_k:
        experts_TK, weights_TK = routing.experts_TK(), routing.weights_R.view(-1, routing.top_k)
        kept_TK = None if routing.kept_R is None else routing.kept_R.view_as(experts_TK)
    else:
        weights_TE = routing.probs_TE.new_full(routing.probs_TE.shape, -torch.inf)
        kept_R = slice(None) if routing.kept_R is None else routing.kept_R
        where = (routing.tokens_R[kept_R], routing.experts_R[kept_R])
        weights_TE[where] = routing.weights_R[kept_R]
        weights_TK, experts_TK = weights_TE.sort(-1, descending=True)
        kept_TK = weights_TK > -torch.inf
    if kept_TK is None:
        return experts_TK, weights_TK
    return experts_TK.masked_fill(~kept_TK, -1), weights_TK.masked_fill(~kept_TK, 0.0)


def first_expert(routing: Routing) -> int:
    """The expert with the most say on the last token of a Routing; -1 if none took it.

    For token choice that is the first one chosen.
    """
    mine_R = routing.tokens_R == routing.num_tokens - 1
    experts_R = routing.experts_R[mine_R]
    if experts_R.numel() == 0:
        return -1
    best = 0 if routing.top_k else int(routing.weights_R[mine_R].argmax())
    return int(experts_R[best])
