"""Mixtral 8x7B and 8x22B: Mistral with a mixture in every layer (Jiang et al. 2024)."""

from __future__ import annotations

from typing import Any

from moestro.checkpoints.families.fields import field, window
from moestro.checkpoints.families.llama import DECODER, HEAD_DIM, TIED, backbone, gated, old_keys
from moestro.checkpoints.families.rope import rope
from moestro.checkpoints.families.table import Family, Rule


def rules(cfg: Any) -> list[Rule]:
    """Every tensor; w1 is the gate, w3 goes up, w2 down."""
    layer = "model.layers.{n}.block_sparse_moe."
    experts = gated(f"{layer}experts.{{e}}.", "blocks.{n}.ffn.experts.{}[{e}]", ("w1", "w3", "w2"))
    return [
        *backbone(cfg),
        Rule((f"{layer}gate.weight",), "blocks.{n}.ffn.router.weight"),
        *experts,
    ]


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    (
        *DECODER,
        field("rms_norm_eps", "norm.eps", 1e-5),
        rope(1e6),
        TIED,
        HEAD_DIM,
        field("intermediate_size", "moe.hidden_dim"),
        field("num_local_experts", "moe.num_experts"),
        field("num_experts_per_tok", "moe.top_k"),
        # Theirs blurs what the experts see as well; it is a matter of training only.
        field("router_jitter_noise", "moe.router.jitter", 0.0),
        window(),
    ),
    rules,
    always={"moe.router.kind": "softmax", "moe.router.renormalize": True},
    ignored=old_keys,
    renamed={"block_sparse_moe.": "mlp."},
)
