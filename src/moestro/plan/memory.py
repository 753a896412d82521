"""Bytes of weights, of the key/value cache and of a training step's state, from settings alone.

Letters: B sequences, S context.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from moestro.config import CacheKind, NetworkConfig
from moestro.models import budget
from moestro.models.count import Count

# Weights quantised in groups of 32 that share one fp16 scale: half a bit more for each.
GROUP, SCALE_BITS = 32, 16


class Bits(NamedTuple):
    """Bits of one weight, scales included."""

    tables: float  # input embedding, and the head where it is not the same matrix
    experts: float  # all routed experts
    rest: float  # attention, dense networks, shared experts, routers, norms


def _grouped(bits: int) -> float:
    return bits + SCALE_BITS / GROUP


DTYPES = {
    "fp32": Bits(32, 32, 32),
    "bf16": Bits(16, 16, 16),
    "int8": Bits(16, _grouped(8), _grouped(8)),
    "int4-experts": Bits(16, _grouped(4), 16),
    "int4": Bits(16, _grouped(4), _grouped(4)),
}
"""From wide to narrow. Quantised models keep the embeddings, the head and the cache in bf16."""


class WeightBytes(NamedTuple):
    """Bytes of a model's weights, in the parts of `Bits`."""

    tables: int
    experts: int
    rest: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def weights(count: Count, dtype: str) -> WeightBytes:
    """Bytes of the weights in one of `DTYPES`."""
    bits = DTYPES[dtype]
    tables = count.input_embedding + count.output_embedding
    numbers = (tables, count.expert, count.total - tables - count.expert)
    return WeightBytes(*(math.ceil(n * wide / 8) for n, wide in zip(numbers, bits, strict=True)))


def dtypes(count: Count) -> list[str]:
    """Names in `DTYPES` that mean something for a model: of experts only where it has some."""
    return [name for name in DTYPES if count.expert or name != "int4-experts"]


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


def state_bytes(parameters: int) -> dict[str, int]:
    """What so many parameters take in training, by field of `Training`."""
    return {"weights": 4 * parameters, "gradients": 4 * parameters, "optimizer": 8 * parameters}
