"""From losses with and without an expert to the row that says whether its domain needs it.

Letters beside those of docs/shapes.md: T predicted tokens, M domains, P documents, Z random draws,
W distinct token ids; an axis of 2 is [low, high].
"""

from __future__ import annotations

from math import atan, cos, pi, sin, sqrt
from typing import NamedTuple

import numpy as np

from moestro.probe.ablation import effects
from moestro.probe.ablation.effects import Ablation, TokenIdentity
from moestro.probe.ablation.targets import Target
from moestro.probe.measures.bootstrap import (
    Bools,
    Floats,
    Ints,
    document_sums,
    document_weights,
    holm,
    interval,
    membership,
)

_TINY = 1e-12


class Predicted(NamedTuple):
    """The T tokens that the model predicted, sequence after sequence, in the order of its runs."""

    domain_P: Ints
    document_T: Ints
    input_T: Ints  # the id read there, ids being numbered through from 0
    target_T: Ints  # the id to be predicted, likewise
    size_T: Floats  # what a loss is divided by: 1, or the bytes that the target stands for
    draws: int
    seed: int

    def sums(self, value_T: Floats) -> Floats:
        """Sum of a number of each token over each document. [P]."""
        return document_sums(value_T, self.document_T, len(self.domain_P))

    def deals(self) -> Ints:
        """Documents in random orders, the same at every call. [Z, P]."""
        rng = np.random.default_rng(self.seed)
        in_order_ZP = np.tile(np.arange(len(self.domain_P)), (self.draws, 1))
        return rng.permuted(in_order_ZP, axis=1)


def by_domain(text: Predicted, change_P: Floats, domains: int) -> tuple[Floats, Floats]:
    """Sum over sum of sizes by domain, [M], and its interval over documents, [M, 2]."""
    size_P = text.sums(text.size_T)
    weights_ZP = document_weights(text.domain_P, text.draws, text.seed)
    change_M, interval_M2 = np.empty(domains), np.full((domains, 2), np.nan)
    for domain in range(domains):
        own_P = text.domain_P == domain
        change_M[domain] = change_P[own_P].sum() / max(size_P[own_P].sum(), _TINY)
        if own_P.sum() > 1:
            samples_Z = _ratio(weights_ZP[:, own_P], change_P[own_P], size_P[own_P])
            interval_M2[domain] = interval(samples_Z)
    return change_M, interval_M2


class Measured(NamedTuple):
    """A row without its verdict, and `per_assignment` under the bootstrap."""

    row: Ablation
    samples_Z: Floats


def measure_row(
    text: Predicted,
    target: Target,
    domain: int,
    domains: int,
    change_T: Floats,
    touched_PX: tuple[Floats, Floats],
) -> Measured:
    """All numbers of one row.

    Args:
        text: the predicted tokens.
        target: what was changed.
        domain: the number of its domain.
        domains: M.
        change_T: rise of each token's loss, bits.
        touched_PX: assignments of the layer in each document: those changed, and all.
    """
    change_P, size_P, (touched_P, all_P) = text.sums(change_T), text.sums(text.size_T), touched_PX
    own_P = text.domain_P == domain
    weights_ZP = document_weights(np.where(own_P, 0, 1), text.draws, text.seed)
    change_M, change_interval_M2 = by_domain(text, change_P, domains)
    sides = [_side(weights_ZP, which_P, change_P, size_P) for which_P in (own_P, ~own_P)]
    single = [_side(weights_ZP, which_P, change_P, touched_P) for which_P in (own_P, ~own_P)]
    own_MP = membership(text.domain_P, domains)
    deals_ZP, several = text.deals(), own_P.sum() > 1 and (~own_P).sum() > 1
    row = Ablation(
        layer=target.layer,
        expert=target.expert,
        other=None,
        domain=target.domain,
        control=target.control,
        change_M=change_M,
        change_interval_M2=change_interval_M2,
        own=sides[0].value,
        elsewhere=sides[1].value,
        elsewhere_interval_2=interval(sides[1].samples_Z),
        difference=sides[0].value - sides[1].value,
        difference_interval_2=interval(sides[0].samples_Z - sides[1].samples_Z),
        p_own=sides[0].p_value,
        p_elsewhere=sides[1].p_value,
        p_more=dealt(change_P, size_P, own_P, deals_ZP) if several else float("nan"),
        share_M=(own_MP @ touched_P) / np.maximum(own_MP @ all_P, _TINY),
        per_assignment=single[0].value,
        per_assignment_elsewhere=single[1].value,
        per_assignment_interval_2=interval(single[0].samples_Z - single[1].samples_Z),
        control_per_assignment=float("nan"),
        control_interval_2=np.full(2, np.nan),
        by_input=token_identity(text, own_P, text.input_T, change_T, weights_ZP, deals_ZP),
        by_target=token_identity(text, own_P, text.target_T, change_T, weights_ZP, deals_ZP),
    )
    return Measured(row, single[0].samples_Z)


