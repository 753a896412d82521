"""Qwen3-Next and the text part of Qwen3.5-MoE: gated DeltaNet layers beside gated attention.

Yang, Kautz and Hatamizadeh 2024. Both are published with a layer for multi-token prediction, which
this project does not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moestro.checkpoints.families.fields import field, fixed, num_layers
from moestro.checkpoints.families.llama import (
    BIAS,
    BLOCK,
    DENSE,
    DENSE_RULES,
    LAYER,
    decoder,
    gated,
    mixture,
    renamed,
)
from moestro.checkpoints.families.qwen_moe import mixed_layers, num_experts
from moestro.checkpoints.families.rope import rope
from moestro.checkpoints.families.table import Entry, Family, Inert, Rule
from moestro.errors import ConfigError

_THEIRS, _OURS = f"{LAYER}linear_attn.", f"{BLOCK}delta."
_RULES = (
    *DENSE_RULES,
    *mixture(),
    *gated("mlp.shared_expert.", "shared."),
    *renamed(
        {
            f"{LAYER}mlp.shared_expert_gate": f"{BLOCK}ffn.shared_gate",
            f"{_THEIRS}norm": f"{_OURS}norm",
            f"{_THEIRS}out_proj": f"{_OURS}out",
        }
    ),
    Rule((f"{_THEIRS}conv1d.weight",), f"{_OURS}conv_weight"),
    Rule((f"{_THEIRS}A_log",), f"{_OURS}log_rate"),
    Rule((f"{_THEIRS}dt_bias",), f"{_OURS}time_bias"),
)
_KINDS = ("linear_attention", "full_attention")


def _layers() -> Entry:
    """`layer_types`, or `full_attention_interval`: every n-th layer has attention."""
    names = ("layer_types", "full_attention_interval")

    def read(hf: Mapping[str, Any]) -> dict[str, Any]:
        given, every = hf.get(names[0]), hf.get(names[1]) or 4
        if given is not None:
            every = _full_every(given, num_layers(hf))
        return {"attention.window.full_every": every}

    def write(cfg: Any, original: Mapping[str, Any]) -> dict[str, Any]:
        kinds = [_KINDS[not cfg.is_delta_layer(n)] for n in range(cfg.num_layers)]
        return {"layer_types": kinds}

    return Entry(names, read, write)


def _full_every(kinds: list[str], layers: int) -> int:
    """The n where every n-th layer has attention; 0 where none has."""
    unknown = set(kinds) - set(_KINDS)
    if unknown:
        raise ConfigError(f"layer_types has {unknown.pop()!r}; known: {' and '.join(_KINDS)}")
    if len(kinds) != layers:
        raise ConfigError(f"layer_types has {len(kinds)} entries for {layers} layers")
    every = kinds.index(_KINDS[1]) + 1 if _KINDS[1] in kinds else 0
    if kinds != [_KINDS[every and (n + 1) % every == 0] for n in range(layers)]:
        raise ConfigError(
            "layer_types does not have full attention in every n-th layer; no other pattern can "
            "be expressed here"
        )
    return every


def _head_dim() -> Entry:
    """`head_dim`, which is 256 where it is missing."""
    return Entry(
        ("head_dim",),
        lambda hf: {"attention.head_dim": hf.get("head_dim") or 256},
        lambda cfg, original: {"head_dim": cfg.head_dim},
    )


def _next_tokens(cfg: Any) -> dict[str, tuple[str, ...]]:
    return {"a layer for multi-token prediction": ("mtp.*",)}


def _next_tokens_and_images(cfg: Any) -> dict[str, tuple[str, ...]]:
    return {**_next_tokens(cfg), "an encoder of images": ("model.visual.*",)}


def qkv_and_gates(cfg: Any) -> tuple[int, ...]:
    """Rows of queries, keys and values of a delta layer, and of its gates."""
    delta = cfg.attention.delta
    return delta.conv_channels, delta.value_width


_SECTIONS = frozenset({"mrope_section", "mrope_interleaved"})
_FIELDS = (
    BIAS,
    _head_dim(),
    _layers(),
    field("linear_conv_kernel_dim", "attention.window.conv_width", 4),
    field("linear_num_key_heads", "attention.window.key_heads", 16),
    field("linear_num_value_heads", "attention.window.value_heads", 32),
    field("linear_key_head_dim", "attention.window.key_dim", 128),
    field("linear_value_head_dim", "attention.window.value_dim", 128),
    field("moe_intermediate_size", "moe.hidden_dim", 512),
    field("shared_expert_intermediate_size", "moe.shared.hidden_dim", 512),
    field("num_experts_per_tok", "moe.top_k"),
    num_experts(),
)
_ALWAYS = {
    "attention.qk_norm": "head",
    "attention.window.kind": "delta",
    "attention.window.gated_attention": True,
    "moe.router.kind": "softmax",
    "moe.shared.gate": True,
    "norm.zero_centred": True,
}
QWEN3_NEXT = Family(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    (
        *decoder(positions=rope(fraction=0.25)),
        *_FIELDS,
        DENSE,
        field("norm_topk_prob", "moe.router.renormalize", True),
        mixed_layers(),
    ),
    (
        *_RULES,
        Rule((f"{_THEIRS}in_proj_qkvz.weight",), f"{_OURS}qkvz.weight", "delta_qkvz"),
        Rule((f"{_THEIRS}in_proj_ba.weight",), f"{_OURS}ba.weight", "delta_ba"),
    ),
    always=_ALWAYS,
    inert=(Inert("use_sliding_window", (False,), "layers that see only a window"),),
    left_out=_next_tokens,
)
QWEN3_5_MOE = Family(
    "qwen3_5_moe_text",
    "Qwen3_5MoeForCausalLM",
    (
        # Of positions in images; those of a text count the same in all sections.
        *decoder(positions=rope(fraction=0.25, beside=_SECTIONS)),
        *_FIELDS,
        fixed("attn_output_gate", True),
    ),
    (
        *_RULES,
        Rule(
            (f"{_THEIRS}in_proj_qkv.weight", f"{_THEIRS}in_proj_z.weight"),
            f"{_OURS}qkvz.weight",
            sizes=qkv_and_gates,
        ),
        Rule((f"{_THEIRS}in_proj_b.weight", f"{_THEIRS}in_proj_a.weight"), f"{_OURS}ba.weight"),
    ),
    always={**_ALWAYS, "moe.router.renormalize": True},
    # The width of dense networks: every layer is a mixture.
    harmless=frozenset({"intermediate_size", "mtp_use_dedicated_embeddings"}),
    inert=(
        Inert("mamba_ssm_dtype", ("float32",), "a state in fewer bits"),
        Inert("mlp_only_layers", ([],), "dense layers among the mixtures"),
    ),
    left_out=_next_tokens_and_images,
    replaced={"mtp_num_hidden_layers": 0},
    beginnings={"model.language_model.": "model."},
)
