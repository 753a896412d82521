"""DeepSeekMoE 16B, DeepSeek-V2, V3, V3.2 and Kimi-K2: many small experts, latent attention.

Dai et al. 2024; DeepSeek-V2 (2024, §2); DeepSeek-V3 (2024, §2); V3.2 (2025, §2.1), where an indexer
chooses the positions that a token attends to. V3 is published in fp8, with a layer at the end for
multi-token prediction, which this project does not run. Kimi-K2 is V3 under another name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moestro.checkpoints.families.fields import derived, field, fixed
from moestro.checkpoints.families.llama import (
    BACKBONE,
    BIAS,
    BLOCK,
    DENSE,
    LAYER,
    OUTER,
    decoder,
    experts,
    gated,
    mixture,
    renamed,
)
from moestro.checkpoints.families.table import Entry, Family, Rule
from moestro.errors import ConfigError

# The feed-forward networks of all.
NETWORKS = (
    *gated("mlp."),
    *mixture(),
    Rule((f"{LAYER}mlp.gate.e_score_correction_bias",), f"{BLOCK}ffn.router.bias"),
    *gated("mlp.shared_experts.", "shared."),
)
_THEIRS, _OURS = f"{LAYER}self_attn.", f"{BLOCK}attention."
# V2 and V3; both turn rotary pairs that lie side by side.
LATENT_RULES = (
    *OUTER,
    Rule((f"{_THEIRS}q_proj.weight",), f"{_OURS}q.weight", "rope_pairs_of_heads"),
    Rule((f"{_THEIRS}q_b_proj.weight",), f"{_OURS}q_up.weight", "rope_pairs_of_heads"),
    Rule((f"{_THEIRS}kv_a_proj_with_mqa.weight",), f"{_OURS}kv_down.weight", "rope_pairs_at_end"),
    *renamed(
        {
            f"{_THEIRS}q_a_proj": f"{_OURS}q_down",
            f"{_THEIRS}q_a_layernorm": f"{_OURS}q_norm",
            f"{_THEIRS}kv_a_layernorm": f"{_OURS}kv_norm",
            f"{_THEIRS}kv_b_proj": f"{_OURS}kv_up",
            f"{_THEIRS}o_proj": f"{_OURS}out",
        }
    ),
    *NETWORKS,
)


def layer_kinds(cfg: Any) -> list[str]:
    """What `mlp_layer_types` says."""
    return ["dense" if n < cfg.dense_first else "sparse" for n in range(cfg.num_layers)]


def next_tokens(cfg: Any) -> dict[str, tuple[str, ...]]:
    """The layer after the last, for multi-token prediction (V3, §2.2)."""
    return {"a layer for multi-token prediction": (f"model.layers.{cfg.num_layers}.*",)}


def shared(theirs: str = "n_shared_experts", default: int = 0) -> Entry:
    """Their number, which lie side by side as one, so many times as wide as an expert."""

    def read(hf: Mapping[str, Any]) -> dict[str, Any]:
        number = hf.get(theirs)
        number = default if number is None else number
        if not number:
            return {"moe.shared": None}
        return {"moe.shared.hidden_dim": number * hf["moe_intermediate_size"]}

    def write(cfg: Any, original: Mapping[str, Any]) -> dict[str, Any]:
        shared, width = cfg.moe.shared, cfg.moe.hidden_dim
        if shared is None or shared.hidden_dim % width:
            raise ConfigError(
                f"moe.shared is {shared}; this layout has a shared expert that is a multiple of "
                f"moe.hidden_dim ({width}) wide"
            )
        return {theirs: shared.hidden_dim // width}

    return Entry((theirs,), read, write)


def _v2_groups() -> Entry:
    """`topk_method`: the best experts, or the best of the best groups (V2, §2.2.2)."""
    names = ("topk_method", "n_group", "topk_group")

    def read(hf: Mapping[str, Any]) -> dict[str, Any]:
        method = hf.get("topk_method") or "greedy"
        if method not in ("greedy", "group_limited_greedy"):
            raise ConfigError(
                f"topk_method is {method!r}; only 'greedy' or 'group_limited_greedy' can be "
                "expressed here"
            )
        if method == "greedy":
            return {"moe.router.num_groups": 1, "moe.router.top_groups": 1}
        missing = [name for name in names[1:] if hf.get(name) is None]
        if missing:
            raise ConfigError(f"{missing[0]} is missing; topk_method {method!r} needs it")
        return {"moe.router.num_groups": hf["n_group"], "moe.router.top_groups": hf["topk_group"]}

    def write(cfg: Any, original: Mapping[str, Any]) -> dict[str, Any]:
        router = cfg.moe.router
        method = "greedy" if router.num_groups == 1 else "group_limited_greedy"
        return dict(zip(names, (method, router.num_groups, router.top_groups), strict=True))

    return Entry(names, read, write)


def sigmoid_router(
    groups: int, top_groups: int, scale: float, renormalize: bool
) -> tuple[Entry, ...]:
    """The fields of V3's router, with the defaults of its four settings."""
    return (
        field("n_group", "moe.router.num_groups", groups),
        field("topk_group", "moe.router.top_groups", top_groups),
        field("routed_scaling_factor", "moe.router.scale", scale),
        field("norm_topk_prob", "moe.router.renormalize", renormalize),
        fixed("topk_method", "noaux_tc"),
    )


