"""What fits into an amount of memory, and what would have to give where it does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from moestro.config import EncDecConfig, ModelConfig
from moestro.models.count import Count
from moestro.plan.memory import Training, cache_bytes, dtypes, number_bytes, weights
from moestro.plan.parallel import rank


class Serving(NamedTuple):
    """Serving with weights of one dtype.

    Attributes:
        dtype: of the weights.
        need_bytes: weights and cache.
        fits: whether that is no more than the memory.
        longest_context: at the batch asked for; 0 where not even one token fits.
        largest_batch: at the context asked for.
    """

    dtype: str
    need_bytes: int
    fits: bool
    longest_context: int | None
    largest_batch: int | None


class Change(NamedTuple):
    """One thing that, given up alone, makes the rest fit.

    Attributes:
        what: "dtype", "context", "batch", "offload" (experts kept outside) or "devices".
        value: the dtype, tokens, sequences, bytes, or how many devices of this memory.
        text: for people.
    """

    what: str
    value: str | int
    text: str


class Fit(NamedTuple):
    """What an amount of memory holds.

    Attributes:
        memory_bytes: the amount.
        rows: serving, for each dtype from wide to narrow.
        changes: what would have to give, where the dtype asked for does not fit.
        training: whether a training step fits, as it is; None where it is not known.
        training_checkpointed: the same with checkpointed activations.
        fsdp_ranks: fewest ranks of fully sharded training that hold it, checkpointed; None where
            the activations of one rank alone are too many, or not known.
    """

    memory_bytes: int
    rows: tuple[Serving, ...]
    changes: tuple[Change, ...]
    training: bool | None
    training_checkpointed: bool | None
    fsdp_ranks: int | None


def fit(
    cfg: ModelConfig | EncDecConfig | None,
    count: Count,
    training: Training,
    context: int,
    batch: int,
    dtype: str,
    memory_bytes: int,
) -> Fit:
    """Compare a model's needs with an amount of memory.

    Args:
        cfg: the model; None where only counts are known (its cache is then left out).
        count: its count.
        training: its training step on one device.
        context: tokens of each sequence.
        batch: sequences.
        dtype: of the weights asked for, one of `DTYPES`.
        memory_bytes: what is there for weights, cache and activations.
    """
    rows = {name: _row(cfg, count, context, batch, name, memory_bytes) for name in dtypes(count)}
    asked = rows.get(dtype, rows["bf16"])  # a dense model has no experts to keep narrower
    changes = () if asked.fits else _changes(cfg, count, context, batch, asked, rows, memory_bytes)
    if training.activations is None or training.checkpointed is None:
        return Fit(memory_bytes, tuple(rows.values()), changes, None, None, None)
    number = number_bytes(dtype)
    sharded = rank(cfg, count, training, "fsdp", 2, context * batch, number)
    room = memory_bytes - training.checkpointed - ((sharded.gathered if sharded else None) or 0)
    return Fit(
        memory_bytes,
        tuple(rows.values()),
        changes,
        training.state + training.activations <= memory_bytes,
        training.state + training.checkpointed <= memory_bytes,
        math.ceil(training.state / room) if room > 0 else None,
    )


def _row(
    cfg: ModelConfig | EncDecConfig | None,
    count: Count,
    context: int,
    batch: int,
    dtype: str,
    memory_bytes: int,
) -> Serving:
    need = weights(count, dtype).total
    if cfg is None:
        return Serving(dtype, need, need <= memory_bytes, None, None)
    model, left = cfg, memory_bytes - need
    need += cache_bytes(model, context, batch, dtype)
    longest = model.attention.context
    return Serving(
        dtype,
        need,
        need <= memory_bytes,
        _most(lambda tokens: cache_bytes(model, tokens, batch, dtype), left, longest),
        max(0, left) // cache_bytes(model, context, 1, dtype),
    )


def _most(cost: Callable[[int], int], left: int, limit: int) -> int:
    """The largest number up to `limit` whose cost, which grows with it, is at most `left`."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if cost(middle) <= left:
            low = middle
        else:
            high = middle - 1
    return low


def _changes(
    cfg: ModelConfig | EncDecConfig | None,
    count: Count,
    context: int,
    batch: int,
    asked: Serving,
    rows: dict[str, Serving],
    memory_bytes: int,
) -> tuple[Change, ...]:
    """What helps, each alone; nothing that does not."""
    changes = []
    narrower = [row for row in rows.values() if row.need_bytes < asked.need_bytes and row.fits]
    if narrower:
        name = narrower[0].dtype
        changes.append(Change("dtype", name, f"weights in {name}"))
    if asked.longest_context:
        tokens = asked.longest_context
        changes.append(Change("context", tokens, f"a context of {tokens:,} instead of {context:,}"))
    if asked.largest_batch:
        size = asked.largest_batch
        changes.append(Change("batch", size, f"{size:,} sequences at once instead of {batch:,}"))
    changes += _offload(count, asked, memory_bytes)
    narrowest = min(rows.values(), key=lambda row: row.need_bytes)
    if not narrower and narrowest is not asked:
        changes += _offload(count, narrowest, memory_bytes, f"weights in {narrowest.dtype}, and ")
    devices = math.ceil(asked.need_bytes / memory_bytes)
    changes.append(Change("devices", devices, f"{devices} devices of this memory, evenly split"))
    return tuple(changes)


def _offload(count: Count, row: Serving, memory_bytes: int, first: str = "") -> list[Change]:
    """Which share of the experts would have to lie elsewhere; nothing where all is too little."""
    missing, experts = row.need_bytes - memory_bytes, weights(count, row.dtype).experts
    if missing > experts:
        return []
    share = math.ceil(100 * missing / experts)
    return [Change("offload", missing, f"{first}{share} % of the experts in other memory")]
