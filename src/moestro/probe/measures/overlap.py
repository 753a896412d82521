"""Overlap: experts that take the same tokens, within a layer and from one layer to the next.

Letters beside those of docs/shapes.md: P documents, Z random draws.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moestro.errors import MoestroError
from moestro.probe.measures.bootstrap import (
    SIGNIFICANCE,
    Floats,
    Ints,
    document_domains,
    interval,
    largest_p_values,
    pooled_weights,
    signs,
)
from moestro.probe.measures.totals import entropy_of
from moestro.probe.recording.traces import Trace


class Pair(NamedTuple):
    """Two experts that are chosen together more, or less, often than their loads predict."""

    layer: int  # index into the trace's mixture layers
    experts: tuple[int, int]
    together: float  # share of the layer's tokens that chose both
    independent: float  # that share if choices were independent at the same loads
    ratio: float  # together / independent
    low: float  # of its 95 % interval
    high: float


class Coactivation(NamedTuple):
    """How often the experts of a layer are chosen for the same token."""

    # N_ij / N_i: of the tokens of expert i, the share that chose j too (OLMoE); NaN on the
    # diagonal and for an expert without tokens.
    given_LEE: Floats
    # The same if a token's experts were chosen independently at the same loads, save that no
    # expert is chosen twice.
    independent_LEE: Floats
    ratio_LEE: Floats  # given / independent, symmetric
    ratio_interval_LEE2: Floats
    p_value_LEE: Floats  # whether the ratio is not 1, corrected for all pairs of all layers
    pairs: tuple[Pair, ...]  # beyond chance at a family-wise rate of 5 %, largest ratio first


class LayerOverlap(NamedTuple):
    """What a layer's first choice says about the next layer's. Arrays have one row less than L."""

    # Mutual information of the first choices of mixture layers l and l + 1 over the mean of their
    # entropies, the bias of finite text taken off: 0 independent, 1 each determines the other.
    information_L: Floats
    interval_L2: Floats
    chance_L: Floats  # that bias: what is left when the tokens of one layer are shuffled


class _Pairs(NamedTuple):
    """Pairs of one layer's experts. [E, E], except `largest_Z`."""

    both_EE: Floats  # tokens that chose both; the expert's own tokens on the diagonal
    expected_EE: Floats  # as many if choices were independent
    error_EE: Floats  # standard error of the difference
    apart_EE: Floats  # the difference, studentised
    largest_Z: Floats  # the largest of any pair in each draw of the null


def coactivation(trace: Trace, *, draws: int = 199, seed: int = 0) -> Coactivation:
    """Pairs of experts chosen for the same token, beside independent choice at the same loads.

    Independent: of all laws by which a token may choose K different experts and which give every
    expert the load that it has, the one of largest entropy. Experts that the same documents or
    the same tokens use are not independent in this sense. Noise is over documents: the null
    draws a random sign for each document's part of the difference.

    Raises:
        MoestroError: there is one expert per token, or the experts chose (expert choice).
    """
    if trace.subject.top_k < 2:
        raise MoestroError(
            "co-activation is about the experts of one token, of which this model has "
            f"{trace.subject.top_k or 'a varying number (expert choice)'}; probe a token-choice "
            "model with two experts per token or more"
        )
    sign_ZP = signs(len(trace.documents), draws, seed)
    layers = [_pairs(trace, layer, sign_ZP) for layer in range(trace.experts_TLK.shape[1])]
    both, expected, error, apart = (
        np.stack([each[field] for each in layers]) for field in range(4)
    )
    load_LE = np.diagonal(both, axis1=1, axis2=2)
    load_LE1 = np.where(load_LE > 0, load_LE, np.nan)[..., None]
    off_EE = np.where(np.eye(both.shape[1], dtype=np.bool_), np.nan, 1.0)
    expected = np.where(expected > 0, expected, np.nan) * off_EE
    ratio, half = both / expected, 1.96 * error / expected
    p_value = largest_p_values(np.max([each.largest_Z for each in layers], axis=0), apart)
    p_value = np.where(np.isnan(ratio), np.nan, p_value)
    ends = np.stack((np.maximum(ratio - half, 0), ratio + half), axis=-1)
    return Coactivation(
        given_LEE=both * off_EE / load_LE1,
        independent_LEE=expected / load_LE1,
        ratio_LEE=ratio,
        ratio_interval_LEE2=ends,
        p_value_LEE=p_value,
        pairs=_standing_out(p_value, both, expected, ends, len(trace.tokens_T)),
    )


