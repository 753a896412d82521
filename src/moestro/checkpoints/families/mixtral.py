"""Mixtral 8x7B and 8x22B: Mistral with a mixture in every layer (Jiang et al. 2024)."""

from __future__ import annotations

from moestro.checkpoints.families.fields import field, window
from moestro.checkpoints.families.llama import BACKBONE, HEAD_DIM, decoder, experts, mixture
from moestro.checkpoints.families.rope import rope
from moestro.checkpoints.families.table import Family

MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    (
        *decoder(1e-5, rope(1e6)),
        HEAD_DIM,
        *experts(),
        # Theirs also jitters the experts' input; this affects training only.
        field("router_jitter_noise", "moe.router.jitter", 0.0),
        window(),
    ),
    # w1 is the gate, w3 goes up, w2 down.
    (*BACKBONE, *mixture("block_sparse_moe.", ("w1", "w3", "w2"))),
    always={"moe.router.kind": "softmax", "moe.router.renormalize": True},
    renamed={"block_sparse_moe.": "mlp."},
)
