"""What llama.cpp calls the tensors of a model, as rules of a family: one table for all networks."""

from __future__ import annotations

from moestro.checkpoints.families.llama import BLOCK, _qkv_rows, renamed
from moestro.checkpoints.families.qwen_next import qkv_and_gates
from moestro.checkpoints.families.table import Family, Rule

LAYER = "blk.{n}."
_KINDS = ("weight", "bias")
_ATTENTION, _FFN = f"{BLOCK}attention.", f"{BLOCK}ffn."
# Networks whose queries and keys are stored for rotary pairs (2i, 2i+1); others as in ours.
PAIRED = ("llama", "mixtral", "mistral", "deepseek", "ernie4_5_moe", "granitemoe")
LATENT = ("deepseek_v2", "deepseek_v3")
# Networks that call the second norm of a layer so.
_NORM_OF_FFN = dict.fromkeys(("gpt_oss", "glm4_moe", "qwen3_next"), "post_attention_norm")
# Follow from the settings.
_IGNORED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def with_names(family: Family) -> Family:
    """A family whose tensors are called as llama.cpp does."""
    norm = _NORM_OF_FFN.get(family.model_type, "ffn_norm")
    attention = _attention(family.model_type in PAIRED)
    if family.model_type in LATENT:
        attention = _LATENT
    if family.model_type == "bailing_moe":
        attention = (*_JOINED, *(rule for rule in attention if ".qkv." not in rule.ours))
    rules = (*_outer(norm), *attention)
    if family.model_type == "qwen3_next":
        rules = (*map(_one_added, rules), *_DELTA)
    rules = (*rules, *_NETWORKS)
    return family._replace(rules=rules, copies={}, renamed={}, ignored=_IGNORED, left_out=_left_out)


def _left_out(cfg: object) -> dict[str, tuple[str, ...]]:
    num_layers = getattr(cfg, "num_layers", 0)
    return {"a layer for multi-token prediction": (f"blk.{num_layers}.*",)}


def _outer(norm_of_ffn: str) -> tuple[Rule, ...]:
    return (
        Rule(("token_embd.weight",), "embed.weight"),
        *renamed(
            {
                "output": "head",
                "output_norm": "norm",
                f"{LAYER}attn_norm": f"{BLOCK}attention_norm",
                f"{LAYER}{norm_of_ffn}": f"{BLOCK}ffn_norm",
            },
            *_KINDS,
        ),
    )


def _attention(paired: bool) -> tuple[Rule, ...]:
    layout = ("pairs_of_heads", "pairs_of_heads", "same") if paired else "same"
    return (
        *(
            Rule(
                tuple(f"{LAYER}attn_{letter}.{kind}" for letter in "qkv"),
                f"{_ATTENTION}qkv.{kind}",
                layout,
                _qkv_rows,
            )
            for kind in _KINDS
        ),
        *renamed({f"{LAYER}attn_output": f"{_ATTENTION}out"}, *_KINDS),
        Rule((f"{LAYER}attn_sinks.weight",), f"{_ATTENTION}sinks"),
        Rule((f"{LAYER}attn_q_norm.weight",), f"{_ATTENTION}q_norm.weight"),
        Rule((f"{LAYER}attn_k_norm.weight",), f"{_ATTENTION}k_norm.weight"),
    )


# Queries, keys and values in one tensor.
_JOINED = renamed({f"{LAYER}attn_qkv": f"{_ATTENTION}qkv"}, *_KINDS)
_THEIRS, _OURS = f"{LAYER}ssm_", f"{BLOCK}delta."
_DELTA = (
    Rule(
        (f"{LAYER}attn_qkv.weight", f"{LAYER}attn_gate.weight"),
        f"{_OURS}qkvz.weight",
        sizes=qkv_and_gates,
    ),
    Rule((f"{_THEIRS}ba.weight",), f"{_OURS}ba.weight", "delta_ba"),
    Rule((f"{_THEIRS}conv1d.weight",), f"{_OURS}conv_weight", "of_one_channel"),
    Rule((f"{_THEIRS}a",), f"{_OURS}log_rate", "negative_rate"),
    Rule((f"{_THEIRS}dt.bias",), f"{_OURS}time_bias"),
    *renamed({f"{_THEIRS}norm": f"{_OURS}norm", f"{_THEIRS}out": f"{_OURS}out"}),
)


def _one_added(rule: Rule) -> Rule:
    """A rule of a gain around zero, to which llama.cpp adds 1."""
    return rule._replace(layout="one_added") if rule.ours.endswith("norm.weight") else rule


_LATENT = (
    Rule((f"{LAYER}attn_q.weight",), f"{_ATTENTION}q.weight", "rope_pairs_of_heads"),
    Rule((f"{LAYER}attn_q_b.weight",), f"{_ATTENTION}q_up.weight", "rope_pairs_of_heads"),
    Rule((f"{LAYER}attn_kv_a_mqa.weight",), f"{_ATTENTION}kv_down.weight", "rope_pairs_at_end"),
    *renamed(
        {
            f"{LAYER}attn_q_a": f"{_ATTENTION}q_down",
            f"{LAYER}attn_q_a_norm": f"{_ATTENTION}q_norm",
            f"{LAYER}attn_output": f"{_ATTENTION}out",
            f"{LAYER}attn_kv_a_norm": f"{_ATTENTION}kv_norm",
            f"{LAYER}attn_kv_b": f"{_ATTENTION}kv_up",
        }
    ),
)


def _gated(end: str, ours: str, index: str, kind: str = "weight") -> tuple[Rule, ...]:
    names = [f"{LAYER}ffn_{part}{end}.{kind}{index}" for part in ("gate", "up", "down")]
    suffix = "" if kind == "weight" else "_bias"
    return (
        Rule((names[0], names[1]), f"{_FFN}{ours}gate_up{suffix}{index or '[0]'}"),
        Rule((names[2],), f"{_FFN}{ours}down{suffix}{index or '[0]'}"),
    )


_NETWORKS = (
    *_gated("", "", ""),
    *_gated("_exps", "experts.", "[{e}]"),
    *_gated("_exps", "experts.", "[{e}]", "bias"),
    *_gated("_shexp", "shared.", ""),
    Rule((f"{LAYER}ffn_gate_inp_shexp.weight",), f"{_FFN}shared_gate.weight"),
    Rule((f"{LAYER}ffn_gate_inp.weight",), f"{_FFN}router.weight"),
    Rule((f"{LAYER}ffn_gate_inp.bias",), f"{_FFN}router.logit_bias"),
    Rule((f"{LAYER}exp_probs_b.bias",), f"{_FFN}router.bias"),
)
