"""Tiny random models of transformers with one mixture: rounding changes no later choice."""

import warnings

import pytest
import torch

from ..checkpoints.families.tiny import BODY, TINY, randomise

transformers = pytest.importorskip("transformers")

_SIGMOID = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "first_k_dense_replace": 0,
}
_LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 8}
_MORE = {
    "granitemoe": ("GraniteMoe", {**_LOCAL, "residual_multiplier": 0.7}),
    "glm4_moe": ("Glm4Moe", {**_SIGMOID, "head_dim": 8, "partial_rotary_factor": 1.0}),
    "dots1": ("Dots1", {**_SIGMOID, "head_dim": 8}),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {
            "moe_intermediate_size": 16,
            "moe_num_experts": 6,
            "moe_k": 3,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 0,
            "moe_layer_interval": 1,
        },
    ),
    "minimax_m2": ("MiniMaxM2", {**_LOCAL, "rotary_dim": 8}),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1",
        {"num_experts": 6, "moe_topk": 3, "head_dim": 8},
    ),
    "flex_olmo": ("FlexOlmo", {"num_experts": 6, "num_experts_per_tok": 3}),
}
_FAMILIES = {**TINY, **_MORE}
NAMES = (
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "phimoe",
    *_MORE,
)
VOCABULARY = BODY["vocab_size"]


def build(name: str, layers: int = 1, **changes):
    """The model of that name, in fp32 and evaluation mode, all of its numbers random."""
    kind, own = _FAMILIES[name]
    changes = {"first_k_dense_replace": 0, **changes} if "first_k_dense_replace" in own else changes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {**BODY, **own, "num_hidden_layers": layers, **changes}
        config = getattr(transformers, f"{kind}Config")(**settings)
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"
        return randomise(getattr(transformers, f"{kind}ForCausalLM")(config))


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    """Random ids, without the special ones."""
    return torch.randint(3, VOCABULARY, (batch, length))


def experts_of(model):
    """The model's experts modules."""
    return [each for each in model.modules() if hasattr(each, "is_transposed")]
