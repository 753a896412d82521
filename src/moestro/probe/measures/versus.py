"""Two traces side by side: load, entropy and specialisation, with intervals of the differences.

Expert 3 of one model is not expert 3 of another, so only what does not depend on the experts'
numbers is compared. Letters beside those of docs/shapes.md: M domains, P documents that both
traces have, Z draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moestro.errors import DataError
from moestro.probe.measures.bootstrap import (
    SIGNIFICANCE,
    Bools,
    Floats,
    Ints,
    document_weights,
    lonely,
    pooled_weights,
    reflected,
    shares,
)
from moestro.probe.measures.totals import document_counts, totals
from moestro.probe.recording.traces import Trace

Weighted = Callable[[Floats], Floats]


class Quantity(NamedTuple):
    """One measure of two traces; NaN where it is unknown or no interval is possible.

    The measures: imbalance (largest over mean load), variation (standard deviation of the loads
    over their mean), dead (experts without any token), dropped (share of assignments that found no
    room), balance (entropy of the mean probabilities over log E), spread (mean entropy of a
    token's probabilities over log E), margin (mean lead of the last chosen expert) and
    specialisation (mean distance of a domain's use of experts from the average over domains).
    """

    name: str
    first_L: Floats
    second_L: Floats
    first: float  # mean of `first_L`
    second: float
    difference: float  # `second` − `first`
    interval_2: Floats  # of the difference, the bias taken off
    difference_L: Floats  # empty where the traces have different mixture layers
    interval_L2: Floats
    # Whether the means differ beyond what another choice of documents would change, at a rate of
    # 5 % over all quantities together (Bonferroni).
    supported: bool


class Comparison(NamedTuple):
    """Two traces on the documents that both have; pairs are of the first and the second one."""

    names: tuple[str, str]  # what the models were called
    domains: tuple[str, ...]  # of the documents compared
    domains_compared: tuple[str, ...]  # of two documents or more: specialisation is about these
    documents: int  # how many both traces have
    left_out: tuple[int, int]  # how many only one has
    tokens: tuple[int, int]  # of the documents compared
    moe_layers: tuple[tuple[int, ...], tuple[int, ...]]
    loads_LE: tuple[Floats, Floats]  # shares of the assignments, the largest first
    quantities: tuple[Quantity, ...]


def compare(first: Trace, second: Trace, *, draws: int = 999, seed: int = 0) -> Comparison:
    """Compare two models, or two checkpoints of one, on the documents that both traces have.

    Documents are the same if their names and domains are; the tokenizers may differ.

    Raises:
        DataError: they have no document in common.
    """
    documents = [set(trace.names_N) for trace in (first, second)]
    shared = sorted(documents[0] & documents[1])
    if not shared:
        raise DataError(
            f"the traces of {first.subject.name} and {second.subject.name} have no document in "
            f"common ({'; '.join(map(_examples, documents))}); record both with the same texts"
        )
    domains = tuple(dict.fromkeys(domain for domain, _ in shared))
    domain_P = np.array([domains.index(domain) for domain, _ in shared], dtype=np.int64)
    traces = [_only(trace, shared, domains, domain_P) for trace in (first, second)]
    apart_M = ~lonely(domain_P, len(domains))
    measured = [_measures(trace, domain_P, apart_M) for trace in traces]
    pooled_ZP = pooled_weights(domain_P, draws, seed)
    within_ZP = document_weights(domain_P, draws, seed)
    level = 1 - SIGNIFICANCE / (len(measured[0]) - 1)
    quantities = []
    for name, of_first in measured[0].items():
        samples_ZP = within_ZP if name == "specialisation" else pooled_ZP
        if name == "dead":
            samples_ZP = np.full((1, len(shared)), np.nan)
        quantities.append(_quantity(name, of_first, measured[1][name], samples_ZP, level))
    return Comparison(
        names=(first.subject.name, second.subject.name),
        domains=domains,
        domains_compared=tuple(np.array(domains)[apart_M].tolist()),
        documents=len(shared),
        left_out=(len(documents[0]) - len(shared), len(documents[1]) - len(shared)),
        tokens=(len(traces[0].tokens_T), len(traces[1].tokens_T)),
        moe_layers=(first.subject.moe_layers, second.subject.moe_layers),
        loads_LE=(_loads(traces[0]), _loads(traces[1])),
        quantities=tuple(quantities),
    )


def _quantity(
    name: str, of_first: Weighted, of_second: Weighted, samples_ZP: Floats, level: float
) -> Quantity:
    once_1P = np.ones((1, samples_ZP.shape[1]))
    first_L, second_L = of_first(once_1P)[0], of_second(once_1P)[0]
    first_ZL, second_ZL = (
        of(samples_ZP) if np.isfinite(samples_ZP).all() else np.full((1, len(now_L)), np.nan)
        for of, now_L in ((of_first, first_L), (of_second, second_L))
    )
    difference = second_L.mean() - first_L.mean()
    samples_Z = second_ZL.mean(axis=1) - first_ZL.mean(axis=1)
    interval_2 = reflected(samples_Z, difference, -np.inf, np.inf)
    strict_2 = reflected(samples_Z, difference, -np.inf, np.inf, level)
    difference_L, interval_L2 = np.empty(0), np.empty((0, 2))
    if len(first_L) == len(second_L):
        difference_L = second_L - first_L
        interval_L2 = reflected(second_ZL - first_ZL, difference_L, -np.inf, np.inf)
    return Quantity(
        name=name,
        first_L=first_L,
        second_L=second_L,
        first=float(first_L.mean()),
        second=float(second_L.mean()),
        difference=float(difference),
        interval_2=interval_2,
        difference_L=difference_L,
        interval_L2=interval_L2,
        supported=bool(strict_2[0] > 0 or strict_2[1] < 0),
    )


def _measures(trace: Trace, domain_P: Ints, apart_M: Bools) -> dict[str, Weighted]:
    """Each measure by layer, as a function of the weights of documents: [Z, P] → [Z, L]."""
    total, num_experts = totals(trace), trace.subject.num_experts
    own_M = [np.flatnonzero(domain_P == domain) for domain in np.flatnonzero(apart_M)]

    def apart(weights_ZP: Floats) -> Floats:
        if len(own_M) < 2:
            return np.full((len(weights_ZP), total.counts_PLE.shape[1]), np.nan)
        parts = np.array_split(weights_ZP, -(-len(weights_ZP) // 64))
        return np.concatenate([_apart(part_ZP, total.counts_PLE, own_M) for part_ZP in parts])

    return {
        "imbalance": lambda weights_ZP: total.load(weights_ZP).max(axis=2) * num_experts,
        "variation": lambda weights_ZP: total.load(weights_ZP).std(axis=2) * num_experts,
        "dead": lambda weights_ZP: (total.load(weights_ZP) == 0).sum(axis=2).astype(np.float64),
        "dropped": total.dropped,
        "balance": total.balance,
        "spread": lambda weights_ZP: total.mean(weights_ZP, total.entropy_PL / total.most),
        "margin": total.margin,
        "specialisation": apart,
    }


def _apart(weights_ZP: Floats, counts_PLE: Floats, own_M: list[Ints]) -> Floats:
    """Mean over domains of the total variation from the mean over domains. [Z, L]."""
    by_domain = (np.tensordot(weights_ZP[:, own], counts_PLE[own], 1) for own in own_M)
    shares_MZLE = np.stack([shares(counts_ZLE) for counts_ZLE in by_domain])
    distance_MZL = 0.5 * np.abs(shares_MZLE - shares_MZLE.mean(axis=0)).sum(axis=-1)
    distance_ZL: Floats = distance_MZL.mean(axis=0)
    return distance_ZL


def _examples(documents: set[tuple[str, str]]) -> str:
    found = sorted({document for _, document in documents})
    return ", ".join(found[:3]) + (" …" if len(found) > 3 else "")


def _only(
    trace: Trace, shared: list[tuple[str, str]], domains: tuple[str, ...], domain_P: Ints
) -> Trace:
    """The sequences of shared documents, numbered as in `shared`."""
    number = {key: index for index, key in enumerate(shared)}
    document_N = np.array([number.get(key, -1) for key in trace.names_N], dtype=np.int64)
    renumbered = trace._replace(
        domains=domains,
        documents=tuple(document for _, document in shared),
        domain_N=domain_P[document_N],
        document_N=document_N,
    )
    return renumbered.choose(document_N >= 0)


def _loads(trace: Trace) -> Floats:
    share_LE = shares(document_counts(trace).sum(axis=0))
    return -np.sort(-share_LE, axis=1)
