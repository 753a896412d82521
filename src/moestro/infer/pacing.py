"""How long a token takes on this machine, measured on an open model whose experts are in a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import cycle
from random import Random
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moestro.infer.native_decoder import NativeDecoder, supports
from moestro.kernels.residency import Residency
from moestro.models.cache import KVCache
from moestro.models.decoder import Decoder
from moestro.models.pace import Pace
from moestro.moe.packed import PackedExperts

SECONDS = 0.5
# Tokens and calls that are measured however long they take; the first ones warm up.
_LEAST_TOKENS, _WARMING, _LEAST_CALLS = 4, 2, 3
# Calls of each number of misses, of which a disk takes now one and now several times as long; for
# large experts up to this many times as long is taken.
_CALLS, _LONGER = 8, 3
# How many times as much, or as little, misses may add to a token as to a mixture by itself.
_MOST_APART = 3.0


def measure_pace(model: Decoder, residency: Residency, seconds: float = SECONDS) -> Pace:
    """Let a model write a few tokens, and miss experts on purpose.

    It changes no later result: what is in memory decides how long a token takes, and no bit of it.

    Args:
        model: a decoder that was opened within a budget.
        residency: what reads its experts.
        seconds: about how long, if a token takes no longer than a tenth of that; up to
            twice as long where experts are large, and half as long again to fill memory first.

    Raises:
        CheckpointError: an expert cannot be read.
    """
    short = sum(slabs.kept < slabs.experts for slabs in residency.mixtures)
    with torch.inference_mode():
        filled = _filled(model, residency, seconds / 2)
        missed_M = _missed(model, residency, filled, seconds / 2)
        steps = _steps(model, residency, seconds / 2)
    if len(filled) == short:  # else tokens miss into memory that was never touched
        missed_M = _as_in_steps(missed_M, steps, short)
    return Pace(_usual([each.compute_s for each in steps]), missed_M)


def _as_in_steps(
    missed_M: tuple[float, ...], steps: Sequence[_Step], mixtures: int
) -> tuple[float, ...]:
    """What misses add where all else of a token comes between: what they added to whole tokens."""
    each_M = [step.misses / max(1, mixtures) for step in steps]
    alone_s = mixtures * float(np.interp(each_M, range(len(missed_M)), missed_M).sum())
    factor = _usual([step.missed_s for step in steps]) * len(steps) / alone_s if alone_s else 1.0
    return tuple(cost * min(max(factor, 1 / _MOST_APART), _MOST_APART) for cost in missed_M)


class _Step(NamedTuple):
    """A token that passed twice, at last with all of its experts in memory."""

    compute_s: float
    missed_s: float  # how much longer it took the first time
    misses: int  # then, in all mixtures


def _steps(model: Decoder, residency: Residency, seconds: float) -> list[_Step]:
    """Tokens that pass twice, in two equal texts.

    The text is what the model writes by itself, since random tokens are routed as no text is.
    """
    step, generator = _stepper(model), torch.Generator().manual_seed(0)
    pasts, token, made = [model.new_cache(1), model.new_cache(1)], 0, list[_Step]()
    end = time.perf_counter() + seconds
    while len(made) < _LEAST_TOKENS or time.perf_counter() < end:
        if pasts[0].position >= model.cfg.attention.context:
            pasts = [model.new_cache(1), model.new_cache(1)]
        before, start = residency.reads(), time.perf_counter()
        step(token, pasts[0])
        first, middle = residency.reads(), time.perf_counter()
        logits_V = step(token, pasts[1])
        again_s = time.perf_counter() - middle - residency.reads().since(first).waited_s
        token = int(torch.multinomial(logits_V.softmax(-1), 1, generator=generator))
        compute_s = time.perf_counter() - middle - residency.reads().since(first).waited_s
        made.append(_Step(compute_s, middle - start - again_s, first.since(before).misses))
    return made[_WARMING:]


def _stepper(model: Decoder) -> Callable[[int, KVCache], Tensor]:
    """A token's logits [V], as decoding runs for this model."""
    if supports(model) is None:
        decoder = NativeDecoder(model)
        return lambda token, past: decoder.step([[token]], [past]).logits_NV[-1]

    def step(token: int, past: KVCache) -> Tensor:
        tokens_BS = torch.tensor([[token]], dtype=torch.int64, device="cpu")
        logits_V: Tensor = model(tokens_BS, cache=past).logits[0, -1]
        return logits_V.float()

    return step


