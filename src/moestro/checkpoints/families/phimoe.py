"""Phi-3.5-MoE: LayerNorm, biases, and experts chosen one after the other (Abdin et al. 2024)."""

from __future__ import annotations

from typing import Any

from moestro.checkpoints.families.fields import field, window
from moestro.checkpoints.families.llama import BIAS, DECODER, TIED, backbone, gated, old_keys
from moestro.checkpoints.families.rope import rope
from moestro.checkpoints.families.table import Family, Rule


def rules(cfg: Any) -> list[Rule]:
    """Every tensor; w1 is the gate, w3 goes up, w2 down."""
    layer, moe = "model.layers.{n}.", "model.layers.{n}.block_sparse_moe."
    return [
        *backbone(cfg),
        Rule(("lm_head.bias",), "head.bias"),
        Rule(("model.norm.bias",), "norm.bias"),
        Rule((f"{layer}input_layernorm.bias",), "blocks.{n}.attention_norm.bias"),
        Rule((f"{layer}post_attention_layernorm.bias",), "blocks.{n}.ffn_norm.bias"),
        Rule((f"{moe}gate.weight",), "blocks.{n}.ffn.router.weight"),
        *gated(f"{moe}experts.{{e}}.", "blocks.{n}.ffn.experts.{}[{e}]", ("w1", "w3", "w2")),
    ]


PHIMOE = Family(
    "phimoe",
    "PhimoeForCausalLM",
    (
        *DECODER,
        field("rms_norm_eps", "norm.eps", 1e-5),
        rope(1e6, scalings=("longrope",)),
        TIED,
        BIAS,
        field("lm_head_bias", "head.bias", False),
        field("intermediate_size", "moe.hidden_dim"),
        field("num_local_experts", "moe.num_experts"),
        field("num_experts_per_tok", "moe.top_k"),
        # How far below the best an expert may score and still share its softmax.
        field("router_jitter_noise", "moe.router.jitter", 0.01),
        window(),
    ),
    rules,
    always={"norm.kind": "layer", "moe.router.kind": "sparsemixer"},
    # It blurs the tokens in training only, and our sparsemixer is for inference.
    harmless=frozenset({"input_jitter_noise"}),
    ignored=old_keys,
    renamed={"block_sparse_moe.gate.": "mlp.router.", "block_sparse_moe.": "mlp."},
)
