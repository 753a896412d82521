"""The text part of Llama-4 (Meta 2025): one expert by a sigmoid that scales what goes into it.

Three of four layers attend within pieces of the text and have rotary positions; the others see all
of it and have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moestro.checkpoints.families.fields import choice, field, num_layers, sliding
from moestro.checkpoints.families.llama import (
    BIAS,
    BLOCK,
    LAYER,
    backbone,
    decoder,
    gated,
)
from moestro.checkpoints.families.rope import rope
from moestro.checkpoints.families.table import Entry, Family, Rule
from moestro.errors import ConfigError

_KINDS = ("chunked_attention", "full_attention")


def _every(others: list[bool], what: str) -> int:
    """The n where every n-th layer is other; 0 where none is."""
    every = others.index(True) + 1 if True in others else 0
    if others != [bool(every) and (n + 1) % every == 0 for n in range(len(others))]:
        raise ConfigError(f"{what} does not name every n-th layer; no other pattern is read")
    return every


def _of_each(hf: Mapping[str, Any], name: str) -> list[Any] | None:
    """What is said of each layer; None where it is missing."""
    given, layers = hf.get(name), num_layers(hf)
    if given and len(given) != layers:
        raise ConfigError(f"{name} has {len(given)} entries for {layers} layers")
    return list(given) if given else None


def _skipping(hf: Mapping[str, Any]) -> list[bool]:
    """Which layers have no positions."""
    given = _of_each(hf, "no_rope_layers")  # 1 where there are some
    if given is not None:
        return [not each for each in given]
    every = hf.get("no_rope_layer_interval") or 4
    return [(n + 1) % every == 0 for n in range(num_layers(hf))]


def _positions() -> Entry:
    """Layers without positions, and the temperature of their queries."""
    names = (
        "no_rope_layers", "no_rope_layer_interval", "attn_temperature_tuning", "floor_scale",
        "attn_scale",
    )  # fmt: skip
    ours = "attention.positions"

    def read(hf: Mapping[str, Any]) -> dict[str, Any]:
        every = _every(_skipping(hf), names[0])
        growth = None
        if every and hf.get(names[2], True):
            growth = {"length": hf.get(names[3], 8192), "scale": hf.get(names[4], 0.1)}
        return {f"{ours}.skipped_every": every, f"{ours}.temperature": growth}

    def write(cfg: Any, original: Mapping[str, Any]) -> dict[str, Any]:
        growth = cfg.attention.positions.temperature
        said: dict[str, Any] = {names[0]: [int(cfg.is_rotary(n)) for n in range(cfg.num_layers)]}
        said[names[2]] = growth is not None
        return said if growth is None else {**said, names[3]: growth.length, names[4]: growth.scale}

    return Entry(names, read, write)


def _pieces() -> Entry:
    """`attention_chunk_size`, and `layer_types`: which layers attend within pieces of that size."""
    names = ("attention_chunk_size", "layer_types")

    def read(hf: Mapping[str, Any]) -> dict[str, Any]:
        size, given = hf.get(names[0], 8192), _of_each(hf, names[1])
        unknown = set(given or ()) - set(_KINDS)
        if unknown:
            raise ConfigError(f"layer_types has {unknown.pop()!r}; known: {' and '.join(_KINDS)}")
        whole = [kind == _KINDS[1] for kind in given or ()] or _skipping(hf)
        if size is None or (given and all(whole)):
            if given and not all(whole):
                raise ConfigError("layer_types has chunked_attention without attention_chunk_size")
            return {"attention.window": None}
        every = _every(whole, names[1])
        return {"attention.window": {"size": size, "full_every": every, "chunked": True}}

    def write(cfg: Any, original: Mapping[str, Any]) -> dict[str, Any]:
        window = sliding(cfg)
        kinds = [_KINDS[cfg.window(n) is None] for n in range(cfg.num_layers)]
        return {names[0]: None if window is None else window.size, names[1]: kinds}

    return Entry(names, read, write)


def _mixtures() -> Entry:
    """`moe_layers`, or every n-th layer."""
    names = ("moe_layers", "interleave_moe_layer_step")

    def read(hf: Mapping[str, Any]) -> dict[str, Any]:
        given, layers = hf.get(names[0]), num_layers(hf)
        if given is None:
            return {"moe_every": hf.get(names[1], 1)}
        mixed = [n in set(given) for n in range(layers)]
        return {"moe_every": _every(mixed, names[0]) or layers + 1}

    def write(cfg: Any, original: Mapping[str, Any]) -> dict[str, Any]:
        mixed = [n for n in range(cfg.num_layers) if cfg.is_moe_layer(n)]
        return {names[0]: mixed, names[1]: cfg.moe_every}

    return Entry(names, read, write)


def _width() -> Entry:
    """`intermediate_size`, of a routed expert and of the shared one."""
    name = "intermediate_size"
    ours = ("moe.hidden_dim", "moe.shared.hidden_dim")
    return Entry(
        (name,),
        lambda hf: dict.fromkeys(ours, hf[name]),
        lambda cfg, original: {name: cfg.moe.hidden_dim},
    )


_THEIRS, _OURS = f"{LAYER}feed_forward.", f"{BLOCK}ffn."
LLAMA4 = Family(
    "llama4_text",
    "Llama4ForCausalLM",
    (
        *decoder(1e-5, rope(5e5)),
        field("head_dim", "attention.head_dim", 128),
        BIAS,
        _positions(),
        _pieces(),
        choice("use_qk_norm", "attention.qk_norm", {True: "unit", False: "none"}, True),
        field("num_local_experts", "moe.num_experts", 16),
        field("num_experts_per_tok", "moe.top_k", 1),
        _width(),
        field("intermediate_size_mlp", "dense.hidden_dim", 16384),
        _mixtures(),
    ),
    (
        *backbone(("pairs_of_heads", "pairs_of_heads", "same")),
        *gated("feed_forward."),
        *gated("feed_forward.shared_expert.", "shared."),
        Rule((f"{_THEIRS}router.weight",), f"{_OURS}router.weight"),
        # All experts of a layer in one tensor, gates first.
        Rule((f"{_THEIRS}experts.gate_up_proj",), f"{_OURS}experts.gate_up", "transposed"),
        Rule((f"{_THEIRS}experts.down_proj",), f"{_OURS}experts.down", "transposed"),
    ),
    always={
        "moe.router.kind": "sigmoid",
        "moe.router.renormalize": False,
        "moe.router.weighs": "input",
    },
    # No forward reads them.
    harmless=frozenset({"for_llm_compressor", "router_jitter_noise"}),
    left_out=lambda cfg: {
        "an encoder of images": ("vision_model.*", "multi_modal_projector.*"),
    },
    beginnings={"language_model.": ""},
)
