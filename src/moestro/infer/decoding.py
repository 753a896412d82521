"""How tokens pass through a decoder: a prompt in chunks, then one token of many sequences at once.

Each sequence gets the same bits whatever runs beside it: prompts pass alone, and a step is either
native, where no row depends on another, or taken sequence by sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from moestro.config import LongRopeScaling, ModelConfig, RopeConfig
from moestro.errors import DataError
from moestro.infer.native_decoder import NativeDecoder, supports
from moestro.models.cache import KVCache
from moestro.models.decoder import Decoder, DecoderOutput
from moestro.moe.routing import Routing

# Tokens of a prompt that pass at once: enough rows for each expert, few enough for their memory.
CHUNK = 512


class Passed(NamedTuple):
    """What one new token of a sequence gave.

    Attributes:
        logits_1V: of the token after it.
        experts: the expert with the most say in each mixture; see `Piece.experts`.
    """

    logits_1V: torch.Tensor
    experts: tuple[int, ...]


class Decoding(Protocol):
    """A way to decode: `begin` a sequence with its prompt, `step` many by a token each."""

    def begin(self, tokens: Sequence[int]) -> tuple[Any, Passed]:
        """Pass a prompt; returns the sequence's memory and what its last token gave."""
        ...

    def step(self, tokens: Sequence[int], pasts: Sequence[Any]) -> list[Passed]:
        """Pass one token of each sequence, whose memory is extended in place."""
        ...


def decoding_of(model: Decoder) -> Decoding:
    """Native where `native_decoder.supports` says so, else the Python forward."""
    return NativeDecoding(model) if supports(model) is None else PythonDecoding(model)


class PythonDecoding:
    """Every step through the model's own forward, sequence by sequence."""

    def __init__(self, model: Decoder) -> None:
        self.model = model

    def begin(self, tokens: Sequence[int]) -> tuple[KVCache, Passed]:
        """See `Decoding`."""
        return prefill(self.model, tokens)

    def step(self, tokens: Sequence[int], pasts: Sequence[KVCache]) -> list[Passed]:
        """See `Decoding`."""
        pairs = zip(tokens, pasts, strict=True)
        return [_passed(_forward(self.model, [token], cache)) for token, cache in pairs]


class NativeDecoding:
    """The prompt through the model's own forward, every step in native code."""

    def __init__(self, model: Decoder) -> None:
        self.model, self.native = model, NativeDecoder(model)

    def begin(self, tokens: Sequence[int]) -> tuple[Any, Passed]:
        """See `Decoding`."""
        cache, passed = prefill(self.model, tokens)
        return self.native.past(cache), passed

    def step(self, tokens: Sequence[int], pasts: Sequence[Any]) -> list[Passed]:
        """See `Decoding`."""
        stepped = self.native.step(tokens, pasts)
        first_BL = stepped.experts_LBK[:, :, :1].transpose(0, 1).flatten(1).tolist()
        rows = zip(stepped.logits_BV, first_BL, strict=True)
        return [Passed(logits_V[None], tuple(experts)) for logits_V, experts in rows]


def check_tokens(tokens: Sequence[Any], vocab_size: int) -> None:
    """Refuse what are no tokens of a model.

    Raises:
        DataError: one is no whole number, or is outside the model's vocabulary.
    """
    for token in tokens:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise DataError(
                f"a token is a whole number from 0 to {vocab_size - 1}, the model's vocabulary; "
                f"given {token!r:.80} of type {type(token).__name__}"
            )


def prefill(model: Decoder, tokens: Sequence[int], chunk: int = CHUNK) -> tuple[KVCache, Passed]:
    """Pass a prompt, chunk by chunk, and return the cache and what its last token gave."""
    cache = model.new_cache(1)
    size = chunk if chunked(model.cfg) else len(tokens)
    for start in range(0, len(tokens), size):
        output = _forward(model, tokens[start : start + size], cache)
    return cache, _passed(output)


def chunked(cfg: ModelConfig) -> bool:
    """Whether a prompt may pass in chunks without changing what the model computes.

    Not where tokens compete for an expert's room, nor where angles depend on the whole length.
    """
    positions, moe = getattr(cfg.attention, "positions", None), getattr(cfg, "moe", None)
    if isinstance(positions, RopeConfig) and isinstance(positions.scaling, LongRopeScaling):
        return False
    return moe is None or (moe.capacity is None and moe.router.kind != "expert_choice")


@torch.inference_mode()
def _forward(model: Decoder, tokens: Sequence[int], cache: KVCache) -> DecoderOutput:
    device = next(model.parameters()).device
    tokens_BS = torch.tensor([tokens], dtype=torch.int64, device=device)
    output: DecoderOutput = model(tokens_BS, cache=cache)
    return output


def _passed(output: DecoderOutput) -> Passed:
    experts = tuple(first_expert(routing) for routing in output.routings)
    return Passed(output.logits[:, -1], experts)


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
