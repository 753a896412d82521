"""LFM2, dense and MoE: gated short convolutions beside attention (Liquid AI 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moestro.checkpoints.families.fields import choice, derived, field, fixed, missing, num_layers
from moestro.checkpoints.families.llama import (
    BLOCK,
    DENSE,
    LAYER,
    _qkv_rows,
    gated,
    mixture,
    renamed,
)
from moestro.checkpoints.families.rope import rope
from moestro.checkpoints.families.table import Entry, Family, Inert, Rule
from moestro.errors import ConfigError

_KINDS = ("conv", "full_attention")


def _layers(*, needed: bool) -> Entry:
    """`layer_types`, or `full_attn_idxs` in older files; where neither is `needed`, all attend."""
    names = ("layer_types", "full_attn_idxs")

    def read(hf: Mapping[str, Any]) -> dict[str, Any]:
        kinds, layers = hf.get(names[0]), num_layers(hf)
        if kinds is None:
            attending = hf.get(names[1])
            if attending is None and needed:
                raise missing(hf, names[0])
            attending = range(layers) if attending is None else attending
        else:
            unknown = set(kinds) - set(_KINDS)
            if unknown:
                raise ConfigError(
                    f"layer_types has {unknown.pop()!r}; known: {' and '.join(_KINDS)}"
                )
            if len(kinds) != layers:
                raise ConfigError(f"layer_types has {len(kinds)} entries for {layers} layers")
            attending = [n for n, kind in enumerate(kinds) if kind == _KINDS[1]]
        return {"attention.window.attention_layers": tuple(attending)}

    def write(cfg: Any, original: Mapping[str, Any]) -> dict[str, Any]:
        kinds = [_KINDS[not cfg.is_conv_layer(n)] for n in range(cfg.num_layers)]
        return {"layer_types": kinds}

    return Entry(names, read, write)


def _tied() -> Entry:
    """`tie_word_embeddings`, which older files call `tie_embedding`; on where neither is there."""
    names = ("tie_embedding", "tie_word_embeddings")

    def read(hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"head.tied": next((hf[name] for name in names if hf.get(name) is not None), True)}

    return Entry(names, read, lambda cfg, original: {names[1]: cfg.head.tied})


def _width() -> Entry:
    """`intermediate_size`, of which two thirds are meant, rounded up, where it is adjusted."""
    adjust = ("block_auto_adjust_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of")

    def read(hf: Mapping[str, Any]) -> dict[str, Any]:
        width = hf.get("block_ff_dim", hf.get("intermediate_size", 12288))
        if hf.get(adjust[0], True):
            factor, multiple = hf.get(adjust[1]) or 1.0, hf.get(adjust[2]) or 256
            width = -(-int(factor * int(2 * width / 3)) // multiple) * multiple
        return {"dense.hidden_dim": width}

    def write(cfg: Any, original: Mapping[str, Any]) -> dict[str, Any]:
        return {"intermediate_size": cfg.dense.hidden_dim, adjust[0]: False}

    return Entry(("intermediate_size", "block_ff_dim", *adjust), read, write)


def _body(*, layers_needed: bool) -> tuple[Entry, ...]:
    return (
        field("vocab_size", "vocab_size"),
        field("hidden_size", "dim"),
        field("num_hidden_layers", "num_layers"),
        field("num_attention_heads", "attention.num_heads"),
        field("num_key_value_heads", "attention.num_kv_heads", 8),
        field("max_position_embeddings", "attention.context"),
        field("norm_eps", "norm.eps", 1e-5),
        rope(1e6),
        _tied(),
        _layers(needed=layers_needed),
        field("conv_L_cache", "attention.window.width", 3),
        fixed("conv_bias", False),
    )


_NAMES = ("w1", "w3", "w2")
_ATTENTION, _OURS = f"{LAYER}self_attn.", f"{BLOCK}attention."
_RULES = (
    Rule(("model.embed_tokens.weight",), "embed.weight"),
    Rule(
        tuple(f"{_ATTENTION}{letter}_proj.weight" for letter in "qkv"),
        f"{_OURS}qkv.weight",
        sizes=_qkv_rows,
    ),
    Rule((f"{LAYER}conv.conv.weight",), f"{BLOCK}conv.conv_weight"),
    *renamed(
        {
            "lm_head": "head",
            "model.embedding_norm": "norm",
            f"{LAYER}operator_norm": f"{BLOCK}attention_norm",
            f"{LAYER}ffn_norm": f"{BLOCK}ffn_norm",
            f"{_ATTENTION}out_proj": f"{_OURS}out",
            f"{_ATTENTION}q_layernorm": f"{_OURS}q_norm",
            f"{_ATTENTION}k_layernorm": f"{_OURS}k_norm",
            f"{LAYER}conv.in_proj": f"{BLOCK}conv.inputs",
            f"{LAYER}conv.out_proj": f"{BLOCK}conv.out",
        }
    ),
    *gated("feed_forward.", names=_NAMES),
)
_ALWAYS = {"attention.qk_norm": "head", "attention.window.kind": "conv"}
LFM2 = Family(
    "lfm2",
    "Lfm2ForCausalLM",
    (
        *_body(layers_needed=False),
        _width(),
        # What the first files repeat.
        derived("block_dim", lambda cfg: cfg.dim, written=False),
        derived("conv_dim", lambda cfg: cfg.dim, written=False),
        derived("conv_dim_out", lambda cfg: cfg.dim, written=False),
        derived("num_heads", lambda cfg: cfg.attention.num_heads, written=False),
        derived("block_norm_eps", lambda cfg: cfg.norm.eps, written=False),
    ),
    _RULES,
    always=_ALWAYS,
    inert=(
        Inert("block_use_swiglu", (True,), "another activation"),
        Inert("use_pos_enc", (True,), "no positions"),
    ),
    harmless=frozenset({
        "block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init",
        "conv_use_xavier_init",
    }),
)  # fmt: skip
LFM2_MOE = Family(
    "lfm2_moe",
    "Lfm2MoeForCausalLM",
    (
        *_body(layers_needed=True),
        DENSE,
        field("num_dense_layers", "dense_first", 2),
        field("num_experts", "moe.num_experts", 32),
        field("num_experts_per_tok", "moe.top_k", 4),
        field("moe_intermediate_size", "moe.hidden_dim"),
        field("norm_topk_prob", "moe.router.renormalize", True),
        field("routed_scaling_factor", "moe.router.scale", 1.0),
        choice("use_expert_bias", "moe.router.selection_bias", {True: True, False: False}, True),
    ),
    (
        *_RULES,
        *mixture("feed_forward.", _NAMES),
        Rule((f"{LAYER}feed_forward.expert_bias",), f"{BLOCK}ffn.router.bias"),
    ),
    always={**_ALWAYS, "moe.router.kind": "sigmoid"},
)
