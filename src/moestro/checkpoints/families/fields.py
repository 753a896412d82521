"""Entries of a family's table: the fields of config.json and the settings of ours that they mean.

A field that no entry names, and that is not known to be harmless, is refused by `translate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moestro.checkpoints.families.table import Config, Entry, Inert
from moestro.config import WindowConfig
from moestro.config.number import MOST_LAYERS
from moestro.errors import ConfigError

REQUIRED = object()

# About files, training, generation or the library, never about what the model computes.
HARMLESS = frozenset({
    "architectures", "attention_dropout", "attn_implementation", "auto_map", "aux_loss_alpha",
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "dtype", "early_stopping", "embd_pdrop", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "gradient_checkpointing", "hidden_dropout", "id2label",
    "initializer_range", "is_decoder", "keys_to_ignore_at_inference", "label2id",
    "length_penalty", "max_length", "min_length", "model_type", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_router_logits", "output_scores",
    "pad_token_id", "prefix", "pretraining_tp", "problem_type", "remove_invalid_values",
    "repetition_penalty", "resid_pdrop", "return_dict", "return_dict_in_generate",
    "router_aux_loss_coef", "router_z_loss_coef", "sep_token_id", "seq_aux", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version",
    "typical_p", "unk_token_id", "use_bfloat16", "use_cache",
})  # fmt: skip
# Notes of libraries and tools: `_name_or_path`, `unsloth_version`, `transformers.js_config`.
HARMLESS_BEGINNINGS = ("_", "unsloth_", "transformers.js")
# What transformers' base class writes for every family.
INERT = (
    Inert("is_encoder_decoder", (False,), "an encoder beside the decoder"),
    Inert("add_cross_attention", (False,), "attention to an encoder in every layer"),
    Inert("pruned_heads", ({}, []), "that attention heads are taken out"),
)


def setting(cfg: Config, dotted: str) -> Any:
    """The value of our setting `dotted`, such as `attention.num_heads`.

    Raises:
        ConfigError: a part of the way is unset, such as `moe` in a dense model, or of another kind,
            such as `attention.window`.
    """
    value: Any = cfg
    for part in dotted.split("."):
        if not hasattr(value, part):
            raise ConfigError(f"{dotted} is not set, and this layout needs it")
        value = getattr(value, part)
    return value


def _given(hf: Mapping[str, Any], name: str, default: Any) -> Any:
    """A field's value; one that is missing or null has its default.

    Except for a switch that is on by default: null would turn it off in transformers.
    """
    value = hf.get(name)
    if value is not None:
        return value
    if default is True and name in hf:
        raise ConfigError(f"{name} is null; it has to be true or false")
    if default is REQUIRED:
        raise missing(hf, name)
    return default


def missing(hf: Mapping[str, Any], name: str) -> ConfigError:
    """What to raise where a field has no value and no default."""
    how = "null" if name in hf else "missing"
    return ConfigError(f"{name} is {how}; a config.json of this model_type needs it")


def field(theirs: str, ours: str, default: Any = REQUIRED) -> Entry:
    """One field, one setting.

    Args:
        theirs: the field.
        ours: the setting's dotted name.
        default: the field's value if it is missing or null.
    """
    return Entry(
        (theirs,),
        lambda hf: {ours: _given(hf, theirs, default)},
        lambda cfg, original: {theirs: setting(cfg, ours)},
    )


def num_layers(hf: Mapping[str, Any]) -> int:
    """`num_hidden_layers`, for what is said layer by layer.

    Raises:
        ConfigError: more than any model has.
    """
    number: int = hf["num_hidden_layers"]
    if number > MOST_LAYERS:
        raise ConfigError(f"num_hidden_layers is {number}; at most {MOST_LAYERS:,} are allowed")
    return number


def choice(theirs: str, ours: str, values: Mapping[Any, Any], default: Any = REQUIRED) -> Entry:
    """One field whose values have other names in ours; `values` maps theirs → ours."""

    def other(name: str, value: Any, names: Mapping[Any, Any]) -> Any:
        if value not in names:
            raise ConfigError(_only(name, value, list(names)))
        return names[value]

    back = {name: value for value, name in values.items()}
    return Entry(
        (theirs,),
        lambda hf: {ours: other(theirs, _given(hf, theirs, default), values)},
        lambda cfg, original: {theirs: other(ours, setting(cfg, ours), back)},
    )


def fixed(theirs: str, *allowed: Any) -> Entry:
    """A field that may be missing, or else has one of the values `allowed`; the first is written.

    None among them allows null; it need not be said where null is like missing, which it is but
    for a switch that is on.
    """

    def read(hf: Mapping[str, Any]) -> dict[str, Any]:
        value = hf.get(theirs)
        missing = value is None and not (allowed[0] is True and theirs in hf)
        if not missing and value not in allowed:
            raise ConfigError(_only(theirs, value, list(allowed)))
        return {}

    return Entry((theirs,), read, lambda cfg, original: {theirs: allowed[0]})


def derived(theirs: str, value: Callable[[Any], Any], *, written: bool = True) -> Entry:
    """A field that follows from our settings by `value`: if it is there, it must agree.

    `written`: also where the model did not come with one.
    """

    def check(cfg: Config, hf: Mapping[str, Any]) -> None:
        given = hf.get(theirs)
        if given is not None and given != value(cfg):
            raise ConfigError(
                f"{theirs} is {given!r}, but the other fields make it {value(cfg)!r}; "
                "no other value can be expressed here"
            )

    def write(cfg: Config, original: Mapping[str, Any]) -> dict[str, Any]:
        return {theirs: value(cfg)} if written or theirs in original else {}

    return Entry((theirs,), lambda hf: {}, write, check)


def _only(name: str, value: Any, allowed: list[Any]) -> str:
    known = " or ".join(repr(one) for one in allowed)
    return f"{name} is {value!r}; only {known} can be expressed here"


def window(default: int | None = None, *, switch: bool = False) -> Entry:
    """`sliding_window`: tokens that every layer looks back on, or null.

    Args:
        default: its value where it is missing.
        switch: `use_sliding_window` turns it on (Qwen).
    """

    def read(hf: Mapping[str, Any]) -> dict[str, Any]:
        on = not switch or hf.get("use_sliding_window")
        size = hf.get("sliding_window", default) if on else None
        return {"attention.window": None if size is None else {"size": size}}

    def write(cfg: Config, original: Mapping[str, Any]) -> dict[str, Any]:
        window = sliding(cfg)
        values: dict[str, Any] = {"sliding_window": None if window is None else window.size}
        return values | ({"use_sliding_window": window is not None} if switch else {})

    switches = ("use_sliding_window", "max_window_layers") if switch else ()
    return Entry(("sliding_window", *switches), read, write)


def layer_types(slides: Callable[[Mapping[str, Any]], list[bool]], *, switch: bool) -> Entry:
    """`layer_types`: which layers slide and which see everything, and the window's size.

    Args:
        slides: config.json → whether each layer slides, if the field is missing.
        switch: `use_sliding_window` turns the whole on (Qwen); else a size does (gpt-oss).
    """

    def read(hf: Mapping[str, Any]) -> dict[str, Any]:
        size = hf.get("sliding_window")
        if switch and not hf.get("use_sliding_window", False):
            size = None
        given = hf.get("layer_types")
        unknown = set(given or ()) - set(_KINDS)
        if unknown:
            raise ConfigError(_only("layer_types", unknown.pop(), list(_KINDS)))
        sliding = slides(hf) if given is None else [kind == _KINDS[0] for kind in given]
        if not any(sliding):
            return {"attention.window": None}
        if size is None:
            raise ConfigError("layer_types has sliding layers, but sliding_window is not set")
        return {"attention.window": {"size": size, "full_every": _full_every(sliding)}}

    def write(cfg: Any, original: Mapping[str, Any]) -> dict[str, Any]:
        window = sliding(cfg)
        values: dict[str, Any] = {
            "sliding_window": None if window is None else window.size,
            "layer_types": [_KINDS[cfg.window(n) is None] for n in range(cfg.num_layers)],
        }
        if switch:
            values["use_sliding_window"] = window is not None
            values["max_window_layers"] = cfg.num_layers if window is None else 0
        return values

    def check(cfg: Any, hf: Mapping[str, Any]) -> None:
        given = hf.get("layer_types")
        if given is not None and len(given) != cfg.num_layers:
            raise ConfigError(f"layer_types has {len(given)} entries for {cfg.num_layers} layers")

    switches = ("use_sliding_window", "max_window_layers") if switch else ()
    return Entry(("sliding_window", "layer_types", *switches), read, write, check)


_KINDS = ("sliding_attention", "full_attention")


def sliding(cfg: Any) -> WindowConfig | None:
    """The window of a model whose layers all have attention."""
    window = cfg.attention.window
    if window is not None and not isinstance(window, WindowConfig):
        raise ConfigError(
            "this layout has attention in every layer; attention.window is of the kind "
            f"{window.kind}"
        )
    return window


def _full_every(sliding: list[bool]) -> int:
    """The n where every n-th layer sees everything; 0 where none does."""
    if all(sliding):
        return 0
    every = sliding.index(False) + 1
    if sliding != [(layer + 1) % every != 0 for layer in range(len(sliding))]:
        raise ConfigError(
            "layer_types is neither all sliding, all full, nor full in every n-th layer; "
            "no other pattern can be expressed here"
        )
    return every
