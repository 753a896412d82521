"""Repetition: how often neighbouring tokens go to the same experts.

Letters beside those of docs/shapes.md: M domains, P documents.
"""

from __future__ import annotations

from math import comb
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moestro.errors import MoestroError
from moestro.probe.measures.bootstrap import Bools, Floats, Ints
from moestro.probe.recording.traces import Trace


class Repetition(NamedTuple):
    """How often neighbouring tokens go to the same experts (Mixtral, table 5), and chance.

    `first`: the first choice is the same at positions i and i + 1; `any`: their K choices share at
    least one expert. A domain whose sequences all have a single token has NaN.
    """

    first_LM: Floats
    any_LM: Floats
    first_error_LM: Floats  # standard error over documents; NaN for one document
    any_error_LM: Floats
    first_uniform: float  # if experts were drawn uniformly: 1 / E
    any_uniform: float  # 1 − C(E − K, K) / C(E, K)
    # With the domain's N tokens in random order: Σ n (n − 1) / N (N − 1) over the loads n, for no
    # token is its own neighbour; the fair comparison, since uneven loads repeat by themselves.
    first_shuffled_LM: Floats
    any_shuffled_LM: Floats  # from some such orders


def repetition(trace: Trace, *, seed: int = 0) -> Repetition:
    """How often neighbours of one sequence share their first, or any, expert; and the nulls.

    Raises:
        MoestroError: experts chose tokens (expert choice), or no sequence has two tokens.
    """
    num_experts, top_k = trace.subject.num_experts, trace.subject.top_k
    if top_k == 0:
        raise MoestroError(
            "repetition compares each token's choices, but under expert choice the experts choose; "
            "probe a token-choice model for it"
        )
    follows_T = trace.position_T > 0
    if not follows_T.any():
        raise MoestroError("repetition needs sequences of at least 2 tokens; give longer ones")
    rng = np.random.default_rng(seed)
    shape = (len(trace.subject.moe_layers), len(trace.domains))
    first, any_, first_error, any_error, shuffled, shuffled_any = np.full((6, *shape), np.nan)
    for domain in np.unique(trace.domain_T[follows_T]):
        own = np.flatnonzero(trace.domain_T == domain)
        pairs = own[follows_T[own]]
        document_T = trace.document_T[pairs]
        for layer in range(shape[0]):
            at, experts_TK = (layer, domain), trace.experts_TLK[:, layer]
            same_T, shared_T = _repeats(experts_TK[pairs - 1], experts_TK[pairs])
            first[at], first_error[at] = _rate(same_T, document_T)
            any_[at], any_error[at] = _rate(shared_T, document_T)
            used_E = np.bincount(experts_TK[own, 0], minlength=num_experts)
            shuffled[at] = (used_E * (used_E - 1)).sum() / (len(own) * (len(own) - 1))
            orders = (rng.permutation(own) for _ in range(4))
            drawn = [
                _repeats(experts_TK[order], experts_TK[np.roll(order, 1)])[1].mean()
                for order in orders
            ]
            shuffled_any[at] = shuffled[at] if top_k == 1 else np.mean(drawn)
    return Repetition(
        first_LM=first,
        any_LM=any_,
        first_error_LM=first_error,
        any_error_LM=any_error,
        first_uniform=1 / num_experts,
        any_uniform=1 - comb(num_experts - top_k, top_k) / comb(num_experts, top_k),
        first_shuffled_LM=shuffled,
        any_shuffled_LM=shuffled_any,
    )


def _repeats(here_TK: NDArray[Any], there_TK: NDArray[Any]) -> tuple[Bools, Bools]:
    """Whether two tokens have the same first choice, and any choice in common. [T] each."""
    same_T = here_TK[:, 0] == there_TK[:, 0]
    shared_T = (here_TK[:, :, None] == there_TK[:, None, :]).any(axis=(1, 2))
    return same_T, shared_T


def _rate(hit_T: Bools, document_T: Ints) -> tuple[float, float]:
    """Share of hits, and its standard error with documents as the independent pieces."""
    rate = float(hit_T.mean())
    documents = len(np.unique(document_T))
    if documents < 2:
        return rate, float("nan")
    sums_P = np.bincount(document_T, hit_T - rate)
    error = np.sqrt(np.square(sums_P).sum() * documents / (documents - 1)) / len(hit_T)
    return rate, float(error)
