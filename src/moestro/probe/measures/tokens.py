"""Tokens and experts: each expert's most typical tokens, and what token identity explains.

Letters beside those of docs/shapes.md: P documents, X ranks, J predictors, Z random draws.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from moestro.errors import MoestroError
from moestro.probe.measures.bootstrap import (
    SIGNIFICANCE,
    Bools,
    Floats,
    Ints,
    document_domains,
    document_sums,
    interval,
    pooled_weights,
)
from moestro.probe.recording.traces import Trace

PREDICTORS = ("token", "previous token", "next token", "position")


class TypicalTokens(NamedTuple):
    """The token ids that lean most to each expert, the surest first."""

    token_LEX: Ints  # token id; −1 in an empty place
    count_LEX: Ints  # its occurrences in the trace
    rate_LEX: Floats  # share of its occurrences that this expert took; NaN in an empty place
    lift_LEX: Floats  # that rate over the expert's rate for all tokens
    # Lower bound of the lift (95 %, one-sided, corrected for all tokens and experts of the layer);
    # the ids are ordered by it.
    low_LEX: Floats
    supported_LEX: Bools  # whether it is above 1: the token really leans to the expert
    min_count: int  # ids with fewer occurrences were left out


class Explained(NamedTuple):
    """How well a token's first choice can be predicted.

    Each predictor names the most frequent expert for its value (for example for the token id) in
    one half of the documents and is tested on the other half, and the other way round; a value
    that the other half does not have gets that half's most frequent expert.
    """

    predictors: tuple[str, ...]
    majority_L: Floats  # share of first choices right by always naming the most frequent expert
    majority_interval_L2: Floats
    accuracy_LJ: Floats  # share right by each predictor
    accuracy_interval_LJ2: Floats
    # Share of what the most frequent expert leaves that the predictor gets right: accuracy less
    # majority over 1 less majority; below 0 where it does worse.
    explained_LJ: Floats
    explained_interval_LJ2: Floats
    unseen_J: Floats  # share of tokens whose value does not occur in the other half


class TokenTable(NamedTuple):
    """One layer's experts by token id."""

    token_U: Ints  # the ids that occur, rising
    count_U: Ints
    counts_UE: Ints  # how many of them each expert took, before any drop


def token_table(trace: Trace, layer: int) -> TokenTable:
    """Count which experts of a mixture layer (its index in the trace) took which token ids."""
    token_U, id_T, count_U = np.unique(trace.tokens_T, return_inverse=True, return_counts=True)
    counts_UE = _counts(trace, layer, id_T, len(token_U))
    return TokenTable(token_U.astype(np.int64), count_U, counts_UE)


