"""MiniMax-M2: Mixtral's layout, half of each head turning, sigmoid scores and a selection bias.

MiniMax 2025. The fields of their older linear attention are left over in its config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moestro.checkpoints.families.fields import derived, field, fixed
from moestro.checkpoints.families.llama import BACKBONE, BLOCK, LAYER, decoder, experts, mixture
from moestro.checkpoints.families.rope import rope
from moestro.checkpoints.families.table import Entry, Family, Inert, Rule
from moestro.models.rotary import turning_width

_WIDTH = 128


def _positions() -> Entry:
    """Rotary positions; `rotary_dim` says how many numbers of a head turn, if nothing else does."""
    entry = rope(5e6, fraction=1.0)

    def read(hf: Mapping[str, Any]) -> dict[str, Any]:
        turning = hf.get("rotary_dim")
        if turning is not None and hf.get("partial_rotary_factor") is None:
            hf = {**hf, "partial_rotary_factor": turning / (hf.get("head_dim") or _WIDTH)}
        return entry.read(hf)

    return entry._replace(read=read)


MINIMAX_M2 = Family(
    "minimax_m2",
    "MiniMaxM2ForCausalLM",
    (
        *decoder(1e-6, _positions()),
        field("head_dim", "attention.head_dim", _WIDTH),
        derived("rotary_dim", turning_width, written=False),
        *experts(),
        field("router_jitter_noise", "moe.router.jitter", 0.0),
        fixed("sliding_window", None),
        fixed("scoring_func", "sigmoid"),
        fixed("use_qk_norm", True),
        fixed("qk_norm_type", "per_layer"),
        fixed("use_routing_bias", True),
        derived("attn_type_list", lambda cfg: [1] * cfg.num_layers, written=False),
    ),
    (
        *BACKBONE,
        # w1 is the gate, w3 goes up, w2 down.
        *mixture("block_sparse_moe.", ("w1", "w3", "w2")),
        Rule((f"{LAYER}block_sparse_moe.e_score_correction_bias",), f"{BLOCK}ffn.router.bias"),
    ),
    always={
        "attention.qk_norm": "full",
        "moe.router.kind": "sigmoid",
        "moe.router.selection_bias": True,
        "moe.router.renormalize": True,
    },
    inert=(
        Inert("shared_intermediate_size", (0,), "a shared expert beside the routed ones"),
        *(
            Inert(f"layernorm_{part}_beta", (1.0,), "a residual that is scaled")
            for part in ("full_attention", "linear_attention", "mlp")
        ),
    ),
    # Of their older models, and of modules for predicting several tokens, which are not published.
    harmless=frozenset(
        {
            "max_model_len",
            "mlp_intermediate_size",
            "mtp_transformer_layers",
            "num_mtp_modules",
            "shared_moe_mode",
            "use_mtp",
        }
    ),
    renamed={"block_sparse_moe.": "mlp."},
)
