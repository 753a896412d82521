"""GLM-4.5, 4.6 and 4.7 with half of each head turning; GLM-4.7-Flash with latent attention.

Z.ai 2025 and 2026. The mixture is DeepSeek-V3's. A layer at the end predicts two tokens at once, as
V3's; this project does not run it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moestro.checkpoints.families.deepseek import (
    FIRST_DENSE,
    LATENT,
    LATENT_RULES,
    MIXTURE,
    NETWORKS,
    SIGMOID,
    layer_kinds,
    next_tokens,
    sigmoid_router,
)
from moestro.checkpoints.families.fields import choice, derived, fixed, num_layers
from moestro.checkpoints.families.llama import BACKBONE, HEAD_DIM, decoder
from moestro.checkpoints.families.rope import rope
from moestro.checkpoints.families.table import Entry, Family
from moestro.errors import ConfigError


def _mixed_layers() -> Entry:
    """`mlp_layer_types`: which layers are dense and which mixtures; but the first, if not said."""

    def read(hf: Mapping[str, Any]) -> dict[str, Any]:
        kinds = hf.get("mlp_layer_types")
        if kinds is None:
            return {"dense_first": 1}
        first = list(kinds).index("sparse") if "sparse" in kinds else len(kinds)
        if list(kinds) != ["dense"] * first + ["sparse"] * (num_layers(hf) - first):
            raise ConfigError(
                f"mlp_layer_types is {kinds!r}; only {num_layers(hf)} entries, the first 'dense' "
                "and all others 'sparse', can be expressed here"
            )
        return {"dense_first": first}

    def write(cfg: Any, original: Mapping[str, Any]) -> dict[str, Any]:
        return {"mlp_layer_types": layer_kinds(cfg)}

    return Entry(("mlp_layer_types",), read, write)


GLM4_MOE = Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    (
        *decoder(1e-5, rope(fraction=0.5)),
        HEAD_DIM,
        choice("attention_bias", "attention.bias", {False: "none", True: "qkv"}, False),
        choice("use_qk_norm", "attention.qk_norm", {False: "none", True: "head"}, False),
        FIRST_DENSE,
        *MIXTURE,
        *sigmoid_router(1, 1, 1.0, renormalize=True),
        fixed("scoring_func", "sigmoid"),
    ),
    (*BACKBONE, *NETWORKS),
    always=SIGMOID,
    left_out=next_tokens,
    replaced={"num_nextn_predict_layers": 0},
)
GLM4_MOE_LITE = Family(
    "glm4_moe_lite",
    "Glm4MoeLiteForCausalLM",
    (
        *decoder(1e-5, kv_heads=()),
        *LATENT,
        *MIXTURE,
        _mixed_layers(),
        derived("first_k_dense_replace", lambda cfg: cfg.dense_first),
        *sigmoid_router(1, 1, 1.8, renormalize=True),
        fixed("rope_interleave", True),
        fixed("partial_rotary_factor", 1.0),
        fixed("scoring_func", "sigmoid"),
    ),
    LATENT_RULES,
    always=SIGMOID,
    left_out=next_tokens,
    replaced={"num_nextn_predict_layers": 0},
)
