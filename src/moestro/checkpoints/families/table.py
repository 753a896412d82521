"""The form of a family's table: what its settings and tensors are called in Hugging Face's layout.

A family is data: entries that translate config.json field by field, and rules that translate
tensor names and layouts. Both run both ways, so what was read can be written back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moestro.config import EncDecConfig, ModelConfig

Config = ModelConfig | EncDecConfig


class Rule(NamedTuple):
    """Where one of our tensors lies in a checkpoint.

    Attributes:
        theirs: their names, with {n} for the layer and {e} for the expert. Several are the parts
            of ours, one after another along the first axis (after the index, if there is one).
        ours: our name, with {n} for the layer; an index in brackets takes that slice of the first
            axis: `blocks.{n}.ffn.experts.down[{e}]`, `blocks.{n}.ffn.down[0]`. {name} is any name.
        layout: how a part of theirs becomes a part of ours, by its name in `LAYOUTS`; a name for
            each part where they differ.
        sizes: settings → rows of each part of ours; None: equal parts.

    A rule whose tensor the model does not have is not used, so a table can list what only some
    models of the family have.
    """

    theirs: tuple[str, ...]
    ours: str
    layout: str | tuple[str, ...] = "same"
    sizes: Callable[[Any], tuple[int, ...]] | None = None


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


# Rotary frequencies that old checkpoints hold and that follow from config.json.
OLD_KEYS = ("model.layers.{n}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")


# Methods that quantise matrix by matrix, so that a family's keys stay as they are.
OF_MATRICES = ("awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq")


class Family(NamedTuple):
    """Everything about one `model_type`.

    Attributes:
        model_type: its name in config.json.
        architecture: transformers' class, written to config.json's `architectures`.
        entries: the fields of config.json that mean something to us.
        rules: every tensor of our model needs exactly one.
        always: settings of ours, by dotted name, that every model of the family has.
        harmless: fields of config.json without meaning for the model, beside `fields.HARMLESS`.
        inert: fields that must have a value without meaning, beside `fields.INERT`.
        ignored: tensor names that a checkpoint may hold and that are not needed, with {n} for any
            number and * for anything.
        left_out: settings → what a checkpoint may hold that this project does not run, by a name
            for people: its tensor names. Reading warns with its size.
        replaced: fields of config.json about what is left out, as they are always written.
        copies: tensor names that a checkpoint may hold beside the ones that they must equal (those
            of tied parameters need no entry).
        renamed: parts of keys → what they are if experts are `fused`.
        beginnings: of keys, as a checkpoint may have them → as the rules do.
        copied: settings → whether `copies` are written as well.
        quantised: values of quantization_config's quant_method that are read (dequantised).
        settings: the class of our settings.
    """

    model_type: str
    architecture: str
    entries: tuple[Entry, ...]
    rules: tuple[Rule, ...]
    always: Mapping[str, Any] = {}
    harmless: frozenset[str] = frozenset()
    inert: tuple[Inert, ...] = ()
    ignored: tuple[str, ...] = OLD_KEYS
    left_out: Callable[[Any], Mapping[str, tuple[str, ...]]] = lambda cfg: {}
    replaced: Mapping[str, Any] = {}
    copies: Mapping[str, str] = {}
    renamed: Mapping[str, str] = {}
    beginnings: Mapping[str, str] = {}
    copied: Callable[[Any], bool] = lambda cfg: False
    quantised: tuple[str, ...] = OF_MATRICES
    settings: type[ModelConfig] | type[EncDecConfig] = ModelConfig


def _same_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


class Layout(NamedTuple):
    """A reversible change of a tensor's layout; each part of a rule passes through it alone.

    Attributes:
        load: (their tensor, settings) → ours.
        save: (our tensor, settings) → theirs.
        shape: shape of ours → shape of theirs.
    """

    load: Callable[[Tensor, Any], Tensor]
    save: Callable[[Tensor, Any], Tensor]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] = _same_shape


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def apart(x: Tensor, axis: int = -1) -> Tensor:
    """Interleaved (0 1 0 1 …) to halves (0 0 … 1 1 …) along `axis` < 0."""
    return _regrouped(x, axis, (x.shape[axis] // 2, 2))


def together(x: Tensor, axis: int = -1) -> Tensor:
    """Halves to interleaved: the inverse of `apart`."""
    return _regrouped(x, axis, (2, x.shape[axis] // 2))


def _regrouped(x: Tensor, axis: int, sizes: tuple[int, int]) -> Tensor:
    return torch.unflatten(x, axis, sizes).transpose(axis - 1, axis).flatten(axis - 1, axis)


def _within_heads(x: Tensor, width: int, order: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The rows of each head in another order; a bias passes the same way."""
    return order(x.reshape(-1, width, math.prod(x.shape[1:])), -2).reshape(x.shape)


