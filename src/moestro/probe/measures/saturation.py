"""Saturation: how early in training the router sends a token where it will send it at the end.

Letters beside those of docs/shapes.md: N sequences, P documents, Z draws, J checkpoints, the last
one the model that the others are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from moestro.errors import DataError
from moestro.probe.measures.bootstrap import (
    Floats,
    document_domains,
    document_sums,
    interval,
    pooled_weights,
)
from moestro.probe.recording.traces import Ints, Trace


class Saturation(NamedTuple):
    """Share of the last checkpoint's choices that a checkpoint made already, |E_t ∩ E_T| / K.

    OLMoE (Muennighoff et al. 2024), section 5.1. Where tokens have varying numbers of experts,
    all choices count alike.
    """

    steps_J: Ints  # the training step of each checkpoint; the last has a saturation of 1
    moe_layers: tuple[int, ...]  # the layer number of each of the L mixture layers
    share_JL: Floats
    interval_JL2: Floats
    mean_J: Floats  # over layers
    mean_interval_J2: Floats
    random: float  # if both chose at random, all experts alike: mean experts per token / E
    # If they chose independently of each other, but with the loads that they have: what dealing
    # one's choices to the tokens at random gives on average.
    loads_JL: Floats
    documents: int


def saturation(
    traces: Sequence[Trace], steps: Sequence[int], *, draws: int = 999, seed: int = 0
) -> Saturation:
    """How much of the final routing each checkpoint has.

    Args:
        traces: of the checkpoints of one training run, in order; each of the same text.
        steps: the training step of each.
        draws: bootstrap samples of documents.
        seed: of the draws.

    Raises:
        DataError: there are fewer than two, the steps do not rise, or the traces differ in text
            or in the shape of the model.
    """
    if len(traces) < 2 or len(traces) != len(steps):
        raise DataError(
            f"saturation compares checkpoints, but there are {len(traces)} traces and "
            f"{len(steps)} steps; give at least two traces, and one step for each"
        )
    if any(here >= there for here, there in pairwise(steps)):
        raise DataError(f"the steps {list(steps)} do not rise; give the traces in their order")
    last, num_experts = traces[-1], traces[-1].subject.num_experts
    for trace, step in zip(traces[:-1], steps[:-1], strict=True):
        _require_same_text(trace, last, f"step {step}", f"step {steps[-1]}")
    domain_P = document_domains(last)
    weights_ZP = pooled_weights(domain_P, draws, seed)
    chosen_TL = (last.experts_TLK < num_experts).sum(axis=2)
    chosen_PL = document_sums(chosen_TL, last.document_T, len(domain_P))
    chosen_L, chosen_ZL = chosen_PL.sum(axis=0), weights_ZP @ chosen_PL
    shares, samples, loads = [], [], []
    all_T = np.zeros(len(last.tokens_T), dtype=np.int64)
    last_LE = last.counts(all_T, 1)[:, 0]
    for trace in traces:
        shared_PL = document_sums(_shared(trace, last), last.document_T, len(domain_P))
        shares.append(shared_PL.sum(axis=0) / chosen_L)
        samples.append((weights_ZP @ shared_PL) / chosen_ZL)
        pairs_L = (trace.counts(all_T, 1)[:, 0] * last_LE).sum(axis=1) / len(all_T)
        loads.append(pairs_L / chosen_L)
    return Saturation(
        steps_J=np.array(steps, dtype=np.int64),
        moe_layers=last.subject.moe_layers,
        share_JL=np.stack(shares),
        interval_JL2=np.stack([interval(share_ZL) for share_ZL in samples]),
        mean_J=np.array([share_L.mean() for share_L in shares]),
        mean_interval_J2=np.stack([interval(share_ZL.mean(axis=1)) for share_ZL in samples]),
        random=float(chosen_TL.mean() / num_experts),
        loads_JL=np.stack(loads),
        documents=int((domain_P >= 0).sum()),
    )


def _require_same_text(here: Trace, there: Trace, name: str, other: str) -> None:
    """Refuse two traces that cannot be compared token by token; messages use the two names.

    Raises:
        DataError: the models differ in shape, or the texts in their tokens, documents or order.
    """
    first, second = (
        each.subject._replace(name="", fingerprint="", top_k=0) for each in (here, there)
    )
    if first != second:
        raise DataError(
            f"the models at {name} and {other} differ: {len(first.moe_layers)} and "
            f"{len(second.moe_layers)} mixture layers of {first.num_experts} and "
            f"{second.num_experts} experts; give checkpoints of one run"
        )
    same = (
        np.array_equal(here.tokens_T, there.tokens_T)
        and np.array_equal(here.length_N, there.length_N)
        and here.names_N == there.names_N
    )
    if not same:
        raise DataError(
            f"the traces of {name} and {other} are not of the same text ({len(here.tokens_T)} "
            f"tokens in {len(here.length_N)} sequences, and {len(there.tokens_T)} in "
            f"{len(there.length_N)}); record both with the same texts in the same order"
        )


def _shared(trace: Trace, last: Trace) -> Ints:
    """How many experts each token has in both. [T, L]."""
    shared_TL = np.zeros(trace.experts_TLK.shape[:2], dtype=np.int64)
    for place in range(last.experts_TLK.shape[2]):
        wanted_TL1 = last.experts_TLK[:, :, place : place + 1]
        found_TL = (trace.experts_TLK == wanted_TL1).any(axis=2)
        shared_TL += found_TL & (wanted_TL1[..., 0] < last.subject.num_experts)
    return shared_TL
