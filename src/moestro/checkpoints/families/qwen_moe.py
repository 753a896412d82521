"""Qwen1.5-MoE and Qwen2-MoE with a gated shared expert; Qwen3-MoE with norms per head, none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moestro.checkpoints.families.fields import choice, field, layer_types, num_layers, window
from moestro.checkpoints.families.llama import (
    BIAS,
    BLOCK,
    DENSE,
    DENSE_RULES,
    HEAD_DIM,
    LAYER,
    decoder,
    gated,
    mixture,
    renamed,
)
from moestro.checkpoints.families.table import Entry, Family, Inert
from moestro.errors import ConfigError

_RULES = (
    *DENSE_RULES,
    *mixture(),
    *gated("mlp.shared_expert.", "shared."),
    *renamed({f"{LAYER}mlp.shared_expert_gate": f"{BLOCK}ffn.shared_gate"}),
)


def _mixed_layers() -> Entry:
    """`decoder_sparse_step`: every n-th layer is a mixture; `mlp_only_layers`: but not these."""

    def read(hf: Mapping[str, Any]) -> dict[str, Any]:
        step, given = hf.get("decoder_sparse_step") or 1, hf.get("mlp_only_layers") or []
        dense_layers = set(given)
        turns = [n for n in range(num_layers(hf)) if (n + 1) % step == 0]
        mixed = [n for n in turns if n not in dense_layers]
        if not mixed or mixed != [n for n in turns if n >= mixed[0]]:
            raise ConfigError(
                f"mlp_only_layers is {given!r}; only the first layers can be kept dense "
                "here, and some have to be mixtures"
            )
        return {"moe_every": step, "dense_first": 0 if mixed == turns else mixed[0]}

    def write(cfg: Any, original: Mapping[str, Any]) -> dict[str, Any]:
        layers = list(range(cfg.dense_first))
        return {"decoder_sparse_step": cfg.moe_every, "mlp_only_layers": layers}

    return Entry(("decoder_sparse_step", "mlp_only_layers"), read, write)


def _num_experts() -> Entry:
    """`num_experts`, which transformers 5 writes as `num_local_experts` for Qwen3-MoE."""
    names = ("num_experts", "num_local_experts")

    def read(hf: Mapping[str, Any]) -> dict[str, Any]:
        given = {hf[name] for name in names if hf.get(name) is not None}
        if len(given) != 1:
            raise ConfigError(
                f"num_experts and num_local_experts say {sorted(given)}; one number is needed"
            )
        return {"moe.num_experts": given.pop()}

    return Entry(names, read, lambda cfg, original: {names[0]: cfg.moe.num_experts})


def _qwen2_slides(hf: Mapping[str, Any]) -> list[bool]:
    """Of the first max_window_layers, every other one slides, if windows are on at all."""
    last = hf.get("max_window_layers", 28) if hf.get("use_sliding_window") else 0
    return [n % 2 == 0 and n < last for n in range(num_layers(hf))]


def _qwen2_dense_slides(hf: Mapping[str, Any]) -> list[bool]:
    """Layers slide from number max_window_layers on, if windows are on at all."""
    first = hf.get("max_window_layers", 28) if hf.get("use_sliding_window") else None
    return [first is not None and n >= first for n in range(num_layers(hf))]


_MIXTURE = (
    *decoder(),
    DENSE,
    field("moe_intermediate_size", "moe.hidden_dim"),
    field("num_experts_per_tok", "moe.top_k"),
    field("norm_topk_prob", "moe.router.renormalize", False),
    _num_experts(),
    _mixed_layers(),
)
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    (*decoder(), DENSE, layer_types(_qwen2_dense_slides, switch=True)),
    DENSE_RULES,
    always={"attention.bias": "qkv"},
)
QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    (
        *_MIXTURE,
        field("shared_expert_intermediate_size", "moe.shared.hidden_dim"),
        choice("qkv_bias", "attention.bias", {True: "qkv", False: "none"}, True),
        layer_types(_qwen2_slides, switch=True),
    ),
    _RULES,
    always={"moe.router.kind": "softmax", "moe.shared.gate": True},
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    (*_MIXTURE, BIAS, HEAD_DIM, window(4096, switch=True)),
    _RULES,
    always={"attention.qk_norm": "head", "moe.router.kind": "softmax"},
    # Left over from Qwen2-MoE in Qwen3-Coder's.
    inert=(
        Inert("qkv_bias", (False,), "biases of queries, keys and values"),
        Inert("use_qk_norm", (True,), "queries and keys without norms"),
        Inert("shared_expert_intermediate_size", (0,), "a shared expert beside the routed ones"),
    ),
)
