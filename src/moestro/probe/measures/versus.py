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
    document_sums,
    document_weights,
    lonely,
    pooled_weights,
    reflected,
    shares,
)
from moestro.probe.measures.load import document_counts, entropy_of
from moestro.probe.recording.traces import Trace

Weighted = Callable[[Floats], Floats]


class Quantity(NamedTuple):
    """One measure of two traces; NaN where it is unknown or no interval is possible.

    Attributes:
        name: imbalance (largest over mean load), variation (standard deviation of the loads over
            their mean), dead (experts without any token), dropped (share of assignments that
            found no room), balance (entropy of the mean probabilities over log E), spread (mean
            entropy of a token's probabilities over log E), margin (mean lead of the last chosen
            expert) or specialisation (mean distance of a domain's use of experts from the average
            over domains).
        first_L: of the first trace, by layer.
        second_L: of the second one.
        first: mean of `first_L`.
        second: mean of `second_L`.
        difference: `second` − `first`.
        interval_2: its 95 % interval, from a bootstrap over documents, the bias taken off.
        difference_L: by layer; empty where the traces have different mixture layers.
        interval_L2: its 95 % intervals.
        supported: whether the means differ beyond what another choice of documents would change,
            at a rate of 5 % over all quantities together (Bonferroni).
    """

    name: str
    first_L: Floats
    second_L: Floats
    first: float
    second: float
    difference: float
    interval_2: Floats
    difference_L: Floats
    interval_L2: Floats
    supported: bool


class Comparison(NamedTuple):
    """Two traces on the documents that both have.

    Attributes:
        names: what the models were called.
        domains: of the documents compared.
        domains_compared: those with at least two documents, which specialisation is about.
        documents: how many both traces have.
        left_out: how many only one has, for each trace.
        tokens: of the documents compared, in each trace.
        moe_layers: of each model.
        loads_LE: shares of the assignments, the largest first, by layer of each model.
        quantities: the measures.
    """

    names: tuple[str, str]
    domains: tuple[str, ...]
    domains_compared: tuple[str, ...]
    documents: int
    left_out: tuple[int, int]
    tokens: tuple[int, int]
    moe_layers: tuple[tuple[int, ...], tuple[int, ...]]
    loads_LE: tuple[Floats, Floats]
    quantities: tuple[Quantity, ...]