def token_identity(
    text: Predicted,
    own_P: Bools,
    id_T: Ints,
    change_T: Floats,
    weights_ZP: Floats,
    deals_ZP: Ints,
) -> TokenIdentity:
    """The change in the domain beside that of the same token ids elsewhere; see `TokenIdentity`.

    Excess and interval are those of the regression of the change on "in the domain" with one
    constant for each id, clustered by document. For the p-value each id's mean over both sides is
    taken off, and documents are dealt (as Freedman and Lane 1983 do with residuals).
    """
    own_T, ids = own_P[text.document_T], int(id_T.max(initial=-1)) + 1
    here_W, there_W = (np.bincount(id_T[side], minlength=ids) for side in (own_T, ~own_T))
    total_W = np.maximum(here_W + there_W, 1)
    weight_W = here_W * there_W / total_W
    covered = float(here_W[there_W > 0].sum() / max(here_W.sum(), 1))
    weight = float(weight_W.sum())
    if not weight:
        nothing = float("nan")
        return TokenIdentity(covered, nothing, nothing, nothing, np.full(2, np.nan), nothing)
    sum_here_W, sum_there_W = (
        np.bincount(id_T[side], change_T[side], minlength=ids) for side in (own_T, ~own_T)
    )
    here = float((weight_W * sum_here_W / np.maximum(here_W, 1)).sum() / weight)
    alike = float((weight_W * sum_there_W / np.maximum(there_W, 1)).sum() / weight)
    excess, shared_T = here - alike, (weight_W > 0)[id_T]
    residual_T = np.where(shared_T, change_T - ((sum_here_W + sum_there_W) / total_W)[id_T], 0.0)
    regressor_T = np.where(shared_T, own_T - (here_W / total_W)[id_T], 0.0)
    score_P = text.sums(regressor_T * (residual_T - excess * regressor_T))
    samples_Z = excess + _ratio(weights_ZP, score_P, text.sums(np.square(regressor_T)))
    several = own_P.sum() > 1 and (~own_P).sum() > 1
    return TokenIdentity(
        covered=covered,
        here=here,
        alike=alike,
        excess=excess,
        excess_interval_2=interval(samples_Z) if several else np.full(2, np.nan),
        p_value=(
            dealt(text.sums(residual_T), text.sums(shared_T * 1.0), own_P, deals_ZP)
            if several
            else float("nan")
        ),
    )


def dealt(change_P: Floats, size_P: Floats, own_P: Bools, deals_ZP: Ints) -> float:
    """Share of deals of documents whose difference, own − others, is as large as measured.

    Each difference counts in units of its own standard error (Welch), so that a domain whose
    documents merely vary more is not taken for one that suffers more.
    """
    moments_P5 = _moments(change_P, size_P)
    own_ZP = np.vstack([own_P, own_P[deals_ZP]]).astype(np.float64)
    own_Z5, number = own_ZP @ moments_P5, int(own_P.sum())
    others_Z5 = moments_P5.sum(axis=0) - own_Z5
    mean_Z, variance_Z = _mean_and_variance(own_Z5, number)
    mean_others_Z, variance_others_Z = _mean_and_variance(others_Z5, len(own_P) - number)
    error_Z = np.sqrt(variance_Z + variance_others_Z)
    score_Z = (mean_Z - mean_others_Z) / np.maximum(error_Z, _TINY)
    measured = score_Z[0]
    return float((score_Z >= measured - 1e-9 * abs(measured)).mean())


