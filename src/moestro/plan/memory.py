"""Bytes of weights, of the key/value cache and of a training step's state, from settings alone.

Letters: B sequences, S context.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from moestro.config import CacheKind, NetworkConfig
from moestro.kernels.formats import QUANTISED, WEIGHTS, Format, matrix_bytes, slab_bytes
from moestro.models import budget
from moestro.models.count import Count, packables


class Bits(NamedTuple):
    """Bits of one weight, scales included."""

    tables: float  # input embedding
    experts: float  # all routed experts
    rest: float  # the head, attention, dense networks, shared experts, routers, norms


# Kinds that files and checkpoints are kept in beside those that --weights names.
FORMATS = {**WEIGHTS, **{kind: Format(kind) for kind in QUANTISED if kind not in WEIGHTS}}


def _bits(format: Format) -> Bits:
    return Bits(16 if format.kind in QUANTISED else format.bits, format.bits, format.bits)


DTYPES = dict(
    sorted(
        {
            **{name: _bits(format) for name, format in FORMATS.items()},
            "int4-experts": Bits(16, FORMATS["int4"].bits, 16),
        }.items(),
        key=lambda pair: -(4 * pair[1].experts + pair[1].rest),  # experts are most of a mixture
    )
)
"""From wide to narrow. Quantised models keep the embedding and the cache in bf16."""


class WeightBytes(NamedTuple):
    """Bytes of a model's weights, in the parts of `Bits`; of tables the input embedding."""

    tables: int
    experts: int
    rest: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def weights(count: Count, dtype: str, cfg: NetworkConfig | None = None) -> WeightBytes:
    """Bytes of the weights in one of `DTYPES`.

    With settings they are those of the packed tensors, exactly: with what fills up blocks and
    pages, and a tied head beside its embedding. Else, and plain, they follow from the numbers.
    """
    packed = quantised(dtype)
    if cfg is not None and packed is not None:
        return _packed(count, cfg, packed)
    bits, tables = DTYPES[dtype], count.input_embedding
    numbers = (tables, count.expert, count.total - tables - count.expert)
    return WeightBytes(*(math.ceil(n * wide / 8) for n, wide in zip(numbers, bits, strict=True)))


def quantised(dtype: str) -> Format | None:
    """How integers of one of `DTYPES` are packed; None: its numbers are as they are, or some."""
    format = FORMATS.get(dtype)
    return format if format is not None and format.kind in QUANTISED else None


def _packed(count: Count, cfg: NetworkConfig, format: Format) -> WeightBytes:
    """Bytes of what a packed file holds, beside 2 for each number that is not packed."""
    found, tables = packables(cfg), 2 * count.input_embedding
    routed, dense = (
        sum(
            n * each.experts * slab_bytes(each.dim, each.hidden_dim, each.activation, format)
            for each, n in stacks.items()
        )
        for stacks in (found.routed, found.dense)
    )
    projections = sum(n * matrix_bytes(*sides, format) for sides, n in found.matrices.items())
    plain = 4 * (found.biases + found.buffers) + 2 * found.others - tables
    return WeightBytes(tables, routed, dense + projections + plain)


def dtypes(count: Count, asked: str = "bf16") -> list[str]:
    """The usual ones of `DTYPES` and the one asked for, from wide to narrow.

    Without what means nothing for a model: int4-experts where it has none.
    """
    usual = {"fp32", "bf16", "int8", "int4-experts", "int4", asked}
    usual -= set() if count.expert else {"int4-experts"}
    return [name for name in DTYPES if name in usual]


def number_bytes(dtype: str) -> int:
    """Bytes of one number of the cache or of an activation: 4 for fp32 weights, else 2 (bf16)."""
    return 4 if dtype == "fp32" else 2


def cache_bytes(
    cfg: NetworkConfig, context: int, batch: int, dtype: str, cache: CacheKind = "as-is"
) -> int:
    """Keys and values of B sequences after S positions; see `budget.cache_bytes`."""
    return budget.cache_bytes(cfg, context, batch, number_bytes(dtype), cache)


class Training(NamedTuple):
    """Bytes of a training step on one device, all of the model on it."""

    weights: int  # fp32, as `moestro train` keeps them; so are gradients and AdamW's two moments
    gradients: int
    optimizer: int
    activations: int | None  # kept for the backward pass; None where the settings are not known
    checkpointed: int | None  # the same with `train.runtime.checkpoint_activations`

    @property
    def state(self) -> int:
        """Weights, gradients and moments: 16 bytes for each parameter."""
        return self.weights + self.gradients + self.optimizer

    @property
    def saved(self) -> int:
        """What a checkpoint holds, and its copy in host memory while it is saved in background."""
        return self.weights + self.optimizer


def state_bytes(parameters: int) -> dict[str, int]:
    """What so many parameters take in training, by field of `Training`."""
    return {"weights": 4 * parameters, "gradients": 4 * parameters, "optimizer": 8 * parameters}
