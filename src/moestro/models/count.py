"""Parameters and FLOPs of a model, from its settings alone: arithmetic, no tensor.

Letters: D width, F hidden width, E experts, K experts per token, H heads, G key/value heads,
A head width, V vocabulary, S sequence length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from moestro.config import (
    AttentionConfig,
    LatentConfig,
    MoEConfig,
    NetworkConfig,
    RelativeConfig,
    StackSpec,
)
from moestro.kernels.formats import GATED

Embeddings = Literal["all", "output", "none"]


class Span(NamedTuple):
    """Attention of some layers: FLOPs per token and position, and how far a token attends.

    Attributes:
        flops: 2 for each multiplication of scores and sums, per token and position attended to.
        window: most positions that a token attends to, itself included; None: no limit.
        causal: positions up to the token's own, or (an encoder, cross attention) all S.
        chunked: the text is cut into pieces as long as the window, and a token attends within its.
    """

    flops: int
    window: int | None
    causal: bool
    chunked: bool = False

    def positions(self, seq_len: int, source: int | None = None) -> float:
        """Positions attended to, averaged over the tokens of a sequence of `seq_len`.

        Args:
            seq_len: S.
            source: length of the text that cross attention sees; unset: S too.
        """
        if not self.causal:
            return float(source or seq_len)
        reach = min(seq_len, self.window or seq_len)
        if self.chunked:
            whole, rest = divmod(seq_len, reach)
            return (whole * reach * (reach + 1) + rest * (rest + 1)) / 2 / seq_len
        return ((reach + 1) / 2 * reach + reach * (seq_len - reach)) / seq_len


class Count(NamedTuple):
    """What a model costs.

    A token of an encoder-decoder means one source token and one target token together, as in
    Switch Transformer's tables: each matrix multiplies one of the two.

    Attributes:
        total: all parameters, and the selection bias of loss-free routers, which is a buffer but
            stands in the checkpoint and in the published figures (DeepSeek-V3).
        active: parameters that one token passes: K of E experts, and both embeddings.
        matmul: weights that multiply each token, head included and the lookup of the input
            embedding not: a token's forward pass takes 2 FLOPs for each.
        input_embedding: parameters of the input embedding.
        output_embedding: of the head's matrix; 0 when it is the input embedding's (tied).
        expert: of all routed experts of all layers, their biases included.
        spans: attention, layers of one kind together.
    """

    total: int
    active: int
    matmul: int
    input_embedding: int
    output_embedding: int
    expert: int
    spans: tuple[Span, ...]

    @property
    def attention(self) -> int:
        """FLOPs of the attention scores and sums per token and position attended to."""
        return sum(span.flops for span in self.spans)

    def parameters(self, embeddings: Embeddings = "all") -> tuple[int, int]:
        """(total, active) under one of the conventions of published figures.

        Args:
            embeddings: which to count. "all" (Mixtral, Qwen, OLMoE); "output", without the input
                embedding unless it is the head too (gpt-oss, DeepSeek-V2); "none" (scaling laws).
        """
        tied = self.output_embedding == 0
        left_out = {
            "all": 0,
            "output": 0 if tied else self.input_embedding,
            "none": self.input_embedding + self.output_embedding,
        }[embeddings]
        return self.total - left_out, self.active - left_out

    def forward_flops(self, seq_len: int, source: int | None = None) -> float:
        """FLOPs per token of a forward pass over sequences of `seq_len`.

        A decoder's token attends to those before it, at most to its layer's window; an encoder's
        and cross attention to all. `source` as in `Span.positions`.
        """
        attended = sum(span.flops * span.positions(seq_len, source) for span in self.spans)
        return 2 * self.matmul + attended

    def train_flops(self, seq_len: int, source: int | None = None) -> float:
        """FLOPs per token of a training step: the backward pass costs two forward passes."""
        return 3 * self.forward_flops(seq_len, source)


def matrices(activation: str) -> int:
    """Matrices of one feed-forward network: gate, up and down, or up and down."""
    return 3 if activation in GATED else 2


def count(cfg: NetworkConfig) -> Count:
    """Count a model. `total` equals what `Decoder(cfg)` or `EncDec(cfg)` holds, exactly."""
    stacks = cfg.stacks()
    parts = (part for stack in stacks for part in (*_blocks(cfg, stack), _cross_keys(cfg, stack)))
    return _counted(cfg, parts, stacks, predicts=True)


def sides(cfg: NetworkConfig) -> tuple[Count, ...]:
    """A count for each text that a model takes: a decoder's one; a source, then its target.

    The keys and values of cross attention are made of the source, so they count with it; the head
    counts with the target. The embedding is in both.
    """
    stacks = cfg.stacks()
    after = (*stacks[1:], None)
    return tuple(
        _counted(
            cfg, [*_blocks(cfg, stack), _cross_keys(cfg, reader)], [stack], predicts=reader is None
        )
        for stack, reader in zip(stacks, after, strict=True)
    )


class Stack(NamedTuple):
    """Experts of one layer that are packed together, or one dense network."""

    experts: int
    dim: int
    hidden_dim: int
    activation: str


class Packables(NamedTuple):
    """What packing a model replaces, and how often; all else stays as it is.

    Attributes:
        matrices: projections [O, I]; a head that is tied is packed beside the embedding.
        routed: the experts of mixtures.
        dense: dense networks and shared experts.
        biases: numbers beside them, kept in fp32.
        others: numbers of all other parameters.
        buffers: numbers of selection biases, which are fp32.
    """

    matrices: Counter[tuple[int, int]]
    routed: Counter[Stack]
    dense: Counter[Stack]
    biases: int
    others: int
    buffers: int


def packables(cfg: NetworkConfig) -> Packables:
    """What `checkpoints.quantize.pack` replaces in a model."""
    head = (cfg.vocab_size, cfg.dim)
    found, biases, buffers = Counter([head]), cfg.head.bias * cfg.vocab_size, 0
    routed: Counter[Stack] = Counter()
    dense: Counter[Stack] = Counter()
    wide, narrow = cfg.attention.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    moe, bias = cfg.moe, cfg.attention.bias
    for stack in cfg.stacks():
        for layer in stack.layers:
            found.update(_projections(cfg, layer.state))
            if layer.state is None and cfg.attention.latent is None:
                biases += (bias != "none") * (_queries(cfg) + 2 * narrow)
                biases += (bias == "all") * cfg.dim
            if stack.cross:
                found.update([(wide, cfg.dim), (2 * narrow, cfg.dim), (cfg.dim, wide)])
            if not layer.mixture or moe is None:
                dense[Stack(1, cfg.dim, cfg.dense.hidden_dim, cfg.dense.activation)] += 1
                continue
            routed[Stack(moe.num_experts, cfg.dim, moe.hidden_dim, moe.activation)] += 1
            if moe.shared is not None:
                dense[Stack(1, cfg.dim, moe.shared.hidden_dim, moe.activation)] += 1
            outputs = (matrices(moe.activation) - 1) * moe.hidden_dim + cfg.dim
            biases += moe.experts.bias * moe.num_experts * outputs
            buffers += moe.router.selection_bias * moe.num_experts
    taken = sum(n * rows * columns for (rows, columns), n in found.items())
    taken -= cfg.head.tied * cfg.vocab_size * cfg.dim
    for each, n in (*routed.items(), *dense.items()):
        taken += n * each.experts * matrices(each.activation) * each.dim * each.hidden_dim
    others = count(cfg).total - taken - biases - buffers
    return Packables(found, routed, dense, biases, others, buffers)


def _queries(cfg: NetworkConfig) -> int:
    """Rows of the queries, and of the gates of a gated attention."""
    delta, wide = cfg.attention.delta, cfg.attention.num_heads * cfg.head_dim
    return wide * (2 if delta is not None and delta.gated_attention else 1)


def _projections(cfg: NetworkConfig, state: str | None) -> list[tuple[int, int]]:
    """The projections [O, I] of a layer's self-attention, or of what is in its place."""
    dim, attention, heads = cfg.dim, cfg.attention, cfg.attention.num_heads
    delta, latent = attention.delta, attention.latent
    if state == "conv":
        return [(3 * dim, dim), (dim, dim)]
    if state == "delta" and delta is not None:
        rows = delta.conv_channels + delta.value_width
        return [(rows, dim), (dim, delta.value_width)]
    if latent is None:
        rows = _queries(cfg) + 2 * cfg.num_kv_heads * cfg.head_dim
        return [(rows, dim), (dim, heads * cfg.head_dim)]
    queries, rank = heads * (latent.nope_dim + latent.rope_dim), latent.q_rank
    q = [(queries, dim)] if rank is None else [(rank, dim), (queries, rank)]
    return [*q, (latent.kv_rank + latent.rope_dim, dim), (dim, heads * latent.value_dim)]