def _rope_pairs(heads: Callable[[Any], int]) -> Layout:
    """Rotary rows of latent attention: pairs (2i, 2i+1) in DeepSeek's, (i, i + A/2) in ours.

    They are the last rows of each of `heads` equal blocks. A bias passes the same way.
    """

    def reorder(x: Tensor, cfg: Any, order: Callable[[Tensor, int], Tensor]) -> Tensor:
        rope = cfg.attention.latent.rope_dim
        x_HRI = x.reshape(heads(cfg), x.shape[0] // heads(cfg), -1).clone()
        x_HRI[:, -rope:] = order(x_HRI[:, -rope:], -2)
        return x_HRI.reshape(x.shape)

    return Layout(lambda x, cfg: reorder(x, cfg, apart), lambda x, cfg: reorder(x, cfg, together))


def _by_key_head(sizes: Callable[[Any], tuple[int, ...]]) -> Layout:
    """Rows of several blocks: key head by key head in theirs, block by block in ours.

    `sizes`: rows of each block that belong to one key head of the delta layers.
    """

    def load(x: Tensor, cfg: Any) -> Tensor:
        x_GRI = torch.unflatten(x, 0, (cfg.attention.delta.key_heads, -1))
        return torch.cat([part.flatten(0, 1) for part in x_GRI.split_with_sizes(sizes(cfg), 1)])

    def save(x: Tensor, cfg: Any) -> Tensor:
        heads = cfg.attention.delta.key_heads
        blocks = x.split_with_sizes([heads * size for size in sizes(cfg)])
        return torch.cat([torch.unflatten(one, 0, (heads, -1)) for one in blocks], 1).flatten(0, 1)

    return Layout(load, save)


def _qkvz(cfg: Any) -> tuple[int, ...]:
    delta = cfg.attention.delta
    values = delta.value_width // delta.key_heads
    return delta.key_dim, delta.key_dim, values, values


def _ba(cfg: Any) -> tuple[int, ...]:
    shared = cfg.attention.delta.value_heads // cfg.attention.delta.key_heads
    return shared, shared


LAYOUTS: Mapping[str, Layout] = {
    "same": Layout(lambda x, _: x, lambda x, _: x),
    # [1, ..] in theirs.
    "row": Layout(lambda x, _: x[0], lambda x, _: x[None], lambda shape: (1, *shape)),
    # [.., I, O] in theirs, [.., O, I] in ours.
    "transposed": Layout(lambda x, _: x.mT, lambda x, _: x.mT, _swapped),
    # gate, up, gate, up … along the last axis of theirs; all gates, then all ups in ours.
    "interleaved": Layout(lambda x, _: apart(x), lambda x, _: together(x)),
    # Both: [.., D, 2F] interleaved in theirs, [.., 2F, D] in ours (gpt-oss).
    "interleaved_transposed": Layout(
        lambda x, _: apart(x).mT, lambda x, _: together(x.mT), _swapped
    ),
    # DeepSeek's q_proj and q_b_proj: H·(nope + rope) rows.
    "rope_pairs_of_heads": _rope_pairs(lambda cfg: cfg.attention.num_heads),
    # DeepSeek's kv_a_proj_with_mqa: kv_rank + rope rows.
    "rope_pairs_at_end": _rope_pairs(lambda cfg: 1),
    # Qwen3-Next's in_proj_qkvz and in_proj_ba.
    "delta_qkvz": _by_key_head(_qkvz),
    "delta_ba": _by_key_head(_ba),
    # Of llama.cpp's Qwen3-Next: [C, W] of a convolution; the rate itself; gains around 1.
    "of_one_channel": Layout(
        lambda x, _: x[:, None], lambda x, _: x[:, 0], lambda shape: (shape[0], *shape[2:])
    ),
    "negative_rate": Layout(lambda x, _: (-x).log(), lambda x, _: -x.exp()),
    "one_added": Layout(lambda x, _: x - 1, lambda x, _: x + 1),
    # Queries and keys of llama.cpp's llama networks: pairs (2i, 2i+1) of each head side by side.
    "pairs_of_heads": Layout(
        lambda x, cfg: _within_heads(x, cfg.head_dim, apart),
        lambda x, cfg: _within_heads(x, cfg.head_dim, together),
    ),
}
# Those that only put rows in another order, so that rows of blocks pass through them as well.
OF_ROWS = ("same", "rope_pairs_of_heads", "rope_pairs_at_end", "pairs_of_heads", "delta_ba")
# How rows of blocks, which are of our matrix's outputs however theirs lies, become ours.
ROWS: Mapping[str, Callable[[Tensor, Any], Tensor]] = {
    **{name: LAYOUTS[name].load for name in OF_ROWS},
    "transposed": LAYOUTS["same"].load,
    "interleaved_transposed": lambda x, _: apart(x, -2),
}
