"""What an expert cache would hit: LRU, LFU and an oracle, at every size, from a trace.

Each layer has its own cache of 1 to E experts, and each sequence goes through it from its first
token to its last, starting with an empty one. So the first touch of an expert is a miss whatever
the policy, and at size E these are all the misses there are.

A token wants its experts together, whether they had room for it or not. After it the cache holds
them, and beside them what the policy values most of what was there before; of a token that has more
experts than the cache has places, those that the policy values most. The policies value:

- lru: the expert that was used last; of one token, the one it weighs most.
- lfu: the expert that was used most often in the sequence, in the cache or not; of equals, the one
  that was used last.
- oracle: the expert that will be used again soonest (Belady 1966), which no policy can beat.

Letters beside those of docs/shapes.md: N sequences, P documents, Z draws, J lanes: a policy and a
layer for each sequence. The axis E of hit rates is the size of the cache, from 1 to E.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moestro.errors import MoestroError
from moestro.probe.measures.bootstrap import (
    Floats,
    Ints,
    document_sums,
    interval,
    pooled_weights,
)
from moestro.probe.recording.traces import Trace

POLICIES = ("lru", "lfu", "oracle")
# Places of caches that are looked at, about 6 ns each.
MOST_WORK = 2 * 10**9
# Places of caches that are held side by side, and tokens that a sequence is cut to at the least.
_SIDE_BY_SIDE = 2**18
_SHORTEST = 256
_PINNED = np.int64(1 << 62)


class HitRates(NamedTuple):
    """Share of the wanted experts that one policy had in its cache; size 1 first, size E last."""

    rate_LE: Floats
    interval_LE2: Floats
    # With all tokens in random order, sequences as long as before: what uneven loads alone give.
    # What the order of the text adds lies above it.
    shuffled_LE: Floats
    mean_E: Floats  # over layers, like the rest
    mean_interval_E2: Floats
    shuffled_E: Floats
    # If tokens chose experts at random, each as likely as any other. It lies below size / E by the
    # first touches; but for the oracle, which foresees.
    uniform_E: Floats


class Caching(NamedTuple):
    """Hit rates of expert caches."""

    lru: HitRates
    lfu: HitRates
    oracle: HitRates
    # Share of wanted experts that their sequence had not used before: misses of every policy at
    # every size.
    first_L: Floats
    full_E: Floats  # size / E: of a full cache if all experts are equally likely each time
    tokens: int  # how many were simulated: the first ones of each of some sequences
    sequences: int
    documents: int
    tokens_recorded: int  # how many the trace has


def caching(
    trace: Trace, *, draws: int = 999, seed: int = 0, most_work: int = MOST_WORK
) -> Caching:
    """Hit rates of every policy, size and layer.

    Args:
        trace: where it is larger than `most_work` allows, some sequences are drawn, and of each
            its first tokens are used; the result says how many.
        draws: bootstrap samples of documents.
        seed: of the draws.
        most_work: tokens × layers × experts × experts per token × 9 that are simulated; the
            default is about 10 seconds.

    Raises:
        MoestroError: `most_work` is below 1.
    """
    if most_work < 1:
        raise MoestroError(f"most_work is {most_work}; give at least 1")
    rng = np.random.default_rng(seed)
    token_T, sequence_N, length_N = _sample(trace, most_work, rng)
    experts_TLK = trace.experts_TLK[token_T]
    layers, num_experts = experts_TLK.shape[1], trace.subject.num_experts
    orders = (
        experts_TLK,
        rng.permutation(experts_TLK, axis=0),
        _uniform(experts_TLK, num_experts, rng),
    )
    hits_NPLE, total_PJE, wanted_NL = _simulate(
        np.concatenate(orders, 1), length_N, num_experts, layers
    )
    document_N, domain_N = trace.document_N[sequence_N], trace.domain_N[sequence_N]
    documents, first_of_N, of_N = np.unique(document_N, return_index=True, return_inverse=True)
    weights_ZP = pooled_weights(domain_N[first_of_N], draws, seed)
    wanted_PL = document_sums(wanted_NL, of_N, len(documents))
    found = {}
    with np.errstate(invalid="ignore"):
        for place, policy in enumerate(POLICIES):
            hits_PLE = document_sums(hits_NPLE[:, place], of_N, len(documents))
            counts_OLE = total_PJE[place].reshape(3, layers, num_experts)
            rate_OLE = counts_OLE / wanted_NL.sum(axis=0)[:, None]
            found[policy] = _rates(rate_OLE, *_intervals(hits_PLE, wanted_PL, weights_ZP))
    return Caching(
        **found,
        first_L=1 - found["lru"].rate_LE[:, -1],
        full_E=np.arange(1, num_experts + 1) / num_experts,
        tokens=len(token_T),
        sequences=len(sequence_N),
        documents=len(documents),
        tokens_recorded=len(trace.tokens_T),
    )


def _rates(rate_OLE: Floats, interval_LE2: Floats, mean_interval_E2: Floats) -> HitRates:
    """Put together, from the rates of the three orders: as it is, shuffled, uniform."""
    rate_LE, shuffled_LE, _ = rate_OLE
    mean_OE = rate_OLE.mean(axis=1)
    return HitRates(rate_LE, interval_LE2, shuffled_LE, mean_OE[0], mean_interval_E2, *mean_OE[1:])


def _sample(trace: Trace, most_work: int, rng: np.random.Generator) -> tuple[Ints, Ints, Ints]:
    """The tokens to simulate, and the number and length of their sequences, longest first."""
    _, layers, top_k = trace.experts_TLK.shape
    cost = 3 * len(POLICIES) * layers * trace.subject.num_experts * max(top_k, 1)
    most = max(1, most_work // cost)
    length_N, sequence_N = trace.length_N, np.arange(len(trace.length_N))
    if length_N.sum() > most:
        length_N = np.minimum(length_N, max(_SHORTEST, most // 32))
        sequence_N = rng.permutation(sequence_N)
        fits_N = np.cumsum(length_N[sequence_N]) <= most
        sequence_N = sequence_N[: max(1, int(fits_N.sum()))]
        length_N = np.minimum(length_N, most)
    sequence_N = sequence_N[np.argsort(-length_N[sequence_N], kind="stable")]
    used_N = length_N[sequence_N]
    starts_N = (np.cumsum(trace.length_N) - trace.length_N)[sequence_N]
    inside_T = np.arange(used_N.sum()) - np.repeat(np.cumsum(used_N) - used_N, used_N)
    return np.repeat(starts_N, used_N) + inside_T, sequence_N, used_N


def _uniform(experts_TLK: NDArray[Any], num_experts: int, rng: np.random.Generator) -> NDArray[Any]:
    """As many experts for each token as there are, chosen at random; E where there is none."""
    tokens, layers, top_k = experts_TLK.shape
    drawn_TLK = np.empty_like(experts_TLK)
    rows = max(1, 2**20 // num_experts)
    for layer in range(layers):
        for start in range(0, tokens, rows):
            part_TE = rng.random((min(rows, tokens - start), num_experts))
            drawn_TLK[start : start + rows, layer] = np.argsort(part_TE, axis=1)[:, :top_k]
    return np.where(experts_TLK == num_experts, experts_TLK, drawn_TLK)


def _simulate(
    experts_TLK: NDArray[Any], length_N: Ints, num_experts: int, apart: int
) -> tuple[NDArray[np.int32], Ints, Ints]:
    """Hits of each policy, layer and size of cache, and how many experts were wanted.

    Args:
        experts_TLK: E marks an empty place.
        length_N: tokens of each sequence, falling.
        num_experts: E.
        apart: how many of the layers are counted by sequence.

    Returns:
        Hits of the first `apart` layers by sequence, [N, 3, apart, E]; of all layers, [3, L, E];
        wanted experts of the first `apart` layers by sequence, [N, apart].
    """
    layers, top_k = experts_TLK.shape[1:]
    side_by_side = max(1, _SIDE_BY_SIDE // (len(POLICIES) * layers * num_experts))
    ends_N = np.cumsum(length_N)
    hits, wanted = [], []
    total_PLE = np.zeros((len(POLICIES), layers, num_experts), dtype=np.int64)
    for low in range(0, len(length_N), side_by_side):
        block_N = length_N[low : low + side_by_side]
        stop = int(ends_N[low + len(block_N) - 1])
        part_TLK = experts_TLK[stop - int(block_N.sum()) : stop].astype(np.int64)
        codes = _codes(part_TLK, block_N, num_experts)
        held_EnJ = _stack_positions(*codes, block_N, num_experts, top_k)
        hits_EnPL = held_EnJ.cumsum(axis=0, dtype=np.int32).reshape(
            num_experts, len(block_N), len(POLICIES), layers
        )
        total_PLE += np.moveaxis(hits_EnPL.sum(axis=1, dtype=np.int64), 0, -1)
        hits.append(np.moveaxis(hits_EnPL[..., :apart], 0, -1).copy())
        used_TL = (part_TLK[:, :apart] < num_experts).sum(axis=2)
        wanted.append(np.add.reduceat(used_TL, np.cumsum(block_N) - block_N, axis=0))
    return np.concatenate(hits), total_PLE, np.concatenate(wanted)


def _codes(
    experts_TLK: Ints, length_N: Ints, num_experts: int
) -> tuple[Ints, Ints, NDArray[np.bool_]]:
    """How each policy values each wanted expert from then on. Each [T, K, 3·L].

    A code is value · E + expert, higher for what is to stay longer, so that comparing codes
    compares values and no two are equal. An expert not used before has the value 0.

    Returns:
        The code of each wanted expert after the token and, at its last use, before it; whether
        there was one. Experts of one token are in the order of their codes, empty places, with a
        code of −1, first.
    """
    tokens, layers, top_k = experts_TLK.shape
    steps = int(length_N.max())
    position_T = np.arange(tokens) - np.repeat(np.cumsum(length_N) - length_N, length_N)
    sequence_T = np.repeat(np.arange(len(length_N)), length_N)
    lane_TL1 = (sequence_T[:, None] * layers + np.arange(layers))[..., None]
    # The uses of one expert in one sequence and layer side by side, in the order of time.
    user_R = (lane_TL1 * (num_experts + 1) + experts_TLK).ravel()
    time_R = np.broadcast_to(position_T[:, None, None], experts_TLK.shape).ravel()
    order_R = np.argsort(user_R * steps + time_R)
    again_R = np.zeros(len(order_R), dtype=np.bool_)
    again_R[1:] = user_R[order_R][1:] == user_R[order_R][:-1]
    place_R = np.arange(len(order_R))
    rank_R = place_R - np.maximum.accumulate(np.where(again_R, 0, place_R))
    next_R = np.full(len(order_R), steps)
    next_R[:-1] = np.where(again_R[1:], time_R[order_R][1:], steps)
    choice_R = np.broadcast_to(top_k - np.arange(top_k), experts_TLK.shape).ravel()[order_R]
    recent_R = time_R[order_R] * top_k + choice_R
    values = (
        recent_R,
        (rank_R + 1) * (steps * top_k + 1) + recent_R,
        (steps - next_R) * top_k + choice_R,
    )
    expert_R = experts_TLK.ravel()[order_R]
    empty_R = expert_R == num_experts
    results = []
    back_R = np.argsort(order_R)
    for value_R in values:
        code_R = np.where(empty_R, -1, value_R * num_experts + expert_R)
        before_R = np.where(again_R, np.roll(code_R, 1), expert_R)
        before_R[empty_R] = -2
        three = (code_R, before_R, again_R & ~empty_R)
        by_code = np.argsort(code_R[back_R].reshape(experts_TLK.shape), axis=2)
        results.append(
            [
                np.take_along_axis(values[back_R].reshape(experts_TLK.shape), by_code, axis=2)
                for values in three
            ]
        )
    # [T, policy, L, K] → [T, K, policy and layer]
    code, before, seen = (
        np.ascontiguousarray(np.stack(each, axis=1).reshape(tokens, -1, top_k).swapaxes(1, 2))
        for each in zip(*results, strict=True)
    )
    return code, before, seen


def _stack_positions(
    code_TKJ: Ints, before_TKJ: Ints, seen_TKJ: NDArray[np.bool_],
    length_N: Ints, num_experts: int, top_k: int,
) -> NDArray[np.int32]:  # fmt: skip
    """How often a wanted expert lay at each place of the stack. [E, N, J].

    The caches of all sizes are one stack (Mattson et al. 1970): its first c experts are the cache
    of size c. A wanted expert goes to the top and leaves a hole; for every size above the hole
    the expert of the lowest code has to go one down, which is the running minimum of the codes.
    Experts not used yet fill the stack from below; they are free places.
    """
    starts_N = np.cumsum(length_N) - length_N
    lanes = code_TKJ.shape[2]
    stack = np.empty((num_experts, len(length_N), lanes), dtype=np.int64)
    stack[:] = np.arange(num_experts)[:, None, None]
    lowest, found = np.empty_like(stack), np.empty(stack.shape, dtype=np.bool_)
    held = np.zeros(stack.shape, dtype=np.int32)
    any_empty = bool((code_TKJ < 0).any())
    for step in range(int(length_N.max())):
        active = int(np.searchsorted(-length_N, -step, side="left"))
        now_N = starts_N[:active] + step
        code_nKJ, before_nKJ, seen_nKJ = code_TKJ[now_N], before_TKJ[now_N], seen_TKJ[now_N]
        stack_EnJ, lowest_EnJ = stack[:, :active], lowest[:, :active]
        found_EnJ, held_EnJ = found[:, :active], held[:, :active]
        for choice in range(top_k):
            np.equal(stack_EnJ, before_nKJ[:, choice], out=found_EnJ)
            np.copyto(stack_EnJ, -1, where=found_EnJ)
            np.logical_and(found_EnJ, seen_nKJ[:, choice], out=found_EnJ)
            held_EnJ += found_EnJ
        for choice in range(top_k):
            new_nJ = code_nKJ[:, choice] | _PINNED
            if any_empty:
                none_nJ = code_nKJ[:, choice] < 0
                new_nJ[none_nJ] = stack_EnJ[0][none_nJ]
                stack_EnJ[0][none_nJ] = -1
            np.minimum.accumulate(stack_EnJ, axis=0, out=lowest_EnJ)
            np.maximum(lowest_EnJ[:-1], stack_EnJ[1:], out=stack_EnJ[1:])
            stack_EnJ[0] = new_nJ
        stack_EnJ[:top_k] &= ~_PINNED
    return held


def _intervals(hits_PLE: Floats, wanted_PL: Floats, weights_ZP: Floats) -> tuple[Floats, Floats]:
    """Of each layer's rate, [L, E, 2], and of their mean, [E, 2]."""
    _, layers, sizes = hits_PLE.shape
    mean_ZE = np.zeros((len(weights_ZP), sizes))
    limits = []
    for layer in range(layers):
        rate_ZE = (weights_ZP @ hits_PLE[:, layer]) / (weights_ZP @ wanted_PL[:, layer, None])
        limits.append(interval(rate_ZE))
        mean_ZE += rate_ZE / layers
    return np.stack(limits), interval(mean_ZE)
