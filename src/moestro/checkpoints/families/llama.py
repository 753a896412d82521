"""Llama, Mistral and Qwen3: dense decoders, and the parts that most mixtures share with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moestro.checkpoints.families.fields import (
    choice,
    field,
    fixed,
    layer_types,
    num_layers,
    window,
)
from moestro.checkpoints.families.rope import rope
from moestro.checkpoints.families.table import Entry, Family, Rule

# The fields of a decoder with grouped-query attention and RMSNorm, rotary positions aside.
DECODER: tuple[Entry, ...] = (
    field("vocab_size", "vocab_size"),
    field("hidden_size", "dim"),
    field("num_hidden_layers", "num_layers"),
    field("num_attention_heads", "attention.num_heads"),
    field("num_key_value_heads", "attention.num_kv_heads", None),
    field("max_position_embeddings", "attention.context"),
    fixed("hidden_act", "silu"),
)
EPS = field("rms_norm_eps", "norm.eps", 1e-6)
TIED = field("tie_word_embeddings", "head.tied", False)


def _read_head_dim(hf: Mapping[str, Any]) -> dict[str, Any]:
    width = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    return {"attention.head_dim": width}


# May be null in theirs, but is spelled out: transformers needs it for some rotary scalings.
HEAD_DIM = Entry(("head_dim",), _read_head_dim, lambda cfg, original: {"head_dim": cfg.head_dim})
DENSE = field("intermediate_size", "dense.hidden_dim")
# Biases on q, k, v and on the output alike, or on none.
BIAS = choice("attention_bias", "attention.bias", {False: "none", True: "all"}, False)

OLD_KEYS = ("model.layers.{n}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")


def old_keys(cfg: Any) -> tuple[str, ...]:
    """Rotary frequencies that old checkpoints hold and that follow from config.json."""
    return OLD_KEYS


def backbone(cfg: Any) -> list[Rule]:
    """Everything but the feed-forward networks, where it is named as in Llama."""
    layer, block = "model.layers.{n}.", "blocks.{n}."
    heads, groups, width = cfg.attention.num_heads, cfg.num_kv_heads, cfg.head_dim
    rows = (heads * width, groups * width, groups * width)
    rules = [
        Rule(("model.embed_tokens.weight",), "embed.weight"),
        Rule(("lm_head.weight",), "head.weight"),
        Rule(("model.norm.weight",), "norm.weight"),
        Rule((f"{layer}input_layernorm.weight",), f"{block}attention_norm.weight"),
        Rule((f"{layer}post_attention_layernorm.weight",), f"{block}ffn_norm.weight"),
    ]
    for kind in ("weight", "bias"):
        qkv = tuple(f"{layer}self_attn.{letter}_proj.{kind}" for letter in "qkv")
        rules += [
            Rule(qkv, f"{block}attention.qkv.{kind}", sizes=rows),
            Rule((f"{layer}self_attn.o_proj.{kind}",), f"{block}attention.out.{kind}"),
        ]
    rules += [
        Rule((f"{layer}self_attn.{name}.weight",), f"{block}attention.{name}.weight")
        for name in ("q_norm", "k_norm")
    ]
    return rules


def gated(theirs: str, ours: str, names: tuple[str, str, str]) -> list[Rule]:
    """A gated feed-forward network stored as three matrices.

    Args:
        theirs: prefix of its keys, with {e} for one of many experts.
        ours: `name of ours {}` with the matrix's name for {} and an index: `…ffn.{}[0]`.
        names: their gate, up and down.
    """
    gate, up, down = (f"{theirs}{name}.weight" for name in names)
    return [
        Rule((gate, up), ours.replace("{}", "gate_up")),
        Rule((down,), ours.replace("{}", "down")),
    ]


def dense(cfg: Any) -> list[Rule]:
    """The feed-forward network of Llama's layers."""
    names = ("gate_proj", "up_proj", "down_proj")
    return gated("model.layers.{n}.mlp.", "blocks.{n}.ffn.{}[0]", names)


def rules(cfg: Any) -> list[Rule]:
    """Every tensor of a dense decoder."""
    return backbone(cfg) + dense(cfg)


def _qwen3_windows(hf: Mapping[str, Any]) -> list[str]:
    """Qwen3's layers slide from number max_window_layers on, where windows are on at all."""
    first = hf.get("max_window_layers", 28) if hf.get("use_sliding_window") else None
    sliding = [first is not None and n >= first for n in range(num_layers(hf))]
    return ["sliding_attention" if slides else "full_attention" for slides in sliding]


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    (*DECODER, EPS, rope(), TIED, HEAD_DIM, DENSE, BIAS, fixed("mlp_bias", False)),
    rules,
    ignored=old_keys,
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    (*DECODER, EPS, rope(), TIED, HEAD_DIM, DENSE, window(4096)),
    rules,
    ignored=old_keys,
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    (*DECODER, EPS, rope(), TIED, HEAD_DIM, DENSE, BIAS, layer_types(_qwen3_windows, switch=True)),
    rules,
    always={"attention.qk_norm": "head"},
    ignored=old_keys,
)
