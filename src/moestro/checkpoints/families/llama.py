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

_KV_HEADS = (field("num_key_value_heads", "attention.num_kv_heads", None),)


def decoder(
    eps: float = 1e-6,
    positions: Entry | None = None,
    kv_heads: tuple[Entry, ...] = _KV_HEADS,
    tied: bool = False,
) -> tuple[Entry, ...]:
    """The fields of a decoder with RMSNorm.

    Args:
        eps: default of `rms_norm_eps`.
        positions: None: rotary, of base 10,000.
        kv_heads: the field of their number; latent attention has none.
        tied: default of `tie_word_embeddings`.
    """
    return (
        field("vocab_size", "vocab_size"),
        field("hidden_size", "dim"),
        field("num_hidden_layers", "num_layers"),
        field("num_attention_heads", "attention.num_heads"),
        *kv_heads,
        field("max_position_embeddings", "attention.context"),
        fixed("hidden_act", "silu"),
        field("rms_norm_eps", "norm.eps", eps),
        positions or rope(),
        field("tie_word_embeddings", "head.tied", tied),
    )


def experts(
    number: str = "num_local_experts", width: str = "intermediate_size"
) -> tuple[Entry, ...]:
    """The fields of a mixture's sizes, by the names of its number of experts and their width."""
    return (
        field(number, "moe.num_experts"),
        field(width, "moe.hidden_dim"),
        field("num_experts_per_tok", "moe.top_k"),
    )


def _read_head_dim(hf: Mapping[str, Any]) -> dict[str, Any]:
    width = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    return {"attention.head_dim": width}


# May be null in theirs, but is spelled out: transformers needs it for some rotary scalings.
HEAD_DIM = Entry(("head_dim",), _read_head_dim, lambda cfg, original: {"head_dim": cfg.head_dim})
DENSE = field("intermediate_size", "dense.hidden_dim")
# Biases on q, k, v and on the output alike, or on none.
BIAS = choice("attention_bias", "attention.bias", {False: "none", True: "all"}, False)

LAYER, BLOCK = "model.layers.{n}.", "blocks.{n}."
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _qkv_rows(cfg: Any) -> tuple[int, ...]:
    heads, groups = cfg.attention.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    delta = cfg.attention.delta
    gated = delta is not None and delta.gated_attention
    return heads * (1 + gated), groups, groups


def renamed(names: Mapping[str, str], *kinds: str) -> tuple[Rule, ...]:
    """Rules of modules whose weights (and biases) are the same under another name."""
    return tuple(
        Rule((f"{theirs}.{kind}",), f"{ours}.{kind}")
        for theirs, ours in names.items()
        for kind in kinds or ("weight",)
    )


# Everything but attention and the feed-forward networks.
OUTER = (
    Rule(("model.embed_tokens.weight",), "embed.weight"),
    *renamed(
        {
            "lm_head": "head",
            "model.norm": "norm",
            f"{LAYER}input_layernorm": f"{BLOCK}attention_norm",
            f"{LAYER}post_attention_layernorm": f"{BLOCK}ffn_norm",
        },
        "weight",
        "bias",
    ),
)


def backbone(
    layout: str | tuple[str, ...] = "same", norms: tuple[str, str] = ("q_norm", "k_norm")
) -> tuple[Rule, ...]:
    """Everything but the feed-forward networks.

    Args:
        layout: of queries, keys and values.
        norms: their names of the norms of queries and keys.
    """
    theirs, ours = f"{LAYER}self_attn.", f"{BLOCK}attention."
    qkv = (
        Rule(
            tuple(f"{theirs}{letter}_proj.{kind}" for letter in "qkv"),
            f"{ours}qkv.{kind}",
            layout,
            _qkv_rows,
        )
        for kind in ("weight", "bias")
    )
    names = dict(zip(norms, ("q_norm", "k_norm"), strict=True))
    return (
        *OUTER,
        *qkv,
        *renamed({f"{theirs}o_proj": f"{ours}out"}, "weight", "bias"),
        *renamed({f"{theirs}{name}": f"{ours}{own}" for name, own in names.items()}),
    )


BACKBONE = backbone()


def gated(
    theirs: str, ours: str = "", names: tuple[str, str, str] = PROJECTIONS
) -> tuple[Rule, ...]:
    """A gated feed-forward network stored as three matrices.

    Args:
        theirs: prefix of its keys in a layer, with {e} for one of many experts.
        ours: prefix of our names in `blocks.{n}.ffn`.
        names: their gate, up and down.
    """
    gate, up, down = (f"{LAYER}{theirs}{name}.weight" for name in names)
    network, index = f"{BLOCK}ffn.{ours}", "[{e}]" if "{e}" in theirs else "[0]"
    return (
        Rule((gate, up), f"{network}gate_up{index}"),
        Rule((down,), f"{network}down{index}"),
    )


def mixture(theirs: str = "mlp.", names: tuple[str, str, str] = PROJECTIONS) -> tuple[Rule, ...]:
    """A router, and experts stored as three matrices each."""
    return (
        Rule((f"{LAYER}{theirs}gate.weight",), f"{BLOCK}ffn.router.weight"),
        *gated(f"{theirs}experts.{{e}}.", "experts.", names),
    )


DENSE_RULES = (*BACKBONE, *gated("mlp."))


def _qwen3_slides(hf: Mapping[str, Any]) -> list[bool]:
    """Qwen3's layers slide from number max_window_layers on, if windows are on at all."""
    first = hf.get("max_window_layers", 28) if hf.get("use_sliding_window") else None
    return [first is not None and n >= first for n in range(num_layers(hf))]


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    (*decoder(), HEAD_DIM, DENSE, BIAS, fixed("mlp_bias", False)),
    DENSE_RULES,
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    (*decoder(), HEAD_DIM, DENSE, window(4096)),
    DENSE_RULES,
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    (*decoder(), HEAD_DIM, DENSE, BIAS, layer_types(_qwen3_slides, switch=True)),
    DENSE_RULES,
    always={"attention.qk_norm": "head"},
)
