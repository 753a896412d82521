"""Ling 2.0 and Ring 2.0: GLM-4.5's network with tensors of other names (Ant Group 2025).

Their model_type is that of Ling 1 too, whose router is another; it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moestro.checkpoints.families.deepseek import FIRST_DENSE, SIGMOID, next_tokens, shared
from moestro.checkpoints.families.fields import choice, derived, field, fixed
from moestro.checkpoints.families.llama import (
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
from moestro.checkpoints.families.rope import rope
from moestro.checkpoints.families.table import Entry, Family, Inert, Rule
from moestro.errors import ConfigError
from moestro.models.rotary import turning_width


def _scores() -> Entry:
    """`score_function`, by which Ling 2.0 is told from Ling 1."""

    def read(hf: Mapping[str, Any]) -> dict[str, Any]:
        if hf.get("score_function") != "sigmoid":
            raise ConfigError(
                f"score_function is {hf.get('score_function')!r}; only 'sigmoid', of Ling 2.0 and "
                "Ring 2.0, can be expressed here"
            )
        return {}

    return Entry(("score_function",), read, lambda cfg, original: {"score_function": "sigmoid"})


_THEIRS, _OURS = f"{LAYER}attention.", f"{BLOCK}attention."
_KINDS = ("weight", "bias")
BAILING_MOE = Family(
    "bailing_moe",
    "BailingMoeV2ForCausalLM",
    (
        *decoder(1e-6, rope(6e5, fraction=0.5)),
        field("head_dim", "attention.head_dim", 128),
        choice("use_qkv_bias", "attention.bias", {False: "none", True: "qkv"}, False),
        fixed("use_bias", False),
        fixed("use_qk_norm", True),
        derived("rotary_dim", turning_width, written=False),
        DENSE,
        FIRST_DENSE,
        *experts("num_experts", "moe_intermediate_size"),
        shared("num_shared_experts", 1),
        derived(
            "moe_shared_expert_intermediate_size",
            lambda cfg: cfg.moe.shared.hidden_dim,
            written=False,
        ),
        _scores(),
        fixed("moe_router_enable_expert_bias", True),
        fixed("norm_topk_prob", True),
        field("n_group", "moe.router.num_groups"),
        field("topk_group", "moe.router.top_groups"),
        field("routed_scaling_factor", "moe.router.scale"),
    ),
    (
        # The embedding has another name.
        Rule(("model.word_embeddings.weight",), "embed.weight"),
        *(rule for rule in OUTER if rule.ours != "embed.weight"),
        *renamed({f"{_THEIRS}query_key_value": f"{_OURS}qkv"}, *_KINDS),
        *renamed(
            {
                f"{_THEIRS}dense": f"{_OURS}out",
                f"{_THEIRS}query_layernorm": f"{_OURS}q_norm",
                f"{_THEIRS}key_layernorm": f"{_OURS}k_norm",
            }
        ),
        *gated("mlp."),
        *mixture(),
        Rule((f"{LAYER}mlp.gate.expert_bias",), f"{BLOCK}ffn.router.bias"),
        *gated("mlp.shared_experts.", "shared."),
    ),
    always={**SIGMOID, "attention.qk_norm": "head", "moe.router.renormalize": True},
    inert=(
        Inert("norm_head", (False,), "a head whose rows are normalised"),
        Inert("norm_softmax", (False,), "another softmax"),
        Inert("router_dtype", ("fp32",), "a router in fewer bits"),
        Inert("topk_method", ("noaux_tc",), "another router"),
        Inert("use_rmsnorm", (True,), "another norm"),
        Inert("use_sliding_window", (False,), "layers that look back on a few tokens only"),
        Inert("using_split_qkv_in_self_attention", (False,), "other attention tensors"),
    ),
    harmless=frozenset({"embedding_dropout", "mtp_loss_scaling_factor", "output_dropout"}),
    left_out=next_tokens,
    replaced={"num_nextn_predict_layers": 0},
)
