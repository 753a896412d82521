"""The form of a family's table: what its settings and tensors are called in Hugging Face's layout.

A family is data: entries that translate config.json field by field, and rules that translate
tensor names and layouts. Both run both ways, so what was read can be written back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from moestro.config import EncDecConfig, ModelConfig

Config = ModelConfig | EncDecConfig


class Rule(NamedTuple):
    """Where one of our tensors lies in a checkpoint.

    Attributes:
        theirs: their names, with {n} for the layer and {e} for the expert. Several are the parts
            of ours, one after another along the first axis (after the index, where there is one).
        ours: our name, with {n} for the layer; an index in brackets takes that slice of the first
            axis: `blocks.{n}.ffn.experts.down[{e}]`, `blocks.{n}.ffn.down[0]`.
        layout: how a part of theirs becomes a part of ours, by its name in `LAYOUTS`.
        sizes: rows of each part of ours; None: equal parts.

    A rule whose tensor of ours is not in the model is not used, so that a table can list what only
    some models of the family have.
    """

    theirs: tuple[str, ...]
    ours: str
    layout: str = "same"
    sizes: tuple[int, ...] | None = None


class Entry(NamedTuple):
    """One translation between fields of config.json and settings of ours; made in fields.py.

    Attributes:
        theirs: the fields of config.json that it accounts for.
        read: config.json → our settings by dotted name. Raises ConfigError on a value that
            cannot be expressed.
        write: (our settings, the config.json that the model came from or {}) → fields.
        check: (our settings, config.json) → raises ConfigError when the two do not agree.
    """

    theirs: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[Any, Mapping[str, Any]], dict[str, Any]]
    check: Callable[[Any, Mapping[str, Any]], None] | None = None


class Inert(NamedTuple):
    """A field of config.json that changes nothing while it has one of its usual values, or null.

    Attributes:
        theirs: its name.
        allowed: the values that change nothing.
        otherwise: what any other would mean.
    """

    theirs: str
    allowed: tuple[Any, ...]
    otherwise: str


def _nothing(cfg: Any) -> tuple[str, ...]:
    return ()


def _never(cfg: Any) -> bool:
    return False


def _all_runs(cfg: Any) -> Mapping[str, tuple[str, ...]]:
    return {}


class Family(NamedTuple):
    """All that is to know about one `model_type`.

    Attributes:
        model_type: its name in config.json.
        architecture: transformers' class, written to config.json's `architectures`.
        entries: the fields of config.json that mean something to us.
        rules: settings → the rules of the tensors. Every tensor of our model needs exactly one.
        always: settings of ours, by dotted name, that every model of the family has.
        harmless: fields of config.json without meaning for the model, beside `fields.HARMLESS`.
        inert: fields that must have a value without meaning, beside `fields.INERT`.
        ignored: settings → tensor names that a checkpoint may hold and that nobody needs, with
            {n} for any number and * for anything.
        left_out: settings → what a checkpoint may hold that this project does not run, by a name
            for people: its tensor names. Reading warns with its size.
        replaced: fields of config.json about what is left out, as they are written, always.
        copies: tensor names that a checkpoint may hold beside the ones that they must equal (those
            of tied parameters are known without).
        renamed: parts of keys → what they are where experts are `fused`.
        copied: settings → whether those are written as well.
        quantised: values of quantization_config's quant_method that are read (dequantised).
        settings: the class of our settings.
    """

    model_type: str
    architecture: str
    entries: tuple[Entry, ...]
    rules: Callable[[Any], list[Rule]]
    always: Mapping[str, Any] = {}
    harmless: frozenset[str] = frozenset()
    inert: tuple[Inert, ...] = ()
    ignored: Callable[[Any], tuple[str, ...]] = _nothing
    left_out: Callable[[Any], Mapping[str, tuple[str, ...]]] = _all_runs
    replaced: Mapping[str, Any] = {}
    copies: Mapping[str, str] = {}
    renamed: Mapping[str, str] = {}
    copied: Callable[[Any], bool] = _never
    quantised: tuple[str, ...] = ("fp8",)
    settings: type[ModelConfig] | type[EncDecConfig] = ModelConfig


class Layout(NamedTuple):
    """A reversible change of a tensor's layout; each part of a rule passes through it alone.

    Attributes:
        load: (their tensor, settings) → ours.
        save: (our tensor, settings) → theirs.
        shape: shape of ours → shape of theirs.
    """

    load: Callable[[Tensor, Any], Tensor]
    save: Callable[[Tensor, Any], Tensor]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]


def _same_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def _same(x: Tensor, cfg: Any) -> Tensor:
    return x


def _transposed(x: Tensor, cfg: Any) -> Tensor:
    return x.transpose(-2, -1)


def _apart(x: Tensor, axis: int) -> Tensor:
    """Interleaved (0 1 0 1 …) to halves (0 0 … 1 1 …) along `axis` < 0."""
    pairs = _split(x, axis, (x.shape[axis] // 2, 2))
    return pairs.transpose(axis - 1, axis).flatten(axis - 1, axis)


def _together(x: Tensor, axis: int) -> Tensor:
    """Halves to interleaved: the inverse of `_apart`."""
    halves = _split(x, axis, (2, x.shape[axis] // 2))
    return halves.transpose(axis - 1, axis).flatten(axis - 1, axis)


def _split(x: Tensor, axis: int, sizes: tuple[int, int]) -> Tensor:
    place = x.dim() + axis
    return x.reshape(*x.shape[:place], *sizes, *x.shape[place + 1 :])


def _rotary_rows(x: Tensor, heads: int, rope: int, turn: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Turn the last `rope` rows of each of `heads` equal blocks of rows."""
    x_HRI = x.reshape(heads, x.shape[0] // heads, -1).clone()
    x_HRI[:, -rope:] = turn(x_HRI[:, -rope:], -2)
    return x_HRI.reshape(x.shape)


# Rotary rows of latent attention: DeepSeek turns the pairs (2i, 2i+1), this project (i, i + A/2).
# A vector of rows (a bias) has no columns and passes the same way.
LAYOUTS: Mapping[str, Layout] = {
    "same": Layout(_same, _same, _same_shape),
    # [.., I, O] in theirs, [.., O, I] in ours.
    "transposed": Layout(_transposed, _transposed, _swapped),
    # gate, up, gate, up … along the last axis of theirs; all gates, then all ups in ours.
    "interleaved": Layout(lambda x, _: _apart(x, -1), lambda x, _: _together(x, -1), _same_shape),
    # Both: [.., D, 2F] interleaved in theirs, [.., 2F, D] in ours (gpt-oss).
    "interleaved_transposed": Layout(
        lambda x, _: _apart(x, -1).transpose(-2, -1),
        lambda x, _: _together(x.transpose(-2, -1), -1),
        _swapped,
    ),
    # Rows H·(nope + rope): the rope rows of each head (DeepSeek's q_proj, q_b_proj).
    "rope_pairs_of_heads": Layout(
        lambda x, cfg: _rotary_rows(x, cfg.attention.num_heads, _rope(cfg), _apart),
        lambda x, cfg: _rotary_rows(x, cfg.attention.num_heads, _rope(cfg), _together),
        _same_shape,
    ),
    # Rows kv_rank + rope: the rope rows at the end (DeepSeek's kv_a_proj_with_mqa).
    "rope_pairs_at_end": Layout(
        lambda x, cfg: _rotary_rows(x, 1, _rope(cfg), _apart),
        lambda x, cfg: _rotary_rows(x, 1, _rope(cfg), _together),
        _same_shape,
    ),
}


def _rope(cfg: Any) -> int:
    """Rotary rows of a head of latent attention."""
    width: int = cfg.attention.latent.rope_dim
    return width
