"""Parameters and FLOPs of a decoder, from its settings alone: arithmetic, no tensor.

Letters: D width, F hidden width, E experts, K experts per token, H heads, G key/value heads,
A head width, V vocabulary, S positions attended to.
"""

from __future__ import annotations

from typing import NamedTuple

from moestro.config import ModelConfig, MoEConfig


class Count(NamedTuple):
    """What a model costs.

    Attributes:
        total: all parameters.
        active: parameters that one token passes: K of E experts, and both embeddings.
        matmul: weights that multiply each token, head included and the lookup of the input
            embedding not: a token's forward pass takes 2 FLOPs for each.
        attention: FLOPs of the attention scores and sums per token and position attended to.
    """

    total: int
    active: int
    matmul: int
    attention: int

    def forward_flops(self, seq_len: int) -> float:
        """FLOPs per token of a forward pass over causal sequences of `seq_len`."""
        return 2 * self.matmul + self.attention * (seq_len + 1) / 2

    def train_flops(self, seq_len: int) -> float:
        """FLOPs per token of a training step: the backward pass costs two forward passes."""
        return 3 * self.forward_flops(seq_len)


def matrices(activation: str) -> int:
    """Matrices of one feed-forward network: gate, up and down, or up and down."""
    return 3 if activation in ("swiglu", "geglu") else 2


def _mixture(cfg: MoEConfig) -> tuple[int, int]:
    """(total, active) parameters of one mixture layer; all of the active ones multiply."""
    expert = matrices(cfg.activation) * cfg.dim * cfg.hidden_dim
    router = {"hash": 0, "noisy_top_k": 2}.get(cfg.router.kind, 1) * cfg.num_experts * cfg.dim
    shared = 0
    if cfg.shared is not None:
        shared = matrices(cfg.activation) * cfg.dim * cfg.shared.hidden_dim
        shared += cfg.dim * cfg.shared.gate
    always = router + shared
    return cfg.num_experts * expert + always, cfg.top_k * expert + always


def count(cfg: ModelConfig) -> Count:
    """Count a decoder. `total` equals the parameters of `Decoder(cfg)` exactly."""
    heads, groups, head_dim = cfg.attention.num_heads, cfg.num_kv_heads, cfg.head_dim
    attention = cfg.dim * head_dim * (2 * heads + 2 * groups)
    norms = 2 * cfg.dim + (2 * head_dim if cfg.attention.qk_norm == "head" else 0)
    dense = matrices(cfg.dense.activation) * cfg.dim * cfg.dense.hidden_dim
    total = active = 0
    for layer in range(cfg.num_layers):
        mixed = cfg.moe if cfg.is_moe_layer(layer) else None
        ffn_total, ffn_active = _mixture(mixed) if mixed is not None else (dense, dense)
        total += attention + ffn_total
        active += attention + ffn_active
    embedding = cfg.vocab_size * cfg.dim
    every_norm = cfg.num_layers * norms + cfg.dim
    embeddings = embedding if cfg.head.tied else 2 * embedding
    return Count(
        total=total + every_norm + embeddings,
        active=active + every_norm + embeddings,
        matmul=active + embedding,
        attention=4 * cfg.num_layers * heads * head_dim,
    )
