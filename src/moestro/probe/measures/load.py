"""Load: how evenly experts are used, by whom, and how sure the router is.

Letters beside those of docs/shapes.md: M domains, P documents, Z random draws.
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
    document_weights,
    interval,
    largest_p_values,
    lonely,
    membership,
    pooled_weights,
    reflected,
    shares,
)
from moestro.probe.measures.totals import Totals, document_counts, totals
from moestro.probe.recording.traces import Trace


class Load(NamedTuple):
    """How evenly the experts of each layer are used, over all domains together.

    The upward bias of sampling is taken off the intervals of imbalance and variation.
    """

    share_LE: Floats  # of the layer's assignments, before any drop; rows sum to 1
    share_interval_LE2: Floats
    imbalance_L: Floats  # largest load over mean load; 1 is perfect balance, E the worst
    imbalance_interval_L2: Floats
    variation_L: Floats  # of the loads: standard deviation over mean
    variation_interval_L2: Floats
    dead_L: tuple[tuple[int, ...], ...]  # the experts that received nothing at all
    # An expert that none of the documents used occurs in less than this share of all such
    # documents (95 %, if they are alike).
    dead_limit: float
    dropped_L: Floats  # share of the assignments that found no room
    dropped_interval_L2: Floats


class DomainTable(NamedTuple):
    """Experts by domain."""

    share_LME: Floats  # of each domain's assignments on each expert; rows sum to 1
    interval_LME2: Floats
    # Whether the cell differs from what dealing whole documents to the domains at random gives,
    # corrected for all cells of all layers (Westfall and Young's largest studentised difference);
    # NaN where there is one domain only.
    p_value_LME: Floats
    supported_LME: Bools  # whether it does at a family-wise rate of 5 %


class Entropy(NamedTuple):
    """Entropy of the router's probabilities, as a share of log E: 0 one expert, 1 all alike.

    Balance is that of the probabilities averaged over tokens: 1 if experts share the work evenly.
    Spread is each token's own, averaged over tokens: 0 if the router is sure of one expert. Both
    over all text, and within each domain.
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

    The mean over tokens, of all text and within each domain; below 0 where a bias or groups
    overrule the probabilities.
    """

    mean_L: Floats
    interval_L2: Floats
    mean_LM: Floats
    interval_LM2: Floats


def load(trace: Trace, *, draws: int = 999, seed: int = 0) -> Load:
    """Load per layer and expert, over all domains together."""
    num_experts, total = trace.subject.num_experts, totals(trace)
    weights_ZP = pooled_weights(document_domains(trace), draws, seed)
    once_1P = np.ones((1, len(total.tokens_P)))
    share_LE, share_ZLE = total.load(once_1P)[0], total.load(weights_ZP)
    imbalance_L, variation_L = _unevenness(share_LE)
    imbalance_ZL, variation_ZL = _unevenness(share_ZLE)
    return Load(
        share_LE=share_LE,
        share_interval_LE2=interval(share_ZLE),
        imbalance_L=imbalance_L,
        imbalance_interval_L2=reflected(imbalance_ZL, imbalance_L, 1.0, num_experts),
        variation_L=variation_L,
        variation_interval_L2=reflected(variation_ZL, variation_L, 0.0, (num_experts - 1) ** 0.5),
        dead_L=tuple(tuple(np.flatnonzero(row_E == 0).tolist()) for row_E in share_LE),
        dead_limit=1 - SIGNIFICANCE ** (1 / len(np.unique(trace.document_N))),
        dropped_L=total.dropped(once_1P)[0],
        dropped_interval_L2=interval(total.dropped(weights_ZP)),
    )


def expert_table(trace: Trace, *, draws: int = 999, seed: int = 0) -> DomainTable:
    """Share of each domain's assignments on each expert, and which cells are beyond chance.

    Chance: whole documents are dealt to the domains at random, each domain keeping its number of
    documents; the only document of a domain stays where it is, and nothing is claimed there.
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
            domain_P[dealt_P], counts_PLE[dealt_P], domains, draws, seed
        )[~alone_M]
    return DomainTable(
        share_LME=share_MLE.swapaxes(0, 1),
        interval_LME2=ends_ML.swapaxes(0, 1),
        p_value_LME=p_value_MLE.swapaxes(0, 1),
        supported_LME=np.nan_to_num(p_value_MLE, nan=1.0).swapaxes(0, 1) <= SIGNIFICANCE,
    )


