"""Bytes that a training step keeps between its forward and its backward pass.

The formula lists what this project's modules save with fp32 weights. Terms are numbers per token;
those marked c are in the dtype computed in, the others in fp32.

    attention          D · (1 + c)                  the norm's input and output
                       c · (2H + 3G) · A + c · H·A  queries, keys, values; rotated; the sum
                       H                            a logarithm for each head
      with qk_norm     c · (H + 2G) · A             all three again, before the norm; rotated: H + G
      relative         H·A · (1 + 2b) + H · P       instead: the scores' softmax is kept
      sinks            c · (H + 2G · b) · A + 2H·P  the same, and the scores
                       c · H · A                    the sum
      gated            c · 3H · A                   the gates, their sigmoid, and the product
    delta layer        D · (1 + c)                  the norm's input and output
                       (6 + 6c) · G·A               queries and keys around the convolution
                       4H · (A + Q) + 2G·Q          heads, and Q × Q matrices of chunks of Q tokens
                       H · A·O / Q                  the state before each chunk
                       (2 + 10c) · H · O            values and gates of width O
    short convolution  D · (1 + c)                  the norm's input and output
                       c · 6D                       b, c, x; b ⊙ x; its convolution; times c
    dense network      D · (1 + c) + c · n · F      n = 3: gate, up, activated gate; not gated: 2
    mixture            D · (1 + c) + 2E             logits and probabilities of the router
      each of K rows   c · (2D + n · F)             the token's copy, hidden units, the output
    head               D · (1 + c) + V · (1 + c)    logits, and log-probabilities

and, where c is bf16, one copy in bf16 of each matrix of attention and of the head. With
checkpointing every layer keeps its input (D), and then either the copies or one layer at a time all
of the above, whichever is more. Kept scores are those of blocks of 256 queries: P keys on average,
which are copied b times in all.

Letters: D width, F hidden width, E experts, K experts per token, H heads, G key/value heads,
A head width, V vocabulary, S context. Of a delta layer: H value heads, G key heads, A key width.
"""

from __future__ import annotations

from typing import NamedTuple

from moestro.config import AttentionConfig, LatentConfig, NetworkConfig, RelativeConfig
from moestro.models.count import matrices

FP32 = 4
# Queries of one block where scores are kept; that of `moestro.kernels.attention`.
ROWS = 256
# Tokens of a delta layer's chunk; that of `moestro.kernels.delta`.
CHUNK = 64
# Row numbers that dispatch keeps for each assignment: five int64, and its weight.
PLAN_BYTES = 44


class Seen(NamedTuple):
    """Keys that a query's block sees, on average; and how often a key is in a block."""

    keys: float
    copies: float


def activation_bytes(
    cfg: NetworkConfig, context: int, batch: int, number: int, checkpointed: bool
) -> int:
    """Bytes kept for B sequences of S tokens.

    Args:
        cfg: the model. An encoder-decoder reads S source and S target tokens for each sequence.
        context: S.
        batch: B.
        number: bytes of one number in the dtype computed in: 4, or 2 for bfloat16.
        checkpointed: with `train.runtime.checkpoint_activations`.
    """
    layers = _layers(cfg, context, number)
    end = len(cfg.stacks()) * _norm(cfg, number) + (FP32 + number) * cfg.vocab_size
    copies = number * _projections(cfg) if number < FP32 else 0
    tokens = batch * context
    if not checkpointed:
        return round(tokens * (sum(layers) + end)) + copies
    # Copies last as long as the forward pass, and a layer is recomputed in the backward pass.
    return round(tokens * (len(layers) * FP32 * cfg.dim + end) + max(tokens * max(layers), copies))


def _layers(cfg: NetworkConfig, context: int, number: int) -> list[float]:
    """Bytes per token of each layer."""
    found = []
    for stack in cfg.stacks():
        other = (3 if stack.cross else 2) * _norm(cfg, number)
        other += stack.cross * _cross(cfg, number)
        for layer in stack.layers:
            seen = _seen(context, layer.window) if stack.causal else Seen(context, 1)
            network = _network(cfg, layer.mixture, number)
            if layer.state == "delta":
                looking = _delta(cfg.attention, context, number)
            elif layer.state == "conv":
                looking = number * 6 * cfg.dim
            else:
                looking = _attention(cfg, number, seen)
            found.append(other + looking + network)
    return found