def _counted(
    cfg: NetworkConfig, parts: Iterable[_Part], stacks: Sequence[StackSpec], predicts: bool
) -> Count:
    """These parts, the embedding, and a head where the last of the stacks predicts."""
    embedding = cfg.vocab_size * cfg.dim
    head = embedding if predicts and not cfg.head.tied else 0
    body = _sum([*parts, _always(0, embedding + predicts * cfg.head.bias * cfg.vocab_size)])
    return Count(
        total=body.total + head,
        active=body.active + head,
        matmul=body.matmul + predicts * embedding,
        input_embedding=embedding,
        output_embedding=head,
        expert=body.expert,
        spans=_spans(cfg, stacks),
    )


class _Part(NamedTuple):
    """Parameters of a part: all; those a token passes; those that multiply it; the experts'."""

    total: int
    active: int
    matmul: int
    expert: int = 0


def _always(weights: int, other: int = 0) -> _Part:
    """A part that every token passes; `other` are biases, norms and tables: no matrix product."""
    return _Part(weights + other, weights + other, weights)


def _sum(parts: Iterable[_Part]) -> _Part:
    return _Part(*map(sum, zip(*parts, strict=True)))


def _blocks(cfg: NetworkConfig, stack: StackSpec) -> list[_Part]:
    """A stack, without what makes the keys and values of its cross attention."""
    cross = _always(2 * cfg.dim * cfg.attention.num_heads * cfg.head_dim, _norm(cfg))
    parts = [_always(0, _norm(cfg) + _table(cfg, shared=True))]
    for layer in stack.layers:
        looking = {"delta": _delta, "conv": _conv, None: _attention}[layer.state](cfg)
        parts += [looking, _ffn(cfg, layer.mixture), _always(0, 2 * _norm(cfg))]
        parts += [cross] if stack.cross else []
    return parts


