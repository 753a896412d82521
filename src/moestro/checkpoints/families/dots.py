"""dots.llm1: Qwen3's attention and DeepSeek-V3's mixture (rednote-hilab 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moestro.checkpoints.families.deepseek import (
    FIRST_DENSE,
    MIXTURE,
    NETWORKS,
    SIGMOID,
    sigmoid_router,
)
from moestro.checkpoints.families.fields import fixed, layer_types, num_layers
from moestro.checkpoints.families.llama import BACKBONE, BIAS, HEAD_DIM, decoder
from moestro.checkpoints.families.table import Entry, Family, Inert


def _slides(hf: Mapping[str, Any]) -> list[bool]:
    """Layers slide from number max_window_layers on, if there is a window."""
    first = hf.get("max_window_layers", 62)
    window = hf.get("sliding_window", 4096)
    return [window is not None and n >= first for n in range(num_layers(hf))]


def _windows() -> Entry:
    entry = layer_types(_slides, switch=False)
    return entry._replace(theirs=(*entry.theirs, "max_window_layers"))


DOTS1 = Family(
    "dots1",
    "Dots1ForCausalLM",
    (
        *decoder(),
        HEAD_DIM,
        BIAS,
        _windows(),
        FIRST_DENSE,
        *MIXTURE,
        *sigmoid_router(1, 1, 1.0, renormalize=False),
        # Published with the name of the method in the place of that of the scores.
        fixed("scoring_func", "noaux_tc", "sigmoid"),
    ),
    (*BACKBONE, *NETWORKS),
    always={**SIGMOID, "attention.qk_norm": "head"},
    inert=(Inert("use_sliding_window", (False,), "layers that look back on a few tokens only"),),
)
