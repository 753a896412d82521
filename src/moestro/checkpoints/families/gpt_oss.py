"""gpt-oss 20b and 120b: sinks, every other layer a window, biases all over (OpenAI 2025).

Published in MXFP4, whose dequantised experts have the layout of the plain form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moestro.checkpoints.families.fields import derived, field, fixed, layer_types, num_layers
from moestro.checkpoints.families.llama import DECODER, TIED, backbone, old_keys
from moestro.checkpoints.families.rope import rope
from moestro.checkpoints.families.table import Family, Rule


def rules(cfg: Any) -> list[Rule]:
    """Every tensor; all experts of a layer lie in one, gate and up interleaved."""
    layer, block = "model.layers.{n}.", "blocks.{n}."
    theirs, ours = f"{layer}mlp.experts.", f"{block}ffn.experts."
    return [
        *backbone(cfg),
        Rule((f"{layer}self_attn.sinks",), f"{block}attention.sinks"),
        Rule((f"{layer}mlp.router.weight",), f"{block}ffn.router.weight"),
        Rule((f"{layer}mlp.router.bias",), f"{block}ffn.router.logit_bias"),
        Rule((f"{theirs}gate_up_proj",), f"{ours}gate_up", "interleaved_transposed"),
        Rule((f"{theirs}gate_up_proj_bias",), f"{ours}gate_up_bias", "interleaved"),
        Rule((f"{theirs}down_proj",), f"{ours}down", "transposed"),
        Rule((f"{theirs}down_proj_bias",), f"{ours}down_bias"),
    ]


def _alternating(hf: Mapping[str, Any]) -> list[str]:
    """The layer types where config.json does not say them: the first slides, the second not."""
    return ["full_attention" if n % 2 else "sliding_attention" for n in range(num_layers(hf))]


GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    (
        *DECODER,
        field("rms_norm_eps", "norm.eps", 1e-5),
        field("head_dim", "attention.head_dim", 64),
        rope(150_000.0, required=True),
        TIED,
        fixed("attention_bias", True),
        layer_types(_alternating, switch=False),
        field("intermediate_size", "moe.hidden_dim"),
        field("num_local_experts", "moe.num_experts"),
        field("num_experts_per_tok", "moe.top_k"),
        derived("experts_per_token", lambda cfg: cfg.moe.top_k),
        fixed("swiglu_alpha", 1.702),
        fixed("swiglu_limit", 7.0),
    ),
    rules,
    always={
        "attention.bias": "all",
        "attention.sinks": True,
        "moe.activation": "clamped_swiglu",
        "moe.experts.bias": True,
        "moe.router.kind": "softmax",
        "moe.router.renormalize": True,
        "moe.router.bias": True,
    },
    # The context that it was first trained on; rotary positions name it themselves.
    harmless=frozenset({"initial_context_length"}),
    ignored=old_keys,
    quantised=("mxfp4",),
)
