"""OLMoE 1B-7B: small experts, norms over all queries and all keys (Muennighoff et al. 2024)."""

from __future__ import annotations

from moestro.checkpoints.families.fields import field, fixed
from moestro.checkpoints.families.llama import BACKBONE, BIAS, decoder, experts, mixture
from moestro.checkpoints.families.table import Family

OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    (
        *decoder(1e-5),
        BIAS,
        *experts("num_experts"),
        field("norm_topk_prob", "moe.router.renormalize", False),
        fixed("clip_qkv", None),
    ),
    (*BACKBONE, *mixture()),
    always={"attention.qk_norm": "full", "moe.router.kind": "softmax"},
)
