"""A model of random weights in llama.cpp's file format (GGUF 3), to compare llama.cpp with us.

Only shapes and kinds of numbers matter there, so blocks are written as they stand: random integers
with one scale that keeps activations of order one. The file holds no tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from moestro.config import ModelConfig, RopeConfig
from moestro.errors import ConfigError


class Kind(NamedTuple):
    """A kind of numbers: its name and number there, and blocks of `length` in `bytes`."""

    name: str
    number: int
    length: int
    bytes: int


F32 = Kind("F32", 0, 1, 4)
KINDS = {
    "bf16": Kind("BF16", 30, 1, 2),
    "int8": Kind("Q8_0", 8, 32, 34),
    "int4": Kind("Q4_0", 2, 32, 18),
}
# Standard deviation of a random integer of each kind.
_SPREAD = {"Q8_0": 73.9, "Q4_0": 4.61}


class _Tensor(NamedTuple):
    """A tensor to write: rows of `shape[-1]` inputs."""

    name: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) // self.kind.length * self.kind.bytes


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
        "an activation other than swiglu": (moe or cfg.dense).activation != "swiglu",
        "head.bias or head.scale": cfg.head.bias or cfg.head.scale != 1,
        "a dense network with normed heads": moe is None and attention.qk_norm == "head",
    }
    if moe is not None:
        router = moe.router
        reasons["shared experts, biases or a capacity"] = bool(
            moe.shared or moe.capacity or moe.experts.bias
        )
        reasons["a router other than softmax"] = (
            router.kind != "softmax" or router.bias or router.num_groups > 1
        ) or not moe.renormalizes
    found = [reason for reason, there in reasons.items() if there]
    widths = {cfg.dim, attention.num_heads * cfg.head_dim, (moe or cfg.dense).hidden_dim}
    if any(width % kind.length for width in widths):
        found.append(f"widths that are not multiples of {kind.length}, which {kind.name} needs")
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
    tensors = list(_tensors(cfg, kind))
    architecture = "qwen3moe" if cfg.attention.qk_norm == "head" else "llama"
    writer = GGUFWriter(path, architecture)
    writer.add_string("tokenizer.ggml.model", "none")
    for key, value in _fields(cfg).items():
        name = f"{architecture}.{key}"
        if isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_float32(name, value)
    for tensor in tensors:
        number = GGMLQuantizationType(tensor.kind.number)
        shape, dtype = tensor.shape, np.dtype(np.float32)
        writer.add_tensor_info(tensor.name, shape, dtype, tensor.bytes, raw_dtype=number)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        rng = np.random.default_rng(seed)
        for tensor in tensors:
            writer.write_tensor_data(_random(tensor, rng))
    finally:
        writer.close()


def _fields(cfg: ModelConfig) -> dict[str, int | float]:
    """What llama.cpp reads of a model's settings."""
    moe, attention = cfg.moe, cfg.attention
    assert isinstance(attention.positions, RopeConfig)
    fields: dict[str, int | float] = {
        "block_count": cfg.num_layers,
        "context_length": attention.context,
        "embedding_length": cfg.dim,
        "feed_forward_length": (moe or cfg.dense).hidden_dim,
        "attention.head_count": attention.num_heads,
        "attention.head_count_kv": cfg.num_kv_heads,
        "attention.key_length": cfg.head_dim,
        "attention.value_length": cfg.head_dim,
        "attention.layer_norm_rms_epsilon": cfg.norm.eps,
        "rope.freq_base": attention.positions.theta,
        "rope.dimension_count": cfg.head_dim,
        "vocab_size": cfg.vocab_size,
    }
    if moe is not None:
        fields["expert_count"], fields["expert_used_count"] = moe.num_experts, moe.top_k
        fields["expert_feed_forward_length"] = moe.hidden_dim
    return fields


def _tensors(cfg: ModelConfig, kind: Kind) -> Iterator[_Tensor]:
    """Every tensor by llama.cpp's names, NumPy's order of axes."""
    dim, width, moe = cfg.dim, cfg.head_dim, cfg.moe
    heads, groups = cfg.attention.num_heads * width, cfg.num_kv_heads * width
    yield _Tensor("token_embd.weight", (cfg.vocab_size, dim), kind)
    yield _Tensor("output_norm.weight", (dim,), F32)
    if not cfg.head.tied:
        yield _Tensor("output.weight", (cfg.vocab_size, dim), kind)
    for layer in range(cfg.num_layers):
        block = f"blk.{layer}"
        for name in ("attn_norm", "ffn_norm"):
            yield _Tensor(f"{block}.{name}.weight", (dim,), F32)
        for name, rows in (("attn_q", heads), ("attn_k", groups), ("attn_v", groups)):
            yield _Tensor(f"{block}.{name}.weight", (rows, dim), kind)
        yield _Tensor(f"{block}.attn_output.weight", (dim, heads), kind)
        if cfg.attention.qk_norm == "head":
            yield _Tensor(f"{block}.attn_q_norm.weight", (width,), F32)
            yield _Tensor(f"{block}.attn_k_norm.weight", (width,), F32)
        hidden, end = (moe or cfg.dense).hidden_dim, ""
        stack: tuple[int, ...] = ()
        if moe is not None:
            yield _Tensor(f"{block}.ffn_gate_inp.weight", (moe.num_experts, dim), F32)
            stack, end = (moe.num_experts,), "_exps"
        for name, shape in (
            ("gate", (hidden, dim)),
            ("up", (hidden, dim)),
            ("down", (dim, hidden)),
        ):
            yield _Tensor(f"{block}.ffn_{name}{end}.weight", (*stack, *shape), kind)


def _random(tensor: _Tensor, rng: np.random.Generator) -> NDArray[np.generic]:
    """Random blocks of one tensor; ones for a norm."""
    if len(tensor.shape) == 1:
        return np.ones(tensor.shape, np.float32)
    return _blocks(tensor.kind, tensor.bytes // tensor.kind.bytes, tensor.shape[-1] ** -0.5, rng)


def _blocks(kind: Kind, count: int, std: float, rng: np.random.Generator) -> NDArray[np.generic]:
    """Random numbers of one kind."""
    if kind.length == 1:
        bound = np.float32(std * 3**0.5)
        numbers = (rng.random(count, np.float32) * 2 - 1) * bound
        return numbers if kind is F32 else (numbers.view(np.uint32) >> 16).astype(np.uint16)
    block = np.dtype([("scale", "<f2"), ("integers", "u1", kind.bytes - 2)])
    made = np.empty(count, block)
    made["scale"] = std / _SPREAD[kind.name]
    made["integers"] = rng.integers(0, 256, (count, kind.bytes - 2), np.uint8)
    return made
