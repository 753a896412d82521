"""Phi-3.5-MoE: LayerNorm, biases, and experts chosen one after the other (Abdin et al. 2024)."""

from __future__ import annotations

from moestro.checkpoints.families.fields import field, window
from moestro.checkpoints.families.llama import BACKBONE, BIAS, decoder, experts, mixture
from moestro.checkpoints.families.rope import rope
from moestro.checkpoints.families.table import Family

PHIMOE = Family(
    "phimoe",
    "PhimoeForCausalLM",
    (
        *decoder(1e-5, rope(1e6, scalings=("longrope",))),
        BIAS,
        field("lm_head_bias", "head.bias", False),
        *experts(),
        # How far below the best an expert may score and still share its softmax.
        field("router_jitter_noise", "moe.router.jitter", 0.01),
        window(),
    ),
    # w1 is the gate, w3 goes up, w2 down.
    (*BACKBONE, *mixture("block_sparse_moe.", ("w1", "w3", "w2"))),
    always={"norm.kind": "layer", "moe.router.kind": "sparsemixer"},
    # It jitters the tokens in training only, and our sparsemixer is for inference.
    harmless=frozenset({"input_jitter_noise"}),
    renamed={"block_sparse_moe.gate.": "mlp.router.", "block_sparse_moe.": "mlp."},
)
