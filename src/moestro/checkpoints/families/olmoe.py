"""OLMoE 1B-7B: small experts, norms over all queries and all keys (Muennighoff et al. 2024)."""

from __future__ import annotations

from typing import Any

from moestro.checkpoints.families.fields import field, fixed
from moestro.checkpoints.families.llama import BIAS, DECODER, TIED, backbone, gated, old_keys
from moestro.checkpoints.families.rope import rope
from moestro.checkpoints.families.table import Family, Rule


def rules(cfg: Any) -> list[Rule]:
    """Every tensor."""
    layer, names = "model.layers.{n}.mlp.", ("gate_proj", "up_proj", "down_proj")
    return [
        *backbone(cfg),
        Rule((f"{layer}gate.weight",), "blocks.{n}.ffn.router.weight"),
        *gated(f"{layer}experts.{{e}}.", "blocks.{n}.ffn.experts.{}[{e}]", names),
    ]


OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    (
        *DECODER,
        field("rms_norm_eps", "norm.eps", 1e-5),
        rope(),
        TIED,
        BIAS,
        field("intermediate_size", "moe.hidden_dim"),
        field("num_experts", "moe.num_experts"),
        field("num_experts_per_tok", "moe.top_k"),
        field("norm_topk_prob", "moe.router.renormalize", False),
        fixed("clip_qkv", None),
    ),
    rules,
    always={"attention.qk_norm": "full", "moe.router.kind": "softmax"},
    ignored=old_keys,
)