def _missed(
    model: Decoder, residency: Residency, short: Sequence[PackedExperts], seconds: float
) -> tuple[float, ...]:
    """What so many misses of one mixture add, [M]: mixtures are called with experts not there."""
    top_k = max(layer.cfg.top_k for layer in model.mixtures())
    if not short:
        return (0.0,) * (top_k + 1)
    random, times = Random(0), [list[float]() for _ in range(top_k + 1)]
    computed = []

    def call(layer: PackedExperts, chosen: list[int]) -> None:
        before, start = residency.reads(), time.perf_counter()
        _mix(layer, chosen)
        took_s, made = time.perf_counter() - start, residency.reads().since(before)
        times[made.misses].append(took_s)
        computed.append(took_s - made.waited_s)

    orders = [top_k, 0, top_k // 2, *range(1, top_k)]
    end = time.perf_counter() + seconds
    for number, (layer, wanted) in enumerate(zip(cycle(short), cycle(orders), strict=False)):
        over_s = time.perf_counter() - end
        enough = number >= _CALLS * len(orders) or over_s > (_LONGER - 1) * seconds
        if number >= _LEAST_CALLS and over_s > 0 and enough:
            break
        there = random.sample(range(layer.weights.num_experts), top_k)
        call(layer, there)
        others = [e for e in range(layer.weights.num_experts) if e not in there]
        new = min(wanted, len(others))  # a token wants K experts also where there are few others
        call(layer, there[new:] + random.sample(others, new))
    base = _usual(times[0]) if times[0] else min(computed)
    known = [m for m, each in enumerate(times) if each]
    costs = [max(0.0, _usual(times[m]) - base) for m in known]
    return tuple(np.interp(range(top_k + 1), [0, *known], [0.0, *costs]).tolist())


def _filled(model: Decoder, residency: Residency, seconds: float) -> list[PackedExperts]:
    """Mixtures that miss experts, at least one, with all places for those they keep taken once.

    Memory that was never touched is slow the first time, some of it slower than the disk.
    """
    top_k = max(layer.cfg.top_k for layer in model.mixtures())
    experts = [each for each in model.modules() if isinstance(each, PackedExperts)]
    filled, end = list[PackedExperts](), time.perf_counter() + seconds
    for layer, slabs in zip(experts, residency.mixtures, strict=True):
        if slabs.kept < slabs.experts and (not filled or time.perf_counter() < end):
            for first in range(0, slabs.kept, top_k):
                _mix(layer, list(range(first, min(first + top_k, slabs.kept))))
            filled.append(layer)
    return filled


def _usual(values: Sequence[float]) -> float:
    """The mean of the middle half: a call during which another process ran does not count."""
    ordered, quarter = sorted(values), len(values) // 4
    return fmean(ordered[quarter : len(ordered) - quarter])


def _mix(experts: PackedExperts, chosen: list[int]) -> None:
    """One token through some experts."""
    count = len(chosen)
    tokens_A = torch.zeros(count, dtype=torch.int64, device="cpu")
    experts_A = torch.tensor(chosen, dtype=torch.int64, device="cpu")
    row_1D = torch.ones(1, experts.weights.dim, dtype=torch.float32, device="cpu")
    weights_A = torch.full((count,), 1 / count, dtype=torch.float32, device="cpu")
    experts.mix(row_1D, tokens_A, experts_A, weights_A)
