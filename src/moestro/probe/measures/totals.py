"""Sums over documents of what a trace records, and what is measured of weighted documents.

Letters beside those of docs/shapes.md: P documents, Z random draws.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moestro.probe.measures.bootstrap import Floats, Ints, document_sums, shares
from moestro.probe.recording.traces import Trace


class Totals(NamedTuple):
    """Sums over each document's tokens; each method is a statistic, by weights of documents.

    A weight is how often a document counts: [Z, P] gives a statistic of [Z, L].
    """

    counts_PLE: Floats  # assignments, before any drop
    lost_PL: Floats  # assignments that found no room
    entropy_PL: Floats  # of the router's probabilities, in nats
    margin_PL: Floats
    probs_PLE: Floats  # the router's probabilities
    tokens_P: Floats

    @property
    def most(self) -> float:
        """The largest possible entropy, log E; 1 for a single expert, whose entropy is 0."""
        num_experts = self.counts_PLE.shape[-1]
        return float(np.log(num_experts)) if num_experts > 1 else 1.0

    def only(self, which_Q: Ints) -> Totals:
        """Those of some documents."""
        return Totals(*(each[which_Q] for each in self))

    def load(self, weights_ZP: Floats) -> Floats:
        """Share of the assignments on each expert. [Z, L, E]."""
        return shares(np.tensordot(weights_ZP, self.counts_PLE, 1))

    def dropped(self, weights_ZP: Floats) -> Floats:
        """Share of the assignments that found no room."""
        all_ZL = np.maximum(weights_ZP @ self.counts_PLE.sum(axis=2), 1)
        lost_ZL: Floats = weights_ZP @ self.lost_PL / all_ZL
        return lost_ZL

    def balance(self, weights_ZP: Floats) -> Floats:
        """Entropy of the probabilities averaged over tokens, as a share of log E."""
        return entropy_of(shares(np.tensordot(weights_ZP, self.probs_PLE, 1))) / self.most

    def spread(self, weights_ZP: Floats) -> Floats:
        """Mean entropy of a token's probabilities, as a share of log E."""
        return self.mean(weights_ZP, self.entropy_PL) / self.most

    def margin(self, weights_ZP: Floats) -> Floats:
        """Mean lead of the last chosen expert over the next one."""
        return self.mean(weights_ZP, self.margin_PL)

    def mean(self, weights_ZP: Floats, sums_PL: Floats) -> Floats:
        """Sums over documents as a mean over tokens."""
        mean_ZL: Floats = (weights_ZP @ sums_PL) / (weights_ZP @ self.tokens_P)[:, None]
        return mean_ZL


def totals(trace: Trace) -> Totals:
    """Sum what a trace records over the tokens of each of its documents."""
    documents, document_T = len(trace.documents), trace.document_T
    lost_TL = np.zeros(trace.experts_TLK.shape[:2])
    if trace.kept_TLK is not None:
        lost_TL = (~trace.kept_TLK & (trace.experts_TLK < trace.subject.num_experts)).sum(axis=2)
    probs_NLE = trace.probs_NLE * trace.length_N[:, None, None]
    return Totals(
        counts_PLE=document_counts(trace),
        lost_PL=document_sums(lost_TL, document_T, documents),
        entropy_PL=document_sums(trace.entropy_TL, document_T, documents),
        margin_PL=document_sums(trace.margin_TL, document_T, documents),
        probs_PLE=document_sums(probs_NLE, trace.document_N, documents),
        tokens_P=np.bincount(document_T, minlength=documents).astype(np.float64),
    )


def document_counts(trace: Trace) -> Floats:
    """Assignments, before any drop, by document, layer and expert. [P, L, E]."""
    counts_LPE = trace.counts(trace.document_T, len(trace.documents))
    return counts_LPE.swapaxes(0, 1).astype(np.float64)


def entropy_of(p: Floats) -> Floats:
    """Entropy along the last axis, in nats."""
    surprise: Floats = -np.log(np.where(p > 0, p, 1.0))
    result: Floats = np.where(np.isnan(p).any(axis=-1), np.nan, (p * surprise).sum(axis=-1))
    return result