def layer_overlap(trace: Trace, *, draws: int = 199, seed: int = 0) -> LayerOverlap:
    """Mutual information of the first choices of neighbouring mixture layers.

    Raises:
        MoestroError: there is one mixture layer only, or the experts chose (expert choice).
    """
    layers = trace.experts_TLK.shape[1]
    if trace.subject.top_k == 0 or layers < 2:
        raise MoestroError(
            "overlap between layers compares the first choices of neighbouring mixture layers, but "
            + ("there is one only" if layers < 2 else "under expert choice tokens have none")
        )
    rng = np.random.default_rng(seed)
    weights_ZP = pooled_weights(document_domains(trace), draws, seed)
    weights_ZT = (weights_P[trace.document_T] for weights_P in weights_ZP)
    samples_ZL = np.stack([_neighbours(trace, weights_T) for weights_T in weights_ZT])
    measured_L = _neighbours(trace, np.ones(len(trace.tokens_T)))
    shuffled = []
    for _ in range(10):
        mixed_TLK = trace.experts_TLK.copy()
        mixed_TLK[:, 1::2] = rng.permutation(mixed_TLK[:, 1::2])
        shuffled.append(_neighbours(trace._replace(experts_TLK=mixed_TLK), np.ones(len(mixed_TLK))))
    chance_L = np.mean(shuffled, axis=0)
    rest_L = np.where(chance_L < 1, 1 - chance_L, np.nan)
    limits_L2 = interval(samples_ZL)
    ends_L2 = (2 * measured_L[:, None] - limits_L2[:, ::-1]) / rest_L[:, None]
    return LayerOverlap(
        information_L=(measured_L - chance_L) / rest_L,
        interval_L2=np.clip(ends_L2, -1, 1),
        chance_L=chance_L,
    )


def _standing_out(
    p_value: Floats, both: Floats, expected: Floats, ends: Floats, tokens: int
) -> tuple[Pair, ...]:
    """The pairs of experts that are beyond the null, largest ratio first."""
    found = [
        Pair(
            layer=int(at[0]),
            experts=(int(at[1]), int(at[2])),
            together=float(both[at] / tokens),
            independent=float(expected[at] / tokens),
            ratio=float(both[at] / expected[at]),
            low=float(ends[at][0]),
            high=float(ends[at][1]),
        )
        for at in map(tuple, np.argwhere(np.triu(p_value <= SIGNIFICANCE, 1)))
    ]
    return tuple(sorted(found, key=lambda pair: -pair.ratio))


def _pairs(trace: Trace, layer: int, sign_ZP: Floats) -> _Pairs:
    """Count pairs, then again by document, once it is known how many to expect."""
    num_experts, tokens = trace.subject.num_experts, len(trace.tokens_T)
    order = np.argsort(trace.document_T, kind="stable")
    starts = np.searchsorted(trace.document_T[order], np.arange(1, len(trace.documents)))
    parts = np.split(order, starts)
    both_EE = np.zeros((num_experts, num_experts))
    for part in parts:
        both_EE += _together(trace, layer, part)
    expected_EE = _independent(np.diag(both_EE), tokens, trace.subject.top_k)
    load_E = np.maximum(np.diag(both_EE), 1)
    one, other = np.triu_indices(num_experts, 1)
    squares_X, centred_X = np.zeros((2, len(one)))
    sums_ZX = np.zeros((len(sign_ZP), len(one)))
    total_X = (both_EE - expected_EE)[one, other]
    for document, part in enumerate(parts):
        own_EE, size = _together(trace, layer, part), len(part) / tokens
        used_E = np.diag(own_EE) / load_E
        told_X = expected_EE[one, other] * (used_E[one] + used_E[other] - size)
        part_X = own_EE[one, other] - told_X
        squares_X += np.square(part_X)
        centred_X += np.square(part_X - size * total_X)
        sums_ZX += sign_ZP[:, document, None] * part_X
    # Of a pair that hardly occurs the documents show too little noise: not less than that of
    # single tokens at the same loads.
    other_E = 1 - np.diag(both_EE) / tokens
    least_X = expected_EE[one, other] * other_E[one] * other_E[other]
    floor_X = np.maximum(squares_X, least_X)
    scale_X = np.sqrt(np.where(floor_X > 1e-9, floor_X, np.inf))
    documents = sum(len(part) > 0 for part in parts)
    factor = documents / (documents - 1) if documents > 1 else np.nan
    apart_EE, error_EE = np.zeros((2, num_experts, num_experts))
    apart_EE[one, other] = apart_EE[other, one] = np.abs(total_X) / scale_X
    error_EE[one, other] = error_EE[other, one] = np.sqrt(np.maximum(centred_X, least_X) * factor)
    largest_Z = (np.abs(sums_ZX) / scale_X).max(axis=1, initial=0.0)
    return _Pairs(both_EE, expected_EE, error_EE, apart_EE, largest_Z)