def _seen(context: int, window: int | None) -> Seen:
    """Of a causal layer, which takes its queries in blocks of `ROWS`."""
    window = window or context
    whole, rest = divmod(context, ROWS)
    # The first blocks see all before them, later ones the window of their first query on.
    first = min(whole, (window - 1) // ROWS + 1)
    keys = ROWS * first * (first + 1) // 2 + (whole - first) * (window - 1 + ROWS)
    pairs = keys * ROWS
    if rest:
        last = context if whole * ROWS < window else window - 1 + rest
        keys, pairs = keys + last, pairs + last * rest
    return Seen(pairs / context, keys / context)


def _norm(cfg: NetworkConfig, number: int) -> int:
    """Its input, one scale, and its output, which is the input of what follows."""
    return FP32 * (cfg.dim + 1) + number * cfg.dim


def _attention(cfg: NetworkConfig, number: int, seen: Seen) -> float:
    attention, heads, groups = cfg.attention, cfg.attention.num_heads, cfg.num_kv_heads
    if attention.latent is not None:
        return _latent(attention, attention.latent, number)
    queries, keys = heads * cfg.head_dim, groups * cfg.head_dim
    normed = 0
    if attention.qk_norm != "none":
        scales = 2 if attention.qk_norm == "full" else heads + groups
        values = 0 if attention.qk_norm in ("rotated", "unit") else keys
        normed = number * (queries + keys + values) + FP32 * scales
    if attention.delta is not None and attention.delta.gated_attention:
        normed += number * 3 * queries
    if attention.sinks:
        scores = heads * seen.keys * (2 * FP32 + (number if number < FP32 else 0))
        return normed + number * (2 * queries + 2 * keys * seen.copies) + scores
    if isinstance(attention.positions, RelativeConfig):
        kept = queries * (1 + 2 * seen.copies) + heads * seen.keys
        return normed + FP32 * kept + number * queries
    return normed + number * (3 * queries + 3 * keys) + FP32 * heads


def _delta(attention: AttentionConfig, context: int, number: int) -> float:
    """A gated DeltaNet; the delta rule itself computes in fp32."""
    delta = attention.delta
    assert delta is not None
    size = min(context, CHUNK)
    chunks = -(-context // size) / context
    squares = (4 * delta.value_heads + 2 * delta.key_heads) * size * size * chunks
    states = delta.value_width * delta.key_dim * chunks
    rule = FP32 * (4 * delta.value_heads * delta.key_dim + squares + states)
    keys = delta.key_width * (6 * number + 6 * FP32)
    return rule + keys + delta.value_width * (10 * number + 2 * FP32)


def _cross(cfg: NetworkConfig, number: int) -> int:
    """Queries, keys, values and the sum; a logarithm for each head."""
    heads, groups = cfg.attention.num_heads, cfg.num_kv_heads
    return number * 2 * (heads + groups) * cfg.head_dim + FP32 * heads


def _latent(attention: AttentionConfig, latent: LatentConfig, number: int) -> int:
    """Both small vectors before and after their norms; full queries, keys, values and the sum."""
    heads, small = attention.num_heads, latent.kv_rank + (latent.q_rank or 0)
    wide = latent.nope_dim + latent.rope_dim
    made = heads * wide + heads * (latent.nope_dim + latent.value_dim) + latent.rope_dim
    turned = 2 * heads * wide
    return number * (2 * small + made + turned + heads * latent.value_dim) + FP32 * heads


def _network(cfg: NetworkConfig, mixed: bool, number: int) -> int:
    """The feed-forward network of one layer."""
    if not mixed or cfg.moe is None:
        hidden = matrices(cfg.dense.activation) * cfg.dense.hidden_dim
        return number * hidden
    moe, kept = cfg.moe, matrices(cfg.moe.activation)
    row = number * (2 * cfg.dim + kept * moe.hidden_dim) + PLAN_BYTES
    shared = number * kept * moe.shared.hidden_dim if moe.shared is not None else 0
    return FP32 * 2 * moe.num_experts + moe.top_k * row + shared


def _projections(cfg: NetworkConfig) -> int:
    """Weights of the matrices that autocast copies: attention's and the head's."""
    attention, heads = cfg.attention, cfg.attention.num_heads
    latent = attention.latent
    if latent is None:
        one = cfg.dim * cfg.head_dim * 2 * (heads + cfg.num_kv_heads)
    else:
        queries = heads * (latent.nope_dim + latent.rope_dim)
        rank = latent.q_rank
        one = cfg.dim * queries if rank is None else rank * (cfg.dim + queries)
        one += cfg.dim * (latent.kv_rank + latent.rope_dim + heads * latent.value_dim)
        one += latent.kv_rank * heads * (latent.nope_dim + latent.value_dim)
    delta = attention.delta
    layers = sum((1 + stack.cross) * len(stack.layers) for stack in cfg.stacks())
    others = sum(layer.state is not None for stack in cfg.stacks() for layer in stack.layers)
    made = 4 * cfg.dim  # by each of the others: a short convolution
    if delta is not None:
        one += cfg.dim * cfg.head_dim * heads * delta.gated_attention
        made = delta.conv_channels + 2 * delta.value_width
    return cfg.vocab_size * cfg.dim + (layers - others) * one + others * cfg.dim * made
