"""gpt-oss 20b and 120b: sinks, every other layer a window, biases all over (OpenAI 2025).

Published in MXFP4, whose dequantised experts have the layout of the plain form.
"""

from __future__ import annotations

from moestro.checkpoints.families.fields import derived, field, fixed, layer_types, num_layers
from moestro.checkpoints.families.llama import BACKBONE, BLOCK, LAYER, decoder, experts
from moestro.checkpoints.families.rope import rope
from moestro.checkpoints.families.table import OF_MATRICES, Family, Rule

_EXPERTS, _OURS = f"{LAYER}mlp.experts.", f"{BLOCK}ffn.experts."
# All experts of a layer lie in one tensor, gate and up interleaved.
_RULES = (
    *BACKBONE,
    Rule((f"{LAYER}self_attn.sinks",), f"{BLOCK}attention.sinks"),
    Rule((f"{LAYER}mlp.router.weight",), f"{BLOCK}ffn.router.weight"),
    Rule((f"{LAYER}mlp.router.bias",), f"{BLOCK}ffn.router.logit_bias"),
    Rule((f"{_EXPERTS}gate_up_proj",), f"{_OURS}gate_up", "interleaved_transposed"),
    Rule((f"{_EXPERTS}gate_up_proj_bias",), f"{_OURS}gate_up_bias", "interleaved"),
    Rule((f"{_EXPERTS}down_proj",), f"{_OURS}down", "transposed"),
    Rule((f"{_EXPERTS}down_proj_bias",), f"{_OURS}down_bias"),
)


GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    (
        *decoder(1e-5, rope(150_000.0, required=True)),
        field("head_dim", "attention.head_dim", 64),
        fixed("attention_bias", True),
        # If config.json does not say: the first layer slides, the second not.
        layer_types(lambda hf: [n % 2 == 0 for n in range(num_layers(hf))], switch=False),
        *experts(),
        derived("experts_per_token", lambda cfg: cfg.moe.top_k),
        fixed("swiglu_alpha", 1.702),
        fixed("swiglu_limit", 7.0),
    ),
    _RULES,
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
    quantised=(*OF_MATRICES, "mxfp4"),
)
