"""Hunyuan-A13B: norms of queries and keys after their rotation, a shared expert (Tencent 2025)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moestro.checkpoints.families.fields import missing, setting
from moestro.checkpoints.families.llama import (
    BIAS,
    BLOCK,
    HEAD_DIM,
    LAYER,
    backbone,
    decoder,
    gated,
)
from moestro.checkpoints.families.rope import rope
from moestro.checkpoints.families.table import Entry, Family, Inert, Rule
from moestro.errors import ConfigError


def _positions() -> Entry:
    """Rotary positions; `alpha` of the type dynamic stretches their base, whatever the length."""
    entry = rope()

    def read(hf: Mapping[str, Any]) -> dict[str, Any]:
        given = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        known = isinstance(given, Mapping)
        if not known or given.get("rope_type", given.get("type")) != "dynamic":
            return entry.read(hf)
        if not given.get("alpha"):
            raise ConfigError("rope_type is 'dynamic'; only with an alpha can it be expressed here")
        width = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
        theta = given.get("rope_theta") or hf.get("rope_theta") or 10_000.0
        stretched = theta * given["alpha"] ** (width / (width - 2))
        plain = {"rope_type": "default", "rope_theta": stretched}
        return entry.read({**hf, "rope_scaling": None, "rope_parameters": plain})

    return entry._replace(read=read)


def _of_all_layers(hf: Mapping[str, Any], theirs: str) -> Any:
    """A number that may be said layer by layer, the same for all; None where it is missing."""
    given = hf.get(theirs)
    if not isinstance(given, list):
        return given
    if not given or any(one != given[0] for one in given):
        raise ConfigError(f"{theirs} is {given!r}; only one number for all layers is read")
    return given[0]


def _each(theirs: str, *ours: str) -> Entry:
    """One such number and the settings that it means, all the same."""

    def read(hf: Mapping[str, Any]) -> dict[str, Any]:
        given = _of_all_layers(hf, theirs)
        if given is None:
            raise missing(hf, theirs)
        return dict.fromkeys(ours, given)

    return Entry((theirs,), read, lambda cfg, original: {theirs: setting(cfg, ours[0])})


def _agrees(theirs: str, value: Callable[[Any], Any]) -> Entry:
    """One such number that follows from other fields, and is not written unless it was there."""

    def check(cfg: Any, hf: Mapping[str, Any]) -> None:
        given = _of_all_layers(hf, theirs)
        if given is not None and given != value(cfg):
            raise ConfigError(
                f"{theirs} is {given!r}; only {value(cfg)!r} can be expressed beside the others"
            )

    return Entry((theirs,), lambda hf: {}, lambda cfg, original: {}, check)


_OFF = {
    "add_classification_head": "another head",
    "group_limited_greedy": "experts chosen in groups",
    "mlp_bias": "biases of the experts",
    "moe_drop_tokens": "a capacity",
    "moe_random_routing_dropped_token": "a capacity",
    "position_embedding_xdrope": "positions of images",
    "use_cla": "keys and values that layers share",
    "use_mla": "latent attention",
}
_UNSET = (
    "kv_lora_rank", "n_group", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "topk_group",
    "v_head_dim",
)  # fmt: skip
# Of sharing keys and values, which is off, of other heads, and of text around images.
_HARMLESS = frozenset({
    "cla_share_factor", "class_num", "dense_list", "eod_token_id", "im_end_id", "im_newline_id",
    "im_start_id", "image_token_id", "mask_init_id", "num_media_embeds", "org_vocab_size", "pad_id",
    "pool_type", "skip_cls_token", "text_end_id", "text_start_id", "video_end_id",
    "video_start_id",
})  # fmt: skip
HUNYUAN_V1_MOE = Family(
    "hunyuan_v1_moe",
    "HunYuanMoEV1ForCausalLM",
    (
        *decoder(1e-5, _positions()),
        HEAD_DIM,
        BIAS,
        _each("num_experts", "moe.num_experts"),
        _each("moe_topk", "moe.top_k"),
        # Of a routed expert and of the shared one.
        _each("intermediate_size", "moe.hidden_dim", "moe.shared.hidden_dim"),
        _agrees("moe_intermediate_size", lambda cfg: setting(cfg, "moe.hidden_dim")),
        _agrees("num_shared_expert", lambda cfg: 1),
        _agrees("attention_head_dim", lambda cfg: cfg.head_dim),
    ),
    (
        *backbone(norms=("query_layernorm", "key_layernorm")),
        Rule((f"{LAYER}mlp.gate.wg.weight",), f"{BLOCK}ffn.router.weight"),
        *gated("mlp.experts.{e}.", "experts."),
        *gated("mlp.shared_mlp.", "shared."),
    ),
    always={
        "attention.qk_norm": "rotated",
        "moe.router.kind": "softmax",
        "moe.router.renormalize": True,
    },
    inert=(
        *(Inert(name, (False,), meaning) for name, meaning in _OFF.items()),
        Inert("moe_layer_num_skipped", (0,), "first layers that are dense"),
        Inert("norm_topk_prob", (True,), "weights that are not divided by their sum"),
        Inert("norm_type", ("rms",), "another norm"),
        Inert("routed_scaling_factor", (1.0,), "weights with a factor"),
        Inert("use_mixed_mlp_moe", (True,), "no shared expert"),
        Inert("use_qk_norm", (True,), "queries and keys without norms"),
        Inert("use_rotary_pos_emb", (True,), "no positions"),
        *(Inert(name, (None,), "latent attention, or experts in groups") for name in _UNSET),
    ),
    harmless=_HARMLESS,
)