def compare(first: Trace, second: Trace, *, draws: int = 999, seed: int = 0) -> Comparison:
    """Compare two models, or two checkpoints of one, on the documents that both traces have.

    Documents are the same if their names and domains are; the tokenizers may differ.

    Args:
        first: of one model.
        second: of the other.
        draws: bootstrap samples of documents.
        seed: of the draws.

    Raises:
        DataError: they have no document in common.
    """
    keys = [_keys(trace) for trace in (first, second)]
    shared = sorted(set(keys[0]) & set(keys[1]))
    if not shared:
        raise DataError(
            f"the traces of {first.subject.name} and {second.subject.name} have no document in "
            f"common ({_examples(keys[0])}; {_examples(keys[1])}); record both with the same texts"
        )
    domains = tuple(dict.fromkeys(domain for domain, _ in shared))
    domain_P = np.array([domains.index(domain) for domain, _ in shared], dtype=np.int64)
    traces = [
        _only(trace, own, shared, domains) for trace, own in zip((first, second), keys, strict=True)
    ]
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
        left_out=(len(set(keys[0])) - len(shared), len(set(keys[1])) - len(shared)),
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
    num_experts, documents = trace.subject.num_experts, len(trace.documents)
    most = np.log(num_experts) if num_experts > 1 else 1.0
    counts_PLE = document_counts(trace)
    total_PL = counts_PLE.sum(axis=2)
    tokens_P = np.bincount(trace.document_T, minlength=documents).astype(np.float64)
    lost_TL = np.zeros(trace.experts_TLK.shape[:2])
    if trace.kept_TLK is not None:
        lost_TL = (~trace.kept_TLK & (trace.experts_TLK < num_experts)).sum(axis=2)
    lost_PL, entropy_PL, margin_PL = (
        document_sums(values_TL, trace.document_T, documents)
        for values_TL in (lost_TL, trace.entropy_TL, trace.margin_TL)
    )
    probs_PLE = np.zeros(counts_PLE.shape)
    np.add.at(probs_PLE, trace.document_N, trace.probs_NLE * trace.length_N[:, None, None])
    own_M = [np.flatnonzero(domain_P == domain) for domain in np.flatnonzero(apart_M)]

    def load(weights_ZP: Floats) -> Floats:
        return shares(np.tensordot(weights_ZP, counts_PLE, 1))

    def apart(weights_ZP: Floats) -> Floats:
        if len(own_M) < 2:
            return np.full((len(weights_ZP), counts_PLE.shape[1]), np.nan)
        parts = np.array_split(weights_ZP, -(-len(weights_ZP) // 64))
        return np.concatenate([_apart(part_ZP, counts_PLE, own_M) for part_ZP in parts])

    def mean(sums_PL: Floats) -> Weighted:
        return lambda weights_ZP: (weights_ZP @ sums_PL) / (weights_ZP @ tokens_P)[:, None]

    return {
        "imbalance": lambda weights_ZP: load(weights_ZP).max(axis=2) * num_experts,
        "variation": lambda weights_ZP: load(weights_ZP).std(axis=2) * num_experts,
        "dead": lambda weights_ZP: (load(weights_ZP) == 0).sum(axis=2).astype(np.float64),
        "dropped": lambda weights_ZP: (weights_ZP @ lost_PL) / (weights_ZP @ total_PL),
        "balance": lambda weights_ZP: (
            entropy_of(shares(np.tensordot(weights_ZP, probs_PLE, 1))) / most
        ),
        "spread": mean(entropy_PL / most),
        "margin": mean(margin_PL),
        "specialisation": apart,
    }


def _apart(weights_ZP: Floats, counts_PLE: Floats, own_M: list[Ints]) -> Floats:
    """Mean over domains of the total variation from the mean over domains. [Z, L]."""
    by_domain = (np.tensordot(weights_ZP[:, own], counts_PLE[own], 1) for own in own_M)
    shares_MZLE = np.stack([shares(counts_ZLE) for counts_ZLE in by_domain])
    distance_MZL = 0.5 * np.abs(shares_MZLE - shares_MZLE.mean(axis=0)).sum(axis=-1)
    distance_ZL: Floats = distance_MZL.mean(axis=0)
    return distance_ZL


def _keys(trace: Trace) -> list[tuple[str, str]]:
    """The names of the domain and the document of each sequence."""
    pairs = zip(trace.domain_N.tolist(), trace.document_N.tolist(), strict=True)
    return [(trace.domains[domain], trace.documents[document]) for domain, document in pairs]


def _examples(keys: list[tuple[str, str]]) -> str:
    found = sorted({document for _, document in keys})
    return ", ".join(found[:3]) + (" …" if len(found) > 3 else "")


def _only(
    trace: Trace,
    own: list[tuple[str, str]],
    shared: list[tuple[str, str]],
    domains: tuple[str, ...],
) -> Trace:
    """The sequences of shared documents, numbered as in `shared`."""
    number = {key: index for index, key in enumerate(shared)}
    document_N = np.array([number.get(key, -1) for key in own], dtype=np.int64)
    domain_N = np.array(
        [domains.index(domain) if domain in domains else -1 for domain, _ in own], dtype=np.int64
    )
    names = tuple(document for _, document in shared)
    renumbered = trace._replace(
        domains=domains, documents=names, domain_N=domain_N, document_N=document_N
    )
    return renumbered.choose(document_N >= 0)


def _loads(trace: Trace) -> Floats:
    share_LE = shares(document_counts(trace).sum(axis=0))
    return -np.sort(-share_LE, axis=1)