def _cross_keys(cfg: NetworkConfig, stack: StackSpec | None) -> _Part:
    """What makes the keys and values that a stack's cross attention looks at."""
    layers = len(stack.layers) if stack is not None and stack.cross else 0
    return _always(layers * 2 * cfg.dim * cfg.num_kv_heads * cfg.head_dim)


def _norm(cfg: NetworkConfig) -> int:
    """One norm over D: a weight, and for LayerNorm a bias."""
    return cfg.dim * (2 if cfg.norm.kind == "layer" else 1)


def _table(cfg: NetworkConfig, shared: bool) -> int:
    """A table of relative positions, [buckets, H], where there is one that is so `shared`."""
    positions = cfg.attention.positions
    if not isinstance(positions, RelativeConfig) or positions.shared != shared:
        return 0
    return positions.buckets * cfg.attention.num_heads


def _attention(cfg: NetworkConfig) -> _Part:
    """Self-attention of one layer."""
    attention = cfg.attention
    if attention.latent is not None:
        return _latent(cfg.dim, attention.num_heads, attention.latent)
    queries, keys = attention.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    other = _table(cfg, shared=False) + attention.sinks * attention.num_heads
    other += (attention.bias != "none") * (queries + 2 * keys) + (attention.bias == "all") * cfg.dim
    each = 2 * cfg.head_dim
    norms = {"none": 0, "unit": 0, "head": each, "rotated": each, "full": queries + keys}
    other += norms[attention.qk_norm]
    gates = queries if attention.delta is not None and attention.delta.gated_attention else 0
    other += (attention.bias != "none") * gates
    return _always(cfg.dim * (2 * queries + gates + 2 * keys), other)


