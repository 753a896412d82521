"""What fits into an amount of memory, and what to change if it does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from moestro.config import CacheKind, NetworkConfig
from moestro.errors import ConfigError
from moestro.models import budget
from moestro.models.budget import Budget, Mixture, Needs, Use
from moestro.models.count import Count
from moestro.plan.memory import (
    Training,
    WeightBytes,
    cache_bytes,
    dtypes,
    number_bytes,
    quantised,
    weights,
)
from moestro.plan.parallel import rank

# Packed experts are on whole pages.
_PAGE = 4096


class Serving(NamedTuple):
    """Serving with weights of one dtype."""

    dtype: str
    need_bytes: int  # weights and cache
    fits: bool
    longest_context: int | None  # at the batch asked for; 0 where not even one token fits
    largest_batch: int | None  # at the context asked for


class Change(NamedTuple):
    """One thing that, given up alone, makes the rest fit."""

    what: str  # "dtype", "context", "batch", "offload" (experts kept outside) or "devices"
    value: str | int  # the dtype, tokens, sequences, bytes, or how many devices of this memory
    text: str  # for people


class Fit(NamedTuple):
    """What an amount of memory holds."""

    memory_bytes: int
    rows: tuple[Serving, ...]  # serving, for each dtype from wide to narrow
    changes: tuple[Change, ...]  # what would have to give, where the dtype asked for does not fit
    training: bool | None  # whether a training step fits as it is; None where it is not known
    training_checkpointed: bool | None  # the same with checkpointed activations
    # Fewest ranks of fully sharded training that hold it, checkpointed; None where the activations
    # of one rank alone are too many, or not known.
    fsdp_ranks: int | None
    # What runs with experts left in a file (`--memory`), of the dtype asked for; None where all of
    # it fits, where there are no experts, or where even one of each mixture is too much.
    streamed: Budget | None = None
    streamed_least: int | None = None  # the smallest amount that `--memory` takes of it
    packing_least: int | None = None  # the same where the packed file is to be written first


def fit(
    cfg: NetworkConfig | None,
    count: Count,
    training: Training,
    context: int,
    batch: int,
    dtype: str,
    memory_bytes: int,
    cache: CacheKind = "as-is",
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
        cache: how keys and values are kept.
    """

    def row(name: str) -> Serving:
        need = weights(count, name, cfg).total
        if cfg is None:
            return Serving(name, need, need <= memory_bytes, None, None)
        left = memory_bytes - need
        need += cache_bytes(cfg, context, batch, name, cache)
        longest = _most(
            lambda tokens: cache_bytes(cfg, tokens, batch, name, cache),
            left,
            cfg.attention.context,
        )
        most = max(0, left) // cache_bytes(cfg, context, 1, name, cache)
        return Serving(name, need, need <= memory_bytes, longest, most)

    rows = {name: row(name) for name in dtypes(count, dtype)}
    asked = rows.get(dtype, rows["bf16"])  # a dense model has no experts to keep narrower
    changes = () if asked.fits else _changes(cfg, count, context, batch, asked, rows, memory_bytes)
    within = _Streamed()
    if not asked.fits and cfg is not None:
        use, sizes = Use(context, batch, cache=cache), weights(count, asked.dtype, cfg)
        within = _streamed(cfg, streamed_needs(cfg, sizes, asked.dtype, use), memory_bytes)
    if training.activations is None or training.checkpointed is None:
        return Fit(memory_bytes, tuple(rows.values()), changes, None, None, None, *within)
    sharded = rank(cfg, count, training, "fsdp", 2, context * batch, number_bytes(dtype))
    room = memory_bytes - training.checkpointed - ((sharded.gathered if sharded else None) or 0)
    return Fit(
        memory_bytes,
        tuple(rows.values()),
        changes,
        training.state + training.activations <= memory_bytes,
        training.state + training.checkpointed <= memory_bytes,
        math.ceil(training.state / room) if room > 0 else None,
        *within,
    )


def streamed_needs(cfg: NetworkConfig, sizes: WeightBytes, dtype: str, use: Use) -> Needs | None:
    """What runs while experts are read as they are wanted; None: there are no experts."""
    moe = cfg.moe
    if moe is None:
        return None
    layers = sum(layer.mixture for stack in cfg.stacks() for layer in stack.layers)
    slab = -(-sizes.experts // (layers * moe.num_experts * _PAGE)) * _PAGE
    mixtures = [Mixture(slab, moe.num_experts, moe.top_k)] * layers
    dense = sizes.total - sizes.experts
    if cfg.head.tied and quantised(dtype) is None:
        dense += sizes.tables  # the file has the head beside the embedding
    return budget.needs(cfg, number_bytes(dtype), dense, mixtures, use)


class _Streamed(NamedTuple):
    """The last three fields of `Fit`."""

    streamed: Budget | None = None
    least: int | None = None
    packing_least: int | None = None


def _streamed(cfg: NetworkConfig, needs: Needs | None, memory_bytes: int) -> _Streamed:
    """The experts that stay in memory, unless not even one of each mixture does; what would."""
    if needs is None:
        return _Streamed()
    try:
        kept = budget.fit(needs, memory_bytes)
    except ConfigError:
        kept = None
    first = needs._replace(packing=budget.packing_bytes(cfg, needs.mixtures))
    return _Streamed(kept, budget.smallest(needs), budget.smallest(first))


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
    cfg: NetworkConfig | None,
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
        changes.append(Change("batch", size, f"{size:,} sequences per batch instead of {batch:,}"))
    changes += _offload(cfg, count, asked, memory_bytes)
    narrowest = min(rows.values(), key=lambda row: row.need_bytes)
    if not narrower and narrowest is not asked:
        first = f"weights in {narrowest.dtype}, and "
        changes += _offload(cfg, count, narrowest, memory_bytes, first)
    devices = math.ceil(asked.need_bytes / memory_bytes)
    changes.append(Change("devices", devices, f"{devices} devices of this memory, evenly split"))
    return tuple(changes)


def _offload(
    cfg: NetworkConfig | None, count: Count, row: Serving, memory_bytes: int, first: str = ""
) -> list[Change]:
    """Which share of the experts would have to lie elsewhere; nothing where all is too little."""
    missing, experts = row.need_bytes - memory_bytes, weights(count, row.dtype, cfg).experts
    if missing > experts:
        return []
    share = math.ceil(100 * missing / experts)
    return [Change("offload", missing, f"{first}{share} % of the experts in other memory")]