def entropy(trace: Trace, *, draws: int = 999, seed: int = 0) -> Entropy | None:
    """Entropy of the mean probabilities (balance), and mean of each token's own (spread).

    None where the trace does not know the router's probabilities; where it knows them by token
    only, as of sequences that lost a part, the balance is NaN.
    """
    if np.isnan(trace.entropy_TL).all():
        return None
    return Entropy(
        *_by_domain(trace, Totals.balance, draws, seed),
        *_by_domain(trace, Totals.spread, draws, seed),
    )


def margin(trace: Trace, *, draws: int = 999, seed: int = 0) -> Margin | None:
    """Mean lead of the last chosen expert over the next; None where unknown."""
    if np.isnan(trace.margin_TL).all():
        return None
    return Margin(*_by_domain(trace, Totals.margin, draws, seed, -1.0))


def _unevenness(share: Floats) -> tuple[Floats, Floats]:
    """Largest over mean, and standard deviation over mean, along the last axis."""
    num_experts = share.shape[-1]
    return share.max(axis=-1) * num_experts, share.std(axis=-1) * num_experts


def _by_domain(
    trace: Trace,
    statistic: Callable[[Totals, Floats], Floats],
    draws: int,
    seed: int,
    low: float = 0.0,
) -> tuple[Floats, Floats, Floats, Floats]:
    """A statistic of all documents, [L] and [L, 2], and of each domain's, [L, M] and [L, M, 2]."""
    total, domain_P, domains = totals(trace), document_domains(trace), len(trace.domains)

    def measured(own_Q: Ints, weights_ZP: Floats) -> tuple[Floats, Floats]:
        own = total.only(own_Q)
        value_L = statistic(own, np.ones((1, len(own_Q))))[0]
        return value_L, reflected(statistic(own, weights_ZP[:, own_Q]), value_L, low)

    together = measured(np.flatnonzero(domain_P >= 0), pooled_weights(domain_P, draws, seed))
    weights_ZP = document_weights(domain_P, draws, seed)
    apart_LM = np.full((len(together[0]), domains), np.nan)
    ends_LM2 = np.full((*apart_LM.shape, 2), np.nan)
    for domain in np.unique(domain_P[domain_P >= 0]):
        own_Q = np.flatnonzero(domain_P == domain)
        apart_LM[:, domain], ends_LM2[:, domain] = measured(own_Q, weights_ZP)
    ends_LM2[:, lonely(domain_P, domains)] = np.nan
    return *together, apart_LM, ends_LM2


def _cells(domain_P: Ints, counts_PLE: Floats, domains: int, draws: int, seed: int) -> Floats:
    """Corrected p-value of each cell's distance from random deals, by the largest of any cell.

    The deal that was measured is one of them: if the others alone said where the middle is and how
    far is far, it would lie farther out than they do by chance, the more so the fewer they are.
    """
    member_MP = membership(domain_P, domains)
    share_MLE = shares(np.tensordot(member_MP, counts_PLE, 1))

    def deals() -> Iterator[Floats]:
        rng = np.random.default_rng(seed)
        for _ in range(draws):
            yield shares(np.tensordot(rng.permutation(member_MP, axis=1), counts_PLE, 1))

    # Two passes over the same deals: all of them together would not fit for a large model.
    total_MLE, squares_MLE = share_MLE.copy(), np.square(share_MLE)
    for dealt_MLE in deals():
        total_MLE += dealt_MLE
        squares_MLE += np.square(dealt_MLE)
    mean_MLE = total_MLE / (draws + 1)
    scale_MLE = np.sqrt(np.maximum(squares_MLE / (draws + 1) - np.square(mean_MLE), 0))
    varies_MLE = scale_MLE > 1e-9
    scale_MLE = np.where(varies_MLE, scale_MLE, 1.0)

    def far(other_MLE: Floats) -> Floats:
        return np.where(varies_MLE, np.abs(other_MLE - mean_MLE) / scale_MLE, 0.0)

    return largest_p_values(np.array([far(dealt).max() for dealt in deals()]), far(share_MLE))
