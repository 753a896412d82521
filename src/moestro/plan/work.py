"""What one step of a model must read and compute: its prefill, and its decoding token by token.

Letters: E experts, K experts per token, B sequences, S context, D width, H heads, A head width.
"""

from __future__ import annotations

from typing import NamedTuple

from moestro.config import EncDecConfig, ModelConfig
from moestro.models.count import Count, count
from moestro.plan.memory import DTYPES, cache_bytes


class Work(NamedTuple):
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


def prefill(
    cfg: ModelConfig | EncDecConfig, counted: Count, context: int, batch: int, dtype: str
) -> Work:
    """Read B prompts of S tokens; the head is needed for the last token of each alone.

    An encoder-decoder reads them by its encoder, and makes the keys and values of its decoder.
    """
    tokens, head = context * batch, cfg.vocab_size * cfg.dim
    if isinstance(cfg, EncDecConfig):
        side = _encoder(cfg)
        look = _cross_keys(cfg)
        scores = 4 * cfg.attention.num_heads * cfg.head_dim * cfg.encoder_layers * context
        work = tokens * (2 * (side.matmul - head + look) + scores)
        resident = _bytes(cfg, side, dtype, tokens, tables=0)
        return Work(tokens, work, resident + look * DTYPES[dtype].rest / 8)
    flops = tokens * (counted.forward_flops(context) - 2 * head) + batch * 2 * head
    return Work(tokens, flops, _bytes(cfg, counted, dtype, tokens, tables=head))


def decode(
    cfg: ModelConfig | EncDecConfig, counted: Count, context: int, batch: int, dtype: str
) -> Work:
    """One more token for each of B sequences that have S behind them.

    Latent attention multiplies with the cached vector itself, its matrices absorbed into those of
    queries and output (DeepSeek-V2, §2.1.2): nothing is unpacked. An encoder-decoder runs its
    decoder alone, with S source and S target tokens behind it.
    """
    head = cfg.vocab_size * cfg.dim
    cache = cache_bytes(cfg, context, batch, dtype)
    matmul, side = counted.matmul, counted
    if isinstance(cfg, EncDecConfig):
        other, look = _encoder(cfg), _cross_keys(cfg)
        matmul -= other.matmul - head + look
        attention = 8.0 * cfg.attention.num_heads * cfg.head_dim * cfg.decoder_layers * context
        body = counted.total - counted.input_embedding - counted.output_embedding
        body -= other.total - other.input_embedding - other.output_embedding + look
        experts = counted.expert - other.expert
        side = counted._replace(
            total=body + counted.input_embedding + counted.output_embedding, expert=experts
        )
    else:
        attention = float(sum(s.flops * min(context, s.window or context) for s in counted.spans))
        latent = cfg.attention.latent
        if latent is not None:
            width = 2 * latent.kv_rank + latent.rope_dim
            attention = 2.0 * cfg.attention.num_heads * width * cfg.num_layers * context
    flops = batch * (2 * matmul + attention)
    return Work(batch, flops, _bytes(cfg, side, dtype, batch, tables=head) + cache)


def _bytes(
    cfg: ModelConfig | EncDecConfig, counted: Count, dtype: str, tokens: int, tables: int
) -> float:
    """Bytes of the weights that `tokens` tokens need: all, but of the experts only those hit."""
    bits = DTYPES[dtype]
    rest = counted.total - counted.input_embedding - counted.output_embedding - counted.expert
    hit = share_hit(cfg.moe.num_experts, cfg.moe.top_k, tokens) if cfg.moe is not None else 0.0
    return (tables * bits.tables + rest * bits.rest + hit * counted.expert * bits.experts) / 8


def _encoder(cfg: EncDecConfig) -> Count:
    """The encoder counted as the decoder-only model that has the same blocks."""
    shared = {name: getattr(cfg, name) for name in type(cfg).model_fields if "layers" not in name}
    return count(ModelConfig(**shared, num_layers=cfg.encoder_layers))


def _cross_keys(cfg: EncDecConfig) -> int:
    """Weights that make keys and values of the encoder's output, in all decoder layers."""
    return cfg.decoder_layers * 2 * cfg.dim * cfg.attention.num_heads * cfg.head_dim