# What every model with V3's router has.
SIGMOID = {
    "moe.router.kind": "sigmoid",
    "moe.router.selection_bias": True,
    "moe.router.group_score": "top2",
}
FIRST_DENSE = field("first_k_dense_replace", "dense_first", 0)
MIXTURE = (
    DENSE,
    fixed("moe_layer_freq", 1),
    *experts("n_routed_experts", "moe_intermediate_size"),
    shared(),
)
# The fields of latent attention.
LATENT = (
    derived("num_key_value_heads", lambda cfg: cfg.attention.num_heads),
    fixed("attention_bias", False),
    field("q_lora_rank", "attention.latent.q_rank", None),
    field("kv_lora_rank", "attention.latent.kv_rank"),
    field("qk_nope_head_dim", "attention.latent.nope_dim"),
    field("qk_rope_head_dim", "attention.latent.rope_dim"),
    field("v_head_dim", "attention.latent.value_dim"),
    derived("head_dim", lambda cfg: cfg.attention.latent.rope_dim),
    derived(
        "qk_head_dim", lambda cfg: cfg.attention.latent.nope_dim + cfg.attention.latent.rope_dim
    ),
)
_LATENT_DECODER = (*decoder(kv_heads=()), *LATENT, FIRST_DENSE, *MIXTURE)
# Where the program that trained it put its experts.
HARMLESS = frozenset({"ep_size"})


DEEPSEEK = Family(
    "deepseek",
    "DeepseekForCausalLM",
    (
        *decoder(),
        FIRST_DENSE,
        *MIXTURE,
        BIAS,
        field("norm_topk_prob", "moe.router.renormalize", False),
        fixed("scoring_func", "softmax"),
    ),
    (*BACKBONE, *NETWORKS),
    always={"moe.router.kind": "softmax"},
    harmless=HARMLESS,
)
DEEPSEEK_V2 = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    (
        *_LATENT_DECODER,
        _v2_groups(),
        field("routed_scaling_factor", "moe.router.scale", 1.0),
        fixed("mlp_bias", False),
        # transformers never divides V2's weights by their sum, whatever the field says.
        fixed("norm_topk_prob", False),
        fixed("scoring_func", "softmax"),
    ),
    LATENT_RULES,
    always={
        "moe.router.kind": "softmax",
        "moe.router.renormalize": False,
        "moe.router.group_score": "max",
    },
    harmless=HARMLESS,
)
DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    (
        *_LATENT_DECODER,
        *sigmoid_router(8, 4, 2.5, renormalize=True),
        fixed("rope_interleave", True),
        fixed("scoring_func", "sigmoid"),
    ),
    LATENT_RULES,
    always=SIGMOID,
    harmless=HARMLESS,
    left_out=next_tokens,
    replaced={"num_nextn_predict_layers": 0},
)
KIMI_K2 = DEEPSEEK_V3._replace(model_type="kimi_k2")
_INDEXER = "attention.latent.indexer"
DEEPSEEK_V32 = DEEPSEEK_V3._replace(
    model_type="deepseek_v32",
    architecture="DeepseekV32ForCausalLM",
    entries=(
        *DEEPSEEK_V3.entries,
        field("index_n_heads", f"{_INDEXER}.num_heads", 64),
        field("index_head_dim", f"{_INDEXER}.head_dim", 128),
        field("index_topk", f"{_INDEXER}.top_k", 2048),
        derived("mlp_layer_types", layer_kinds, written=False),
        derived("layer_types", lambda cfg: ["indexed_attention"] * cfg.num_layers, written=False),
        fixed("mlp_bias", False),
    ),
    rules=(
        *LATENT_RULES,
        *renamed(
            {
                f"{_THEIRS}indexer.wq_b": f"{_OURS}indexer.q",
                f"{_THEIRS}indexer.wk": f"{_OURS}indexer.k",
                f"{_THEIRS}indexer.k_norm": f"{_OURS}indexer.k_norm",
                f"{_THEIRS}indexer.weights_proj": f"{_OURS}indexer.weights",
            },
            "weight",
            "bias",
        ),
    ),
)