def typical_tokens(trace: Trace, *, ranks: int = 12, min_count: int = 8) -> TypicalTokens:
    """The token ids that each expert takes more often than it takes other tokens.

    The bound of the rate is Wilson's for as many observations as there are documents with the
    token, or fewer where some hold most of its occurrences (Kish: n² / Σ n_d²): what one document
    does with a token may be that document's habit. The expert's rate for all tokens is far surer
    and taken as known. At most `ranks` tokens of each expert are kept; ids with fewer occurrences
    than `min_count` are left out.
    """
    token_U, id_T, count_U = np.unique(trace.tokens_T, return_inverse=True, return_counts=True)
    cells, count_C = np.unique(id_T * len(trace.documents) + trace.document_T, return_counts=True)
    squares_U = np.bincount(cells // len(trace.documents), np.square(count_C))
    chosen_U = count_U >= min_count
    token_U, pieces_U1 = token_U[chosen_U], (np.square(count_U) / squares_U)[chosen_U, None]
    num_experts = trace.subject.num_experts
    shape = (len(trace.subject.moe_layers), num_experts, ranks)
    token, count = np.full(shape, -1), np.zeros(shape, dtype=np.int64)
    rate, lift, low = np.full((3, *shape), np.nan)
    z = NormalDist().inv_cdf(1 - SIGNIFICANCE / max(len(token_U) * num_experts, 2))
    for layer in range(shape[0]):
        counts_UE = _counts(trace, layer, id_T, len(chosen_U))
        usual_E = counts_UE.sum(axis=0) / len(trace.tokens_T)
        rate_UE = counts_UE[chosen_U] / count_U[chosen_U, None]
        low_UE = _wilson_low(rate_UE, pieces_U1, z)
        for expert in np.flatnonzero(usual_E > 0):
            # Of equal bounds the more frequent token comes first.
            best = np.lexsort((-count_U[chosen_U], -low_UE[:, expert]))[:ranks]
            best = best[rate_UE[best, expert] > 0]
            at = (layer, expert, slice(len(best)))
            token[at], count[at] = token_U[best], count_U[chosen_U][best]
            rate[at] = rate_UE[best, expert]
            lift[at], low[at] = rate[at] / usual_E[expert], low_UE[best, expert] / usual_E[expert]
    return TypicalTokens(token, count, rate, lift, low, low > 1, min_count)


def explained(trace: Trace, *, draws: int = 999, seed: int = 0) -> Explained:
    """Predict first choices from token ids, neighbours and positions, in documents not fitted to.

    Positions are in classes that double: 0, 1, 2 to 3, 4 to 7, and so on. The first token of a
    sequence has no previous token and the last no next one; that is a value of its own.

    Raises:
        MoestroError: it is of expert choice, or there is one document only.
    """
    domain_P = document_domains(trace)
    if trace.subject.top_k == 0:
        raise MoestroError(
            "first choices are predicted from tokens, but under expert choice the experts choose; "
            "probe a token-choice model for it"
        )
    if (domain_P >= 0).sum() < 2:
        raise MoestroError(
            "predictors are fitted on some documents and tested on others, but there is one "
            "document only; give at least two"
        )
    half_T = _halves(domain_P, seed)[trace.document_T]
    weights_ZP = pooled_weights(domain_P, draws, seed)
    tokens_P = np.bincount(trace.document_T, minlength=len(domain_P)).astype(np.float64)
    right, unseen = [], []
    for value_T in [np.zeros_like(half_T), *_predictors(trace)]:
        guess_TL, seen_T = _guesses(trace, value_T, half_T)
        hit_TL = guess_TL == trace.experts_TLK[:, :, 0]
        right.append(document_sums(hit_TL, trace.document_T, len(domain_P)))
        unseen.append(1 - seen_T.mean())
    right_PLJ = np.stack(right, axis=-1)
    share_LJ = right_PLJ.sum(axis=0) / tokens_P.sum()
    share_ZLJ = np.tensordot(weights_ZP, right_PLJ, 1) / (weights_ZP @ tokens_P)[:, None, None]
    ends_LJ2 = interval(share_ZLJ)
    return Explained(
        predictors=PREDICTORS,
        majority_L=share_LJ[:, 0],
        majority_interval_L2=ends_LJ2[:, 0],
        accuracy_LJ=share_LJ[:, 1:],
        accuracy_interval_LJ2=ends_LJ2[:, 1:],
        explained_LJ=_beyond_majority(share_LJ),
        explained_interval_LJ2=interval(_beyond_majority(share_ZLJ)),
        unseen_J=np.array(unseen[1:]),
    )


def _wilson_low(rate: Floats, observations: Floats, z: float) -> Floats:
    """Lower end of Wilson's interval of a rate."""
    square = z * z / observations
    spread = np.sqrt(rate * (1 - rate) * square + np.square(square) / 4)
    low: Floats = np.maximum((rate + square / 2 - spread) / (1 + square), 0)
    return low


def _halves(domain_P: Ints, seed: int) -> Ints:
    """0 or 1 for each document: half of each domain's, at random."""
    shuffled_P = np.random.default_rng(seed).permutation(len(domain_P))
    order_P = shuffled_P[np.argsort(domain_P[shuffled_P], kind="stable")]
    order_P = order_P[domain_P[order_P] >= 0]
    half_P = np.zeros(len(domain_P), dtype=np.int64)
    half_P[order_P[1::2]] = 1
    return half_P


def _predictors(trace: Trace) -> list[Ints]:
    """The values from 0 that first choices are predicted from, in the order of `PREDICTORS`."""
    token_T = np.unique(trace.tokens_T, return_inverse=True)[1] + 1
    position_T = trace.position_T
    previous_T = np.where(position_T == 0, 0, np.roll(token_T, 1))
    next_T = np.where(np.roll(position_T, -1) == 0, 0, np.roll(token_T, -1))
    place_T = np.ceil(np.log2(position_T + 1)).astype(np.int64)
    return [token_T, previous_T, next_T, place_T]


def _guesses(trace: Trace, value_T: Ints, half_T: Ints) -> tuple[Ints, Bools]:
    """The most frequent first choice of each token's value in the other half. [T, L].

    And whether the value occurs there at all. [T]
    """
    first = trace._replace(experts_TLK=trace.experts_TLK[:, :, :1])
    values, guesses = int(value_T.max()) + 1, []
    for layer in range(len(trace.subject.moe_layers)):
        counts = _counts(first, layer, half_T * values + value_T, 2 * values)
        counts_HVE = counts.reshape(2, values, -1)
        usual_H1 = counts_HVE.sum(axis=1).argmax(axis=-1)[:, None]
        seen_HV = counts_HVE.sum(axis=-1) > 0
        guess_HV = np.where(seen_HV, counts_HVE.argmax(axis=-1), usual_H1)
        guesses.append(guess_HV[1 - half_T, value_T])
    return np.stack(guesses, axis=1), seen_HV[1 - half_T, value_T]


def _counts(trace: Trace, layer: int, group_T: Ints, groups: int) -> Ints:
    """Assignments of one layer by group of tokens and expert. [G, E]."""
    one = trace._replace(experts_TLK=trace.experts_TLK[:, layer : layer + 1])
    counts_GE: Ints = one.counts(group_T, groups)[0]
    return counts_GE


def _beyond_majority(share_J: Floats) -> Floats:
    """Of what the first predictor gets wrong, the share that each other one gets right."""
    wrong_J = 1 - share_J[..., :1]
    better: Floats = (share_J[..., 1:] - share_J[..., :1]) / np.where(wrong_J > 0, wrong_J, np.nan)
    return better
