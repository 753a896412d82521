"""Granite 3 MoE: embeddings, scores, residual and logits each with a factor (IBM 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moestro.checkpoints.families.fields import field
from moestro.checkpoints.families.llama import (
    BACKBONE,
    BIAS,
    BLOCK,
    HEAD_DIM,
    LAYER,
    decoder,
    experts,
)
from moestro.checkpoints.families.table import Entry, Family, Rule

_THEIRS, _OURS = f"{LAYER}block_sparse_moe.", f"{BLOCK}ffn."


def _logits() -> Entry:
    """`logits_scaling` divides the logits, where ours multiplies the last hidden state."""

    def read(hf: Mapping[str, Any]) -> dict[str, Any]:
        given = hf.get("logits_scaling")
        return {"head.scale": 1 / (1.0 if given is None else given)}

    return Entry(
        ("logits_scaling",), read, lambda cfg, original: {"logits_scaling": 1 / cfg.head.scale}
    )


def _scores() -> Entry:
    """`attention_multiplier` of the scores, in the place of the root of the head's width."""
    entry = field("attention_multiplier", "attention.positions.score_scale", 1.0)

    def write(cfg: Any, original: Mapping[str, Any]) -> dict[str, Any]:
        scale = cfg.attention.positions.score_scale
        return {"attention_multiplier": cfg.head_dim**-0.5 if scale is None else scale}

    return entry._replace(write=write)


GRANITE_MOE = Family(
    "granitemoe",
    "GraniteMoeForCausalLM",
    (
        *decoder(),
        HEAD_DIM,
        BIAS,
        *experts(),
        field("embedding_multiplier", "head.embed_scale", 1.0),
        _scores(),
        field("residual_multiplier", "norm.residual_scale", 1.0),
        _logits(),
    ),
    (
        *BACKBONE,
        Rule((f"{_THEIRS}router.layer.weight",), f"{_OURS}router.weight"),
        # All experts of a layer in one tensor, gates first.
        Rule((f"{_THEIRS}input_linear.weight",), f"{_OURS}experts.gate_up"),
        Rule((f"{_THEIRS}output_linear.weight",), f"{_OURS}experts.down"),
    ),
    always={"moe.router.kind": "softmax", "moe.router.renormalize": True},
    renamed={
        "router.layer.weight": "router.weight",
        "input_linear.weight": "experts.gate_up_proj",
        "output_linear.weight": "experts.down_proj",
    },
)
