"""ERNIE 4.5: softmax scores with a selection bias, rotary pairs side by side (Baidu 2025).

Modules for predicting several tokens at once are published with some of them; this project does not
run those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moestro.checkpoints.families.deepseek import shared
from moestro.checkpoints.families.fields import field, fixed, num_layers
from moestro.checkpoints.families.llama import (
    BLOCK,
    DENSE,
    HEAD_DIM,
    LAYER,
    backbone,
    decoder,
    gated,
    mixture,
)
from moestro.checkpoints.families.rope import rope
from moestro.checkpoints.families.table import Entry, Family, Inert, Rule
from moestro.errors import ConfigError


def _mixed_layers() -> Entry:
    """Mixtures are every n-th layer, between the first and the last that may be one."""
    names = tuple(f"moe_layer_{what}" for what in ("start_index", "end_index", "interval"))

    def read(hf: Mapping[str, Any]) -> dict[str, Any]:
        usual = (1, -1, 1)
        start, end, every = (
            default if hf.get(name) is None else hf[name]
            for name, default in zip(names, usual, strict=True)
        )
        last = num_layers(hf) // every * every - 1
        if start < 0 or (end != -1 and end < last):
            raise ConfigError(
                f"moe_layer_start_index is {start} and moe_layer_end_index {end}; only the first "
                f"layers can be kept dense here, and layer {last} is a mixture"
            )
        return {"moe_every": every, "dense_first": start}

    def write(cfg: Any, original: Mapping[str, Any]) -> dict[str, Any]:
        said = (cfg.dense_first, cfg.num_layers - 1, cfg.moe_every)
        return dict(zip(names, said, strict=True))

    return Entry(names, read, write)


ERNIE4_5_MOE = Family(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    (
        *decoder(1e-5, rope(5e5), tied=True),
        HEAD_DIM,
        DENSE,
        fixed("use_bias", False),
        _mixed_layers(),
        field("moe_num_experts", "moe.num_experts", 64),
        field("moe_intermediate_size", "moe.hidden_dim"),
        field("moe_k", "moe.top_k", 6),
        shared("moe_num_shared_experts", 2),
        fixed("moe_norm_min", 1e-12),
    ),
    (
        *backbone(("pairs_of_heads", "pairs_of_heads", "same")),
        *gated("mlp."),
        *mixture(),
        *gated("mlp.shared_experts.", "shared."),
        Rule(
            (f"{LAYER}mlp.moe_statics.e_score_correction_bias",),
            f"{BLOCK}ffn.router.bias",
            "row",
        ),
    ),
    always={
        "moe.router.kind": "softmax",
        "moe.router.renormalize": True,
        "moe.router.selection_bias": True,
    },
    inert=(
        Inert("moe_gate", ("topk",), "another router"),
        Inert("moe_use_aux_free", (True,), "a router without a selection bias"),
        Inert("compression_ratio", (1.0,), "positions that are stretched"),
    ),
    # Room that training gave each expert.
    harmless=frozenset({"moe_capacity"}),
    left_out=lambda cfg: {"modules for multi-token prediction": ("model.mtp_*",)},
    replaced={"num_nextn_predict_layers": 0},
    renamed={"mlp.moe_statics.": "mlp.gate.moe_statics."},
)