def _together(trace: Trace, layer: int, part: Ints) -> Floats:
    """How many of some tokens chose both experts; each expert's own on the diagonal. [E, E]."""
    onehot_TE = np.zeros((len(part), trace.subject.num_experts + 1))
    np.put_along_axis(onehot_TE, trace.experts_TLK[part, layer].astype(np.int64), 1.0, axis=1)
    both_EE: Floats = onehot_TE[:, :-1].T @ onehot_TE[:, :-1]
    return both_EE


def _independent(load_E: Floats, tokens: int, top_k: int) -> Floats:
    """Pairs to expect of independent choice at the same loads; 0 on the diagonal. [E, E].

    The law of K out of E experts in which a set is as likely as the product of its experts'
    factors, which is the one of largest entropy at given loads (conditional Poisson sampling).
    Factors by the iteration of Chen, Dempster and Liu 1994.
    """
    apart_EE = 1.0 - np.eye(len(load_E))
    free_E = (load_E > 0) & (load_E < tokens)
    # An expert of every token is with all others; the rest is a choice of fewer.
    expected = np.where(free_E & free_E[:, None], 0, np.minimum(load_E, load_E[:, None]))
    top_k -= int((load_E == tokens).sum())
    if top_k > 1:
        share_E, apart = load_E[free_E] / tokens, apart_EE[np.ix_(free_E, free_E)]
        factor_E = share_E
        for _ in range(1000):
            whole = _symmetric(factor_E[None], top_k)[0, top_k]
            rest_E = _symmetric(factor_E * apart, top_k)[:, top_k - 1]
            last_E, factor_E = factor_E, share_E * whole / rest_E
            factor_E = factor_E * (top_k / factor_E.sum())
            if np.abs(factor_E - last_E).max() < 1e-7:
                break
        rest_EE = _symmetric(factor_E * apart[:, None] * apart[None], top_k)[..., top_k - 2]
        pairs_EE = np.outer(factor_E, factor_E) * rest_EE
        pairs_EE *= tokens / _symmetric(factor_E[None], top_k)[0, top_k]
        expected[np.ix_(free_E, free_E)] = pairs_EE
    result: Floats = expected * apart_EE
    return result


def _symmetric(factors: Floats, most: int) -> Floats:
    """Elementary symmetric polynomials of degree 0 to `most` of the last axis. [..., most + 1]."""
    sums = np.zeros((*factors.shape[:-1], most + 1))
    sums[..., 0] = 1
    for index in range(factors.shape[-1]):
        sums[..., 1:] += factors[..., index, None] * sums[..., :-1]
    return sums


def _neighbours(trace: Trace, weights_T: Floats) -> Floats:
    """Normalised mutual information of neighbouring layers' first choices. [L − 1]."""
    num_experts, information = trace.subject.num_experts, []
    first_TL = trace.experts_TLK[:, :, 0].astype(np.int64)
    for here_T, there_T in zip(first_TL.T[:-1], first_TL.T[1:], strict=True):
        cell_T = here_T * num_experts + there_T
        joint = np.bincount(cell_T, weights_T, minlength=num_experts * num_experts)
        joint = joint / joint.sum()
        joint_EE = joint.reshape(num_experts, num_experts)
        apart = entropy_of(joint_EE.sum(axis=0)) + entropy_of(joint_EE.sum(axis=1))
        # Two layers that each use one expert only share no information.
        information.append(2 * (apart - entropy_of(joint)) / apart if apart > 0 else 0.0 * apart)
    return np.array(information)
