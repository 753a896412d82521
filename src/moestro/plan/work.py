"""What one step of a model must read and compute: its prefill, and its decoding token by token.

Letters: E experts, K experts per token, B sequences, S context, D width, H heads, A head width.
"""

from __future__ import annotations

from typing import NamedTuple

from moestro.config import CacheKind, NetworkConfig, WindowConfig
from moestro.models.budget import position_bytes
from moestro.models.count import Count, sides
from moestro.plan.memory import DTYPES, cache_bytes, number_bytes


class StepWork(NamedTuple):
    """One step.

    Attributes:
        tokens: that it takes in.
        flops: of its matrix products.
        read_bytes: of weights and cache that it cannot do without.
    """

    tokens: int
    flops: float
    read_bytes: float


def share_hit(num_experts: int, top_k: int, tokens: int) -> float:
    """Share of a layer's experts that some of the tokens need: 1 - (1 - K / E)^tokens.

    The mean under balanced routing, where every token has each expert with probability K / E.
    """
    return float(1 - (1 - top_k / num_experts) ** tokens)


def prefill(cfg: NetworkConfig, context: int, batch: int, dtype: str) -> StepWork:
    """Read B prompts of S tokens; the head is needed for the last token of each alone.

    An encoder-decoder reads them by its encoder, and makes the keys and values of its decoder.
    """
    tokens, counted = context * batch, sides(cfg)[0]
    head = 0 if cfg.has_encoder else cfg.vocab_size * cfg.dim
    flops = tokens * (counted.forward_flops(context) - 2 * head) + batch * 2 * head
    return StepWork(tokens, flops, _bytes(cfg, counted, dtype, tokens, tables=head))


def decode(
    cfg: NetworkConfig, context: int, batch: int, dtype: str, cache: CacheKind = "as-is"
) -> StepWork:
    """One more token for each of B sequences that have S behind them.

    Latent attention multiplies with the cached vector itself, its matrices absorbed into those of
    queries and output (DeepSeek-V2, §2.1.2): nothing is unpacked. An encoder-decoder runs its
    decoder alone, with S source and S target tokens behind it.
    """
    counted, latent = sides(cfg)[-1], cfg.attention.latent
    attention = float(
        sum(s.flops * _looked_at(cfg, s.window, s.chunked, context) for s in counted.spans)
    )
    if latent is not None:
        width, layers = 2 * latent.kv_rank + latent.rope_dim, len(cfg.stacks()[-1].layers)
        index, looked_at = latent.indexer, context
        scores = 0.0
        if index is not None:
            looked_at = min(context, index.top_k)
            scores = 2.0 * index.num_heads * index.head_dim * context
        attention = layers * (2.0 * cfg.attention.num_heads * width * looked_at + scores)
    flops = batch * (2 * counted.matmul + attention)
    read_bytes = _bytes(cfg, counted, dtype, batch, tables=cfg.vocab_size * cfg.dim)
    return StepWork(batch, flops, read_bytes + _cache_read(cfg, context, batch, dtype, cache))


def _looked_at(cfg: NetworkConfig, window: int | None, chunked: bool, context: int) -> int:
    """Of S earlier positions, those that the next token attends to."""
    mix = cfg.attention.window
    if chunked and isinstance(mix, WindowConfig):
        return context % mix.size  # `window` may be cut to the model's context
    return min(context, window or context)


def _cache_read(cfg: NetworkConfig, context: int, batch: int, dtype: str, cache: CacheKind) -> int:
    """Bytes of the cache that the next token of each sequence cannot do without.

    All, but for earlier chunks, and for latent vectors that an indexer does not choose.
    """
    each, latent = position_bytes(cfg, number_bytes(dtype), cache), cfg.attention.latent
    index = None if latent is None else latent.indexer
    unread = 0
    for layer in cfg.stacks()[-1].layers:
        if layer.state is None:
            held = min(context, layer.window or context)
            wanted = _looked_at(cfg, layer.window, layer.chunk is not None, context)
            unread += (held - wanted) * sum(each)
            unread += 0 if index is None else max(0, wanted - index.top_k) * each[0]
    return cache_bytes(cfg, context, batch, dtype, cache) - batch * unread


def _bytes(cfg: NetworkConfig, counted: Count, dtype: str, tokens: int, tables: int) -> float:
    """Bytes of the weights that `tokens` tokens need: all, but of the experts only those hit."""
    bits = DTYPES[dtype]
    rest = counted.total - counted.input_embedding - counted.output_embedding - counted.expert
    hit = share_hit(cfg.moe.num_experts, cfg.moe.top_k, tokens) if cfg.moe is not None else 0.0
    return ((tables + rest) * bits.rest + hit * counted.expert * bits.experts) / 8
