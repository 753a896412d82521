"""Switch Transformer: T5 with a mixture in every other layer, one expert a token (Fedus 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moestro.checkpoints.families.fields import derived, field, fixed
from moestro.checkpoints.families.table import Entry, Family, Rule
from moestro.config import EncDecConfig
from moestro.errors import ConfigError


def _stack(stack: str, ffn: int) -> tuple[Rule, ...]:
    """What both stacks have; `ffn` is the number of the feed-forward network in each layer."""
    layer, block = f"{stack}.block.{{n}}.layer.", f"{stack}.blocks.{{n}}."
    mlp, expert = f"{layer}{ffn}.mlp.", f"{layer}{ffn}.mlp.experts.expert_{{e}}."
    table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        Rule((table,), f"{stack}.relative.weight"),
        Rule((f"{stack}.final_layer_norm.weight",), f"{stack}.norm.weight"),
        Rule((f"{layer}0.layer_norm.weight",), f"{block}attention_norm.weight"),
        Rule((f"{layer}{ffn}.layer_norm.weight",), f"{block}ffn_norm.weight"),
        Rule(_letters(f"{layer}0.SelfAttention.", "qkv"), f"{block}attention.qkv.weight"),
        Rule(_letters(f"{layer}0.SelfAttention.", "o"), f"{block}attention.out.weight"),
        Rule((f"{mlp}wi.weight",), f"{block}ffn.gate_up[0]"),
        Rule((f"{mlp}wo.weight",), f"{block}ffn.down[0]"),
        Rule((f"{mlp}router.classifier.weight",), f"{block}ffn.router.weight"),
        Rule((f"{expert}wi.weight",), f"{block}ffn.experts.gate_up[{{e}}]"),
        Rule((f"{expert}wo.weight",), f"{block}ffn.experts.down[{{e}}]"),
    )


def _letters(module: str, letters: str) -> tuple[str, ...]:
    return tuple(f"{module}{letter}.weight" for letter in letters)


_CROSS, _BLOCK = "decoder.block.{n}.layer.1.", "decoder.blocks.{n}."
_RULES = (
    Rule(("shared.weight",), "embed.weight"),
    Rule(("lm_head.weight",), "head.weight"),
    *_stack("encoder", ffn=1),
    *_stack("decoder", ffn=2),
    Rule((f"{_CROSS}layer_norm.weight",), f"{_BLOCK}cross_norm.weight"),
    Rule(_letters(f"{_CROSS}EncDecAttention.", "q"), f"{_BLOCK}cross.q.weight"),
    Rule(_letters(f"{_CROSS}EncDecAttention.", "kv"), f"{_BLOCK}cross.kv.weight"),
    Rule(_letters(f"{_CROSS}EncDecAttention.", "o"), f"{_BLOCK}cross.out.weight"),
)


def _tied(hf: Mapping[str, Any]) -> dict[str, Any]:
    """A tied head also divides by the square root of the width (T5)."""
    tied = hf.get("tie_word_embeddings", True)
    return {"head.tied": tied, "head.scale": hf["d_model"] ** -0.5 if tied else 1.0}


def _sparse_layers() -> Entry:
    """How many layers of each stack are mixtures, from which transformers takes every how many."""
    sides = (("encoder", "num_layers"), ("decoder", "num_decoder_layers"))
    names = tuple(f"num_sparse_{side}_layers" for side, _ in sides)

    def read(hf: Mapping[str, Any]) -> dict[str, Any]:
        steps = set()
        for name, (_, layers) in zip(names, sides, strict=True):
            number = hf.get(layers) or hf["num_layers"]
            sparse = hf.get(name, 3)
            steps.add(number // sparse if sparse else 0)
        if len(steps) != 1 or not steps <= {1, 2}:
            raise ConfigError(
                f"{' and '.join(names)} make a mixture of every n-th layer, n = {sorted(steps)}; "
                "only 1 or 2, the same on both sides, can be expressed here"
            )
        return {"moe_every": steps.pop()}

    def write(cfg: Any, original: Mapping[str, Any]) -> dict[str, Any]:
        numbers = (cfg.encoder_layers // cfg.moe_every, cfg.decoder_layers // cfg.moe_every)
        return dict(zip(names, numbers, strict=True))

    return Entry(names, read, write)


# Of training, or of the parts that it is made of.
_HARMLESS = frozenset({
    "add_cross_attention", "add_router_probs", "dropout_rate", "initializer_factor", "is_decoder",
    "n_positions", "output_past",
})  # fmt: skip
SWITCH = Family(
    "switch_transformers",
    "SwitchTransformersForConditionalGeneration",
    (
        field("vocab_size", "vocab_size"),
        field("d_model", "dim"),
        field("num_layers", "encoder_layers"),
        # As many as the encoder has where it is missing.
        Entry(
            ("num_decoder_layers",),
            lambda hf: {"decoder_layers": hf.get("num_decoder_layers") or hf["num_layers"]},
            lambda cfg, original: {"num_decoder_layers": cfg.decoder_layers},
        ),
        _sparse_layers(),
        derived("encoder_sparse_step", lambda cfg: cfg.moe_every),
        derived("decoder_sparse_step", lambda cfg: cfg.moe_every),
        # Of the experts and of the dense layers alike.
        Entry(
            ("d_ff",),
            lambda hf: {"dense.hidden_dim": hf["d_ff"], "moe.hidden_dim": hf["d_ff"]},
            lambda cfg, original: {"d_ff": cfg.moe.hidden_dim},
        ),
        field("num_heads", "attention.num_heads"),
        field("d_kv", "attention.head_dim"),
        field("relative_attention_num_buckets", "attention.positions.buckets", 32),
        field("relative_attention_max_distance", "attention.positions.max_distance", 128),
        field("layer_norm_epsilon", "norm.eps", 1e-6),
        Entry(
            ("tie_word_embeddings",),
            _tied,
            lambda cfg, original: {"tie_word_embeddings": cfg.head.tied},
        ),
        field("num_experts", "moe.num_experts"),
        field("expert_capacity", "moe.capacity.per_sequence", 64),
        # Theirs also jitters the experts' input; this affects training only.
        field("router_jitter_noise", "moe.router.jitter", 0.01),
        fixed("dense_act_fn", "relu"),
        fixed("feed_forward_proj", "relu"),
        fixed("is_gated_act", False),
        fixed("is_encoder_decoder", True),
        fixed("router_bias", False),
        fixed("router_dtype", "float32"),
        fixed("router_type", "tokens_masked"),
        fixed("router_ignore_padding_tokens", False),
        fixed("num_selected_experts", 1),
        fixed("batch_prioritized_routing", False),
    ),
    _RULES,
    always={
        "attention.positions.kind": "relative",
        "attention.positions.shared": True,
        "dense.activation": "relu",
        "moe.activation": "relu",
        "moe.top_k": 1,
        "moe.router.kind": "softmax",
        "moe.router.renormalize": False,
    },
    harmless=_HARMLESS,
    # The one embedding, which transformers takes for three where the head is not tied.
    copies={f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")},
    copied=lambda cfg: not cfg.head.tied,
    settings=EncDecConfig,
)
