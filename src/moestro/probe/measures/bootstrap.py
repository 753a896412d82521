"""Noise: documents drawn again, intervals from them, and which of many findings hold together.

A document is the independent piece of text. Letters beside those of docs/shapes.md: P documents,
M domains or labels, Z random draws.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moestro.errors import MoestroError
from moestro.probe.recording.traces import Trace

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
SIGNIFICANCE = 0.05
_TOLERANCE = 1e-12


def document_domains(trace: Trace) -> Ints:
    """The domain of each of the trace's documents, −1 for one without any token. int64 [P].

    Raises:
        MoestroError: a document lies in two domains, so that it is not independent of them.
    """
    domain_P = np.full(len(trace.documents), -1, dtype=np.int64)
    domain_P[trace.document_N] = trace.domain_N
    for sequence in np.flatnonzero(domain_P[trace.document_N] != trace.domain_N)[:1]:
        document = trace.document_N[sequence]
        raise MoestroError(
            f"document {trace.documents[document]!r} has text in the domains "
            f"{trace.domains[trace.domain_N[sequence]]!r} and "
            f"{trace.domains[domain_P[document]]!r}; give it another name in each domain"
        )
    return domain_P


def document_weights(domain_P: Ints, draws: int, seed: int) -> Floats:
    """How often each document is drawn when each domain's documents are drawn again. [Z, P].

    As many as the domain has, with replacement; those of a domain below 0 get weight 0. The only
    document of a domain always counts once: such a domain shows no noise, so set its intervals to
    NaN (`lonely` says which).
    """
    rng = _generator(draws, seed)
    weights_ZP = np.zeros((draws, len(domain_P)))
    for domain in np.unique(domain_P[domain_P >= 0]):
        own = np.flatnonzero(domain_P == domain)
        weights_ZP[:, own] = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), size=draws)
    return weights_ZP


def lonely(domain_P: Ints, domains: int) -> Bools:
    """Which domains have fewer than two documents, so that no interval is possible. [M]."""
    return np.bincount(domain_P[domain_P >= 0], minlength=domains) < 2


def strata(domain_P: Ints) -> Ints:
    """Domains to draw within for a number about all domains together. int64 [P].

    Domains of a single document are put together, with the smallest other one if there is but one
    of them; otherwise their text would seem to be without noise.
    """
    sizes_M = np.bincount(domain_P[domain_P >= 0])
    single = np.flatnonzero(sizes_M == 1)
    if len(single) == 1 and (sizes_M > 1).any():
        single = np.append(single, np.argmin(np.where(sizes_M > 1, sizes_M, sizes_M.max() + 1)))
    return np.where(np.isin(domain_P, single), len(sizes_M), domain_P)


def pooled_weights(domain_P: Ints, draws: int, seed: int) -> Floats:
    """`document_weights` for numbers about all domains together; NaN for a single document."""
    within_P = strata(domain_P)
    if np.count_nonzero(within_P >= 0) < 2:
        return np.full((draws, len(within_P)), np.nan)
    return document_weights(within_P, draws, seed)


def interval(samples: Floats, axis: int = 0, level: float = 0.95) -> Floats:
    """Percentile interval of samples along one axis: the others, then [low, high]."""
    tail = (1 - level) / 2
    limits: Floats = np.moveaxis(np.quantile(samples, (tail, 1 - tail), axis=axis), 0, -1)
    return limits


def reflected(
    samples: Floats, measured: Floats, low: float = 0.0, high: float = 1.0, level: float = 0.95
) -> Floats:
    """Basic bootstrap interval, for a measure that noise pushes upwards. [..., 2].

    A distance of resampled text carries the noise of sampling twice, so the quantiles of the
    samples, [Z, ...], are reflected about the measured value, [...]: that takes the upward bias
    off instead of adding it again. No value lies below `low` or above `high`.
    """
    limits = interval(samples, 0, level)
    centre = 2 * np.asarray(measured, dtype=np.float64)[..., None]
    result: Floats = np.clip(centre - limits[..., ::-1], low, high)
    return result


def p_values(draws: Floats, measured: Floats) -> Floats:
    """Share of draws, [Z, ...], at least as high as measured, [...]; itself counted as one.

    The tolerance keeps draws that only change names from counting as less. NaN stays NaN.
    """
    higher = (draws >= np.asarray(measured) - _TOLERANCE).sum(axis=0)
    result: Floats = np.where(np.isnan(measured), np.nan, (1.0 + higher) / (1 + len(draws)))
    return result


def largest_p_values(largest_Z: Floats, measured: Floats) -> Floats:
    """p-values [...] of many findings, corrected by the largest of all of them in each draw. [Z].

    Holds family-wise (Westfall and Young 1993, single step).
    """
    lower = np.searchsorted(np.sort(largest_Z), np.asarray(measured) - _TOLERANCE)
    result: Floats = (1.0 + len(largest_Z) - lower) / (1 + len(largest_Z))
    return result


def beside_chance(
    measured_LM: Floats, drawn_ZLM: Floats, chance_ZLM: Floats, asked_M: Bools, least: int = 1
) -> dict[str, Any]:
    """A distance of each layer and label with its noise, and the test of each layer's mean.

    Args:
        measured_LM: the distance.
        drawn_ZLM: bootstrap samples of it.
        chance_ZLM: draws of its null.
        asked_M: the labels that the question can be asked of: the others have no interval, and no
            part in the mean.
        least: how many of them a mean needs; NaN below.

    Returns: interval, chance and its 95 % quantile by label; the same of the mean, and its p-value
        with whether it holds over all layers (Holm). Names as in `Specialisation`.
    """
    interval_LM2 = reflected(drawn_ZLM, measured_LM)
    interval_LM2[:, ~asked_M] = np.nan
    mean_L, mean_ZL = np.full(len(measured_LM), np.nan), np.full(chance_ZLM.shape[:2], np.nan)
    if asked_M.sum() >= least:
        mean_L = measured_LM[:, asked_M].mean(axis=1)
        mean_ZL = chance_ZLM[..., asked_M].mean(axis=2)
    p_value_L = p_values(mean_ZL, mean_L)
    return {
        "interval_LM2": interval_LM2,
        "chance_LM": chance_ZLM.mean(axis=0),
        "chance_high_LM": np.quantile(chance_ZLM, 0.95, axis=0),
        "mean_L": mean_L,
        "mean_chance_L": mean_ZL.mean(axis=0),
        "mean_chance_high_L": np.quantile(mean_ZL, 0.95, axis=0),
        "p_value_L": p_value_L,
        "supported_L": holm(p_value_L),
    }


def holm(p_value: Floats) -> Bools:
    """Which p-values hold at a family-wise `SIGNIFICANCE` (Holm 1979, step-down)."""
    flat = np.nan_to_num(p_value.ravel(), nan=1.0)
    order = np.argsort(flat)
    limits = SIGNIFICANCE / np.arange(len(flat), 0, -1)
    passed = np.zeros(len(flat), dtype=np.bool_)
    passed[order] = np.logical_and.accumulate(flat[order] <= limits)
    return passed.reshape(p_value.shape)


def signs(documents: int, draws: int, seed: int) -> Floats:
    """Random signs for documents: what they add up to if none had a direction. ±1, [Z, P]."""
    flips = _generator(draws, seed).integers(0, 2, size=(draws, documents))
    return 2.0 * flips.astype(np.float64) - 1.0


def membership(label_P: Ints, labels: int) -> Floats:
    """1 where document p has label m, else 0. [M, P]."""
    return np.equal(label_P, np.arange(labels)[:, None]).astype(np.float64)


def shares(counts: NDArray[Any]) -> Floats:
    """Counts along the last axis as shares; all zeros stay zeros."""
    total = np.maximum(counts.sum(axis=-1, keepdims=True), _TOLERANCE)
    return np.asarray(counts / total, dtype=np.float64)


def distances(weights_MP: Floats, counts_PLE: Floats) -> Floats:
    """Total variation of each label of weighted documents from the mean over labels. [M, L].

    A label without any assignment has NaN and no part in the mean.
    """
    counts_MLE = np.tensordot(weights_MP, counts_PLE, 1)
    empty_ML1 = counts_MLE.sum(axis=-1, keepdims=True) == 0
    shares_MLE = shares(counts_MLE)
    mean_LE = shares_MLE.sum(axis=0) / np.maximum((~empty_ML1).sum(axis=0), 1)
    apart_ML: Floats = 0.5 * np.abs(shares_MLE - mean_LE).sum(axis=-1)
    return np.where(empty_ML1[..., 0], np.nan, apart_ML)


def document_sums(values_TX: NDArray[Any], document_T: Ints, documents: int) -> Floats:
    """Sum of a number, or of arrays of any shape, over each document's tokens. [T, …] -> [P, …]."""
    columns = values_TX.reshape(len(values_TX), prod(values_TX.shape[1:])).T
    sums = [np.bincount(document_T, each_T, minlength=documents) for each_T in columns]
    shape = (documents, *values_TX.shape[1:])
    return np.stack(sums, axis=1).astype(np.float64, copy=False).reshape(shape)


def _generator(draws: int, seed: int) -> np.random.Generator:
    if draws < 1:
        raise MoestroError(f"draws is {draws}; give at least 1")
    return np.random.default_rng(seed)