def student(score: float, freedom: int) -> float:
    """Chance of a Student's t at least as far from 0 (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    if freedom < 1 or score != score:
        return float("nan")
    angle = atan(abs(score) / sqrt(freedom))
    term, total = (cos(angle), 0.0) if freedom % 2 else (1.0, 0.0)
    for n in range(1 if freedom % 2 else 0, freedom - 1, 2):
        total += term
        term *= cos(angle) ** 2 * (n + 1) / (n + 2)
    inside = 2 / pi * (angle + sin(angle) * total) if freedom % 2 else sin(angle) * total
    return max(0.0, 1 - inside)


def judge(measured: list[Measured], text: Predicted) -> tuple[Ablation, ...]:
    """The rows with controls set beside them and verdicts, corrected for the number of rows."""
    rows = [_beside_controls(each, measured) for each in measured]
    judged: list[Ablation | None] = [None] * len(rows)
    for control in (False, True):
        places = [n for n, row in enumerate(rows) if row.control == control]
        found = [rows[n] for n in places]
        own, elsewhere = (
            holm(np.array([getattr(row, name) for row in found]))
            for name in ("p_own", "p_elsewhere")
        )
        more = holm(np.array([_p_needed(row) for row in found]))
        tokens = holm(np.array([max(row.by_input.p_value, row.by_target.p_value) for row in found]))
        for n, row, *sure in zip(places, found, own, elsewhere, more, tokens, strict=True):
            judged[n] = _verdict(row, text, *map(bool, sure))
    return tuple(row for row in judged if row is not None)


def _verdict(
    row: Ablation, text: Predicted, own: bool, elsewhere: bool, more: bool, tokens: bool
) -> Ablation:
    """The row's verdict, given which of its p-values hold."""
    if len(np.unique(text.domain_P)) < 2:
        return row._replace(verdict=effects.ONE_DOMAIN)
    if np.isnan(row.p_more):
        return row._replace(verdict=effects.ONE_DOCUMENT)
    if more:
        covered = min(row.by_input.covered, row.by_target.covered)
        said = effects.BEYOND_TOKENS if tokens else effects.WITHIN_TOKENS
        if covered < effects.LEAST_COVERED:
            said = effects.OTHER_TOKENS
        return row._replace(verdict=effects.MORE, tokens_verdict=said, matters_more=True)
    if own and row.own < 0:
        return row._replace(verdict=effects.BETTER)
    if elsewhere and row.elsewhere > 0:
        return row._replace(verdict=effects.ALIKE if own else effects.ELSEWHERE)
    return row._replace(verdict=effects.UNCLEAR if own else effects.NOTHING)


def _p_needed(row: Ablation) -> float:
    """Both must hold: its domain suffers at all, and more than the others."""
    return max(row.p_own, row.p_more) if row.own > 0 else 1.0


def _beside_controls(measured: Measured, others: list[Measured]) -> Ablation:
    row = measured.row
    beside = [
        other
        for other in others
        if other.row.control
        and (other.row.layer, other.row.domain) == (row.layer, row.domain)
        and other.row.expert != row.expert
        and not np.isnan(other.row.per_assignment)
    ]
    if not beside:
        return row
    mean_Z = np.mean([other.samples_Z for other in beside], axis=0)
    return row._replace(
        control_per_assignment=float(np.mean([other.row.per_assignment for other in beside])),
        control_interval_2=interval(measured.samples_Z - mean_Z),
    )


class _Side(NamedTuple):
    """A mean over one side's documents, its bootstrap, and its two-sided p-value against 0."""

    value: float
    samples_Z: Floats
    p_value: float


def _side(weights_ZP: Floats, which_P: Bools, change_P: Floats, size_P: Floats) -> _Side:
    change_P, size_P, number = change_P[which_P], size_P[which_P], int(which_P.sum())
    if not size_P.sum():
        return _Side(float("nan"), np.full(len(weights_ZP), np.nan), float("nan"))
    mean_1, variance_1 = _mean_and_variance(_moments(change_P, size_P).sum(0)[None], number)
    value = float(mean_1[0])
    if number < 2:
        return _Side(value, np.full(len(weights_ZP), np.nan), float("nan"))
    score = value / max(sqrt(float(variance_1[0])), _TINY)
    return _Side(
        value, _ratio(weights_ZP[:, which_P], change_P, size_P), student(score, number - 1)
    )


def _moments(change_P: Floats, size_P: Floats) -> Floats:
    """What mean and variance of a ratio of sums are made of; they add up over documents. [P, 5]."""
    return np.stack([change_P, size_P, change_P**2, change_P * size_P, size_P**2], axis=1)


def _mean_and_variance(sums_Z5: Floats, number: int) -> tuple[Floats, Floats]:
    """Ratio of sums over `number` documents, and its variance (delta method). Both [Z]."""
    change_Z, size_Z, squares_Z, products_Z, sizes_Z = sums_Z5.T
    size_Z = np.maximum(size_Z, _TINY)
    mean_Z = change_Z / size_Z
    spread_Z = np.maximum(squares_Z - 2 * mean_Z * products_Z + mean_Z**2 * sizes_Z, 0.0)
    return mean_Z, spread_Z * number / max(number - 1, 1) / size_Z**2


def _ratio(weights_ZP: Floats, change_P: Floats, size_P: Floats) -> Floats:
    """Sum over sum in each draw; NaN in a draw without any. [Z]."""
    size_Z = weights_ZP @ size_P
    ratio_Z: Floats = np.where(
        size_Z > 0, (weights_ZP @ change_P) / np.maximum(size_Z, _TINY), np.nan
    )
    return ratio_Z
