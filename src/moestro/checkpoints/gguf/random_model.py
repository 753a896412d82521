"""A model of random weights in llama.cpp's format, to measure llama.cpp beside us.

Only shapes and kinds of numbers matter there, so blocks are written as they stand: random integers
with one scale that keeps activations of order one. The file holds no tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from moestro.checkpoints.families import family_of
from moestro.checkpoints.gguf import header
from moestro.checkpoints.gguf.header import Kind
from moestro.checkpoints.gguf.names import with_names
from moestro.checkpoints.gguf.writing import (
    NETWORKS,
    Tensor,
    tensors_of,
    write_fields,
    write_tensors,
)
from moestro.checkpoints.transfer import outgoing
from moestro.config import ModelConfig, RopeConfig
from moestro.errors import ConfigError
from moestro.models.build import build_model
from moestro.models.materialize import without_memory

KINDS = {"bf16": header.KINDS[30], "int8": header.KINDS[8], "int4": header.KINDS[2]}
# Standard deviation of a random integer of each kind.
_SPREAD = {"Q8_0": 73.9, "Q4_0": 4.61}


def check(cfg: ModelConfig, kind: Kind) -> None:
    """Refuse settings that llama.cpp's qwen3moe and llama networks cannot express.

    Raises:
        ConfigError: says what is in the way.
    """
    attention, moe = cfg.attention, cfg.moe
    plain_rope = isinstance(attention.positions, RopeConfig) and attention.positions.scaling is None
    reasons = {
        "latent attention": attention.latent is not None,
        "positions other than plain rotary ones": not plain_rope,
        "windows, sinks or biases of attention": bool(
            attention.window or attention.sinks or attention.bias != "none"
        ),
        "a norm over all heads together": attention.qk_norm == "full",
        "layer norm": cfg.norm.kind != "rms",
        "dense layers beside mixtures": moe is not None
        and not all(map(cfg.is_moe_layer, range(cfg.num_layers))),
        "another activation than swiglu": (moe or cfg.dense).activation != "swiglu",
        "head.bias or head.scale": cfg.head.bias or cfg.head.scale != 1,
        "a dense network with normed heads": moe is None and attention.qk_norm == "head",
    }
    if moe is not None:
        router = moe.router
        reasons["shared experts, biases or a capacity"] = bool(
            moe.shared or moe.capacity or moe.experts.bias
        )
        reasons["another router than softmax"] = (
            router.kind != "softmax" or router.bias or router.num_groups > 1
        ) or not moe.renormalizes
    found = [reason for reason, there in reasons.items() if there]
    widths = {cfg.dim, attention.num_heads * cfg.head_dim, (moe or cfg.dense).hidden_dim}
    if any(width % kind.length for width in widths):
        found.append(f"widths that are no multiples of {kind.length}, which {kind.name} needs")
    if found:
        raise ConfigError(
            f"llama.cpp cannot be measured beside this model: it has {', '.join(found)}"
        )


def write_random(cfg: ModelConfig, kind: Kind, path: Path, seed: int = 0) -> None:
    """Write the file.

    Args:
        cfg: settings that `check` accepts.
        kind: of all matrices; norms and routers are fp32, as there.
        path: the new file.
        seed: of the numbers.

    Raises:
        ConfigError: see `check`.
        OSError: the disk is full or the place cannot be written.
    """
    check(cfg, kind)
    family = "mixtral" if cfg.moe is not None else "llama"
    if cfg.attention.qk_norm == "head":
        family = "qwen3_moe"
    with without_memory():
        model = build_model(cfg)
    rng = np.random.default_rng(seed)

    def random(tensor: Tensor) -> Iterator[NDArray[Any]]:
        blocks = int(np.prod(tensor.shape)) // header.KINDS[int(tensor.kind)].length
        if len(tensor.shape) == 1:  # a norm
            yield np.ones(tensor.shape, np.float32)
        else:
            std = tensor.shape[-1] ** -0.5
            yield _blocks(header.KINDS[int(tensor.kind)], blocks, std, rng).view(np.uint8)

    written = outgoing(with_names(family_of(family, "family")), model)
    found = tensors_of(written, GGMLQuantizationType(kind.number))
    writer = GGUFWriter(path, NETWORKS[family])
    try:
        writer.add_string("tokenizer.ggml.model", "none")
        write_fields(writer, NETWORKS[family], cfg)
        write_tensors(writer, [each._replace(make=partial(random, each)) for each in found])
    finally:
        writer.close()


def _blocks(kind: Kind, count: int, std: float, rng: np.random.Generator) -> NDArray[np.generic]:
    """Random numbers of one kind."""
    if kind.length == 1:
        bound = np.float32(std * 3**0.5)
        numbers = (rng.random(count, np.float32) * 2 - 1) * bound
        return numbers if kind.name == "F32" else (numbers.view(np.uint32) >> 16).astype(np.uint16)
    block = np.dtype([("scale", "<f2"), ("integers", "u1", kind.bytes - 2)])
    made = np.empty(count, block)
    made["scale"] = std / _SPREAD[kind.name]
    made["integers"] = rng.integers(0, 256, (count, kind.bytes - 2), np.uint8)
    return made