def _delta(cfg: NetworkConfig) -> _Part:
    """A gated DeltaNet: its convolution multiplies a token, but is no matrix product."""
    delta = cfg.attention.delta
    assert delta is not None
    made = delta.conv_channels + delta.value_width + 2 * delta.value_heads
    other = delta.conv_channels * delta.conv_width + 2 * delta.value_heads + delta.value_dim
    return _always(cfg.dim * (made + delta.value_width), other)


def _conv(cfg: NetworkConfig) -> _Part:
    """A gated short convolution, which multiplies a token itself, but is no matrix product."""
    conv = cfg.attention.conv
    assert conv is not None
    return _always(4 * cfg.dim * cfg.dim, cfg.dim * conv.width)


def _latent(dim: int, heads: int, cfg: LatentConfig) -> _Part:
    """Multi-head latent attention, its matrices as they stand (none absorbed into another)."""
    queries = heads * (cfg.nope_dim + cfg.rope_dim)
    q = dim * queries if cfg.q_rank is None else cfg.q_rank * (dim + queries)
    kv = dim * (cfg.kv_rank + cfg.rope_dim) + cfg.kv_rank * heads * (cfg.nope_dim + cfg.value_dim)
    other = (cfg.q_rank or 0) + cfg.kv_rank
    if cfg.indexer is not None:
        index = cfg.indexer
        q += (cfg.q_rank or 0) * index.num_heads * index.head_dim
        q += dim * (index.head_dim + index.num_heads)
        other += 2 * index.head_dim
    return _always(q + kv + heads * cfg.value_dim * dim, other)


def _ffn(cfg: NetworkConfig, mixed: bool) -> _Part:
    """The feed-forward network of one layer: a mixture or dense."""
    if mixed and cfg.moe is not None:
        return _mixture(cfg.moe)
    return _always(matrices(cfg.dense.activation) * cfg.dim * cfg.dense.hidden_dim)


def _mixture(cfg: MoEConfig) -> _Part:
    layers = matrices(cfg.activation)
    weights = layers * cfg.dim * cfg.hidden_dim
    biases = cfg.experts.bias * ((layers - 1) * cfg.hidden_dim + cfg.dim)
    router = {"hash": 0, "noisy_top_k": 2}.get(cfg.router.kind, 1) * cfg.num_experts * cfg.dim
    shared = 0
    if cfg.shared is not None:
        shared = layers * cfg.dim * cfg.shared.hidden_dim + cfg.dim * cfg.shared.gate
    always = _always(
        router + shared, (cfg.router.bias + cfg.router.selection_bias) * cfg.num_experts
    )
    experts, chosen = cfg.num_experts * (weights + biases), cfg.top_k * (weights + biases)
    return _sum([always, _Part(experts, chosen, cfg.top_k * weights, expert=experts)])


def _spans(cfg: NetworkConfig, stacks: Sequence[StackSpec]) -> tuple[Span, ...]:
    """The attention of every layer; a delta layer's state costs as much at any position.

    An indexer scores every position, and attention looks at the best of them alone.
    """
    attention, index = cfg.attention, None
    per_head = 2 * cfg.head_dim
    if attention.latent is not None:
        latent = attention.latent
        per_head = latent.nope_dim + latent.rope_dim + latent.value_dim
        index = latent.indexer
    layers: Counter[tuple[int | None, bool, bool]] = Counter()
    for stack in stacks:
        layers.update(
            (layer.window, stack.causal, layer.chunk is not None)
            for layer in stack.layers
            if not layer.state
        )
        if stack.cross:
            layers[None, False, False] += len(stack.layers)
    flops = 2 * attention.num_heads * per_head
    spans = tuple(Span(flops * number, *kind) for kind, number in layers.items())
    if index is not None:
        scores = 2 * index.num_heads * index.head_dim
        scored = (Span(scores * number, *kind) for kind, number in layers.items())
        spans = (
            *(span._replace(window=min(span.window or index.top_k, index.top_k)) for span in spans),
            *scored,
        )
    deltas = sum(layer.state == "delta" for stack in stacks for layer in stack.layers)
    return (*spans, Span(deltas * _state_flops(attention), 1, True)) if deltas else spans


def _state_flops(attention: AttentionConfig) -> int:
    """FLOPs of one token in a delta layer's states: look its key up, change them, ask them."""
    delta = attention.delta
    return 0 if delta is None else 3 * 2 * delta.value_width * delta.key_dim
