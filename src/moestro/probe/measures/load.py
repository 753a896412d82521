"""Load: how evenly experts are used, by whom, and how sure the router is, with intervals.

Letters beside those of docs/shapes.md: M domains, P documents, Z random draws. All intervals are
of 95 %, from a bootstrap over documents; NaN where a domain has a single document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from moestro.probe.measures.bootstrap import (
    SIGNIFICANCE,
    Bools,
    Floats,
    Ints,
    document_domains,
    document_sums,
    document_weights,
    interval,
    largest_p_values,
    lonely,
    membership,
    pooled_weights,
    reflected,
    shares,
)
from moestro.probe.recording.traces import Trace


class Load(NamedTuple):
    """How evenly the experts of each layer are used, over all domains together.

    Attributes:
        share_LE: each expert's share of the layer's assignments, before any drop; rows sum to 1.
        share_interval_LE2: its interval.
        imbalance_L: largest load over mean load; 1 is perfect balance, E the worst.
        imbalance_interval_L2: its interval, with the upward bias of sampling taken off.
        variation_L: coefficient of variation of the loads: standard deviation over mean.
        variation_interval_L2: its interval, with the upward bias of sampling taken off.
        dead_L: the experts that received nothing at all.
        dead_limit: an expert that none of the documents used occurs in less than this share of
            all such documents (95 %, if they are alike).
        dropped_L: share of the assignments that found no room.
        dropped_interval_L2: its interval.
    """

    share_LE: Floats
    share_interval_LE2: Floats
    imbalance_L: Floats
    imbalance_interval_L2: Floats
    variation_L: Floats
    variation_interval_L2: Floats
    dead_L: tuple[tuple[int, ...], ...]
    dead_limit: float
    dropped_L: Floats
    dropped_interval_L2: Floats


class Table(NamedTuple):
    """Experts by domain.

    Attributes:
        share_LME: share of each domain's assignments on each expert; rows sum to 1.
        interval_LME2: its interval.
        p_value_LME: whether the cell differs from what dealing whole documents to the domains at
            random gives, corrected for all cells of all layers (Westfall and Young's largest
            studentised difference); NaN where there is one domain only.
        supported_LME: whether it does at a family-wise rate of 5 %.
    """

    share_LME: Floats
    interval_LME2: Floats
    p_value_LME: Floats
    supported_LME: Bools


class Entropy(NamedTuple):
    """Entropy of the router's probabilities, as a share of log E: 0 one expert, 1 all alike.

    Attributes:
        balance_L: of the probabilities averaged over tokens: 1 if experts share the work evenly.
        balance_interval_L2: its interval.
        balance_LM: the same within each domain.
        balance_interval_LM2: its interval.
        spread_L: of each token's own, averaged over tokens: 0 if the router is sure of one expert.
        spread_interval_L2: its interval.
        spread_LM: the same within each domain.
        spread_interval_LM2: its interval.
    """

    balance_L: Floats
    balance_interval_L2: Floats
    balance_LM: Floats
    balance_interval_LM2: Floats
    spread_L: Floats
    spread_interval_L2: Floats
    spread_LM: Floats
    spread_interval_LM2: Floats


class Margin(NamedTuple):
    """How far the least likely chosen expert is ahead of the next one, in probability.

    Attributes:
        mean_L: mean over tokens; below 0 where a bias or groups overrule the probabilities.
        interval_L2: its interval.
        mean_LM: the same within each domain.
        interval_LM2: its interval.
    """

    mean_L: Floats
    interval_L2: Floats
    mean_LM: Floats
    interval_LM2: Floats


def load(trace: Trace, *, draws: int = 999, seed: int = 0) -> Load:
    """Load per layer and expert, over all domains together.

    Args:
        trace: of the routing.
        draws: bootstrap samples behind the intervals.
        seed: of those draws.
    """
    num_experts = trace.subject.num_experts
    counts_PLE = document_counts(trace)
    weights_ZP = pooled_weights(document_domains(trace), draws, seed)
    share_LE = shares(counts_PLE.sum(axis=0))
    share_ZLE = shares(np.tensordot(weights_ZP, counts_PLE, 1))
    imbalance_L, variation_L = _unevenness(share_LE)
    imbalance_ZL, variation_ZL = _unevenness(share_ZLE)
    lost_PL = np.zeros(counts_PLE.shape[:2])
    if trace.kept_TLK is not None:
        lost_TL = (~trace.kept_TLK & (trace.experts_TLK < num_experts)).sum(axis=2)
        lost_PL = document_sums(lost_TL, trace.document_T, len(trace.documents))
    all_PL = counts_PLE.sum(axis=2)
    used = len(np.unique(trace.document_N))
    return Load(
        share_LE=share_LE,
        share_interval_LE2=interval(share_ZLE),
        imbalance_L=imbalance_L,
        imbalance_interval_L2=reflected(imbalance_ZL, imbalance_L, 1.0, num_experts),
        variation_L=variation_L,
        variation_interval_L2=reflected(variation_ZL, variation_L, 0.0, (num_experts - 1) ** 0.5),
        dead_L=tuple(tuple(np.flatnonzero(row_E == 0).tolist()) for row_E in share_LE),
        dead_limit=1 - SIGNIFICANCE ** (1 / used),
        dropped_L=lost_PL.sum(axis=0) / np.maximum(all_PL.sum(axis=0), 1),
        dropped_interval_L2=interval(weights_ZP @ lost_PL / np.maximum(weights_ZP @ all_PL, 1)),
    )


def expert_table(trace: Trace, *, draws: int = 999, seed: int = 0) -> Table:
    """Share of each domain's assignments on each expert, and which cells are beyond chance.

    Chance: whole documents are dealt to the domains at random, each domain keeping its number of
    documents; the only document of a domain stays where it is, and nothing is claimed there.

    Args:
        trace: of the routing.
        draws: bootstrap samples, and random deals.
        seed: of those draws.
    """
    domain_P, domains = document_domains(trace), len(trace.domains)
    counts_PLE = document_counts(trace)
    alone_M = lonely(domain_P, domains)
    share_MLE = shares(np.tensordot(membership(domain_P, domains), counts_PLE, 1))
    ends_ML = np.full((*share_MLE.shape, 2), np.nan)
    weights_ZP = document_weights(domain_P, draws, seed)
    for domain in np.flatnonzero(~alone_M):
        own_P = domain_P == domain
        ends_ML[domain] = interval(shares(np.tensordot(weights_ZP[:, own_P], counts_PLE[own_P], 1)))
    p_value_MLE = np.full_like(share_MLE, np.nan)
    if (~alone_M).sum() > 1:
        dealt_P = (domain_P >= 0) & ~np.isin(domain_P, np.flatnonzero(alone_M))
        p_value_MLE[~alone_M] = _cells(
            domain_P[dealt_P], counts_PLE[dealt_P], share_MLE, draws, seed
        )[~alone_M]
    return Table(
        share_LME=share_MLE.swapaxes(0, 1),
        interval_LME2=ends_ML.swapaxes(0, 1),
        p_value_LME=p_value_MLE.swapaxes(0, 1),
        supported_LME=np.nan_to_num(p_value_MLE, nan=1.0).swapaxes(0, 1) <= SIGNIFICANCE,
    )


def entropy(trace: Trace, *, draws: int = 999, seed: int = 0) -> Entropy | None:
    """Entropy of the mean probabilities (balance), and mean of each token's own (spread).

    None where the trace does not know the router's probabilities; where it knows them by token
    only, as of sequences that lost a part, the balance is NaN. Arguments as for `load`.
    """
    if np.isnan(trace.entropy_TL).all():
        return None
    most = np.log(trace.subject.num_experts) if trace.subject.num_experts > 1 else 1.0
    layers, documents = len(trace.subject.moe_layers), len(trace.documents)
    total_NLE = trace.probs_NLE * trace.length_N[:, None, None].astype(np.float64)
    total_PLE = np.zeros((documents, layers, trace.subject.num_experts))
    np.add.at(total_PLE, trace.document_N, total_NLE)
    own_PL = document_sums(trace.entropy_TL, trace.document_T, documents)
    tokens_P = np.bincount(trace.document_T, minlength=documents).astype(np.float64)

    def balance(weights_ZQ: Floats, own_Q: Ints) -> Floats:
        return entropy_of(shares(np.tensordot(weights_ZQ, total_PLE[own_Q], 1))) / most

    def spread(weights_ZQ: Floats, own_Q: Ints) -> Floats:
        return _means(weights_ZQ, own_PL[own_Q], tokens_P[own_Q]) / most

    balanced = _both(trace, balance, draws, seed)
    spreads = _both(trace, spread, draws, seed)
    return Entropy(*balanced, *spreads)


def margin(trace: Trace, *, draws: int = 999, seed: int = 0) -> Margin | None:
    """Mean lead of the last chosen expert over the next; None where unknown. See `load`."""
    if np.isnan(trace.margin_TL).all():
        return None
    documents = len(trace.documents)
    own_PL = document_sums(trace.margin_TL, trace.document_T, documents)
    tokens_P = np.bincount(trace.document_T, minlength=documents).astype(np.float64)

    def mean(weights_ZQ: Floats, own_Q: Ints) -> Floats:
        return _means(weights_ZQ, own_PL[own_Q], tokens_P[own_Q])

    return Margin(*_both(trace, mean, draws, seed, -1.0))


def document_counts(trace: Trace) -> Floats:
    """Assignments, before any drop, by document, layer and expert. [P, L, E]."""
    counts_LPE = trace.counts(trace.document_T, len(trace.documents))
    return counts_LPE.swapaxes(0, 1).astype(np.float64)


def entropy_of(p: Floats) -> Floats:
    """Entropy along the last axis, in nats."""
    surprise: Floats = -np.log(np.where(p > 0, p, 1.0))
    result: Floats = np.where(np.isnan(p).any(axis=-1), np.nan, (p * surprise).sum(axis=-1))
    return result


def _unevenness(share: Floats) -> tuple[Floats, Floats]:
    """Largest over mean, and standard deviation over mean, along the last axis."""
    num_experts = share.shape[-1]
    return share.max(axis=-1) * num_experts, share.std(axis=-1) * num_experts


def _means(weights_ZP: Floats, sums_PL: Floats, tokens_P: Floats) -> Floats:
    tokens_Z1: Floats = np.maximum(weights_ZP @ tokens_P, 1)[:, None]
    return (weights_ZP @ sums_PL) / tokens_Z1


def _both(
    trace: Trace, of: Callable[[Floats, Ints], Floats], draws: int, seed: int, low: float = 0.0
) -> tuple[Floats, Floats, Floats, Floats]:
    """A measure of some documents by their weights, over all domains and for each of them.

    Args:
        trace: of the routing.
        of: from weights [Z, Q] and the numbers of the Q documents to the measure [Z, L].
        draws: bootstrap samples.
        seed: of the draws.
        low: the smallest possible value.

    Returns: the value [L], its interval [L, 2], and by domain the values [L, M] and theirs.
    """
    domain_P, domains = document_domains(trace), len(trace.domains)
    there_Q = np.flatnonzero(domain_P >= 0)
    together_L = of(np.ones((1, len(there_Q))), there_Q)[0]
    drawn_ZL = of(pooled_weights(domain_P, draws, seed)[:, there_Q], there_Q)
    alone_M, weights_ZP = lonely(domain_P, domains), document_weights(domain_P, draws, seed)
    apart_ML = np.full((domains, len(together_L)), np.nan)
    ends_ML2 = np.full((*apart_ML.shape, 2), np.nan)
    for domain in np.unique(domain_P[there_Q]):
        own_Q = np.flatnonzero(domain_P == domain)
        apart_ML[domain] = of(np.ones((1, len(own_Q))), own_Q)[0]
        if not alone_M[domain]:
            samples_ZL = of(weights_ZP[:, own_Q], own_Q)
            ends_ML2[domain] = reflected(samples_ZL, apart_ML[domain], low)
    ends_L2 = reflected(drawn_ZL, together_L, low)
    return together_L, ends_L2, apart_ML.T, ends_ML2.swapaxes(0, 1)


def _cells(domain_P: Ints, counts_PLE: Floats, share_MLE: Floats, draws: int, seed: int) -> Floats:
    """Corrected p-value of each cell's distance from random deals, by the largest of any cell."""
    member_MP = membership(domain_P, len(share_MLE))

    def deals() -> Iterator[Floats]:
        rng = np.random.default_rng(seed)
        for _ in range(draws):
            yield shares(np.tensordot(rng.permutation(member_MP, axis=1), counts_PLE, 1))

    # Two passes over the same deals: all of them at once would not fit for a large model.
    total_MLE, squares_MLE = np.zeros_like(share_MLE), np.zeros_like(share_MLE)
    for dealt_MLE in deals():
        total_MLE += dealt_MLE
        squares_MLE += np.square(dealt_MLE)
    mean_MLE = total_MLE / draws
    scale_MLE = np.sqrt(np.maximum(squares_MLE / draws - np.square(mean_MLE), 0))
    varies_MLE = scale_MLE > 1e-9
    scale_MLE = np.where(varies_MLE, scale_MLE, 1.0)

    def far(other_MLE: Floats) -> Floats:
        return np.where(varies_MLE, np.abs(other_MLE - mean_MLE) / scale_MLE, 0.0)

    return largest_p_values(np.array([far(dealt).max() for dealt in deals()]), far(share_MLE))
