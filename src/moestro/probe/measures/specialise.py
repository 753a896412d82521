"""Specialisation: how differently labels use experts, and how much of it tokens explain.

Letters beside those of docs/shapes.md: M domains or, of a grouping, labels; P documents; Z draws.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moestro.errors import MoestroError
from moestro.probe.measures.beyond import BeyondTokens, beyond_tokens
from moestro.probe.measures.bootstrap import (
    Bools,
    Floats,
    Ints,
    beside_chance,
    distances,
    document_domains,
    document_weights,
    lonely,
    membership,
)
from moestro.probe.measures.totals import document_counts
from moestro.probe.recording.traces import Trace


class Grouping(NamedTuple):
    """A way to put the domains of a trace together under labels."""

    name: str  # such as "domain", "language", "genre"
    label_M: tuple[str | None, ...]  # of each domain of the trace, None to leave it out


class Specialisation(NamedTuple):
    """How far each label's use of experts lies from the average over labels, and chance.

    The distance is total variation: the share of a label's assignments that would have to go to
    another expert for its use of experts to equal the average (0 to 1). Even labels that are
    treated alike lie some way apart in finite text: `chance` is what remains of the distance when
    whole documents are dealt to the labels at random.

    The upward bias of sampling is taken off the intervals. They tell the size of a difference;
    near 0 they lie too high, so `p_value_L` decides whether there is one.
    """

    grouping: str
    labels: tuple[str, ...]
    documents_M: Ints
    distance_LM: Floats
    chance_LM: Floats  # mean of the distance when documents are dealt at random
    chance_high_LM: Floats  # the distance that chance exceeds in 5 % of the deals
    interval_LM2: Floats
    # The mean over labels of two documents or more; NaN where fewer than two have that many, as
    # then there is nothing to compare chance with.
    mean_L: Floats
    mean_chance_L: Floats  # its mean under chance
    mean_chance_high_L: Floats  # its 95 % quantile under chance
    p_value_L: Floats  # share of deals at least as far apart as measured
    # Whether the layer's distance is beyond chance at a family-wise rate of 5 % over all layers.
    supported_L: Bools
    beyond: BeyondTokens  # what token identity does not explain


def by_domain(domains: Sequence[str]) -> Grouping:
    """Each domain under its own name."""
    return Grouping("domain", tuple(domains))


def by_pattern(name: str, pattern: str, domains: Sequence[str]) -> Grouping:
    """Domains under the part of their names that a pattern's only group matches.

    Args:
        name: of the grouping.
        pattern: regular expression with one group, such as "^([a-z]+)-"; domains that it does not
            match are left out.
        domains: of the trace.

    Raises:
        MoestroError: it is not a regular expression, or does not have exactly one group.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise MoestroError(f"{name}: {pattern!r} is not a regular expression ({error})") from None
    if compiled.groups != 1:
        raise MoestroError(
            f"{name}: {pattern!r} has {compiled.groups} groups; put ( ) around the part of the "
            "domain's name that is the label, such as '^([a-z]+)-'"
        )
    found = [compiled.search(domain) for domain in domains]
    return Grouping(name, tuple(match.group(1) if match else None for match in found))


def specialisation(
    trace: Trace, grouping: Grouping | None = None, *, draws: int = 999, seed: int = 0
) -> Specialisation:
    """Distance of each label's use of experts from the average, beside its sampling noise.

    Whole documents are dealt and resampled, never single tokens: tokens of one document resemble
    each other, and dealing them singly would understate chance. Each label keeps its number of
    documents. The only document of a label cannot separate the label's habits from its own: it is
    not dealt, and such a label has no say in whether the layer is supported.

    Args:
        trace: with at least two labels.
        grouping: of its domains; None for the domains themselves.
        draws: at least 20 for each layer if a finding is to be possible at all after the
            correction for the number of layers.
        seed: of the draws.

    Raises:
        MoestroError: there is one label only, or fewer than one draw is asked for.
    """
    grouping = by_domain(trace.domains) if grouping is None else grouping
    labels, label_P = labelled(trace, grouping)
    if len(labels) < 2:
        has = ", ".join(map(repr, labels)) or "none"
        raise MoestroError(
            f"specialisation compares labels, but by {grouping.name!r} the text has only {has}; "
            "give text with at least two labels"
        )
    counts_PLE, member_MP = document_counts(trace), membership(label_P, len(labels))
    alone_M = lonely(label_P, len(labels))
    distance_LM = distances(member_MP, counts_PLE).T
    chance_ZLM, drawn_ZLM = _drawn(label_P, alone_M, counts_PLE, draws, seed)
    chance_ZLM[..., alone_M] = np.nan
    return Specialisation(
        grouping=grouping.name,
        labels=labels,
        documents_M=member_MP.sum(axis=1).astype(np.int64),
        distance_LM=distance_LM,
        beyond=beyond_tokens(trace, label_P, len(labels), draws=draws, seed=seed),
        **beside_chance(distance_LM, drawn_ZLM, chance_ZLM, ~alone_M, least=2),
    )


def labelled(trace: Trace, grouping: Grouping) -> tuple[tuple[str, ...], Ints]:
    """The labels that occur in the text, and the number of each document's (−1 for none).

    Raises:
        MoestroError: the grouping is of other domains, or a document lies in two domains.
    """
    if len(grouping.label_M) != len(trace.domains):
        raise MoestroError(
            f"the grouping {grouping.name!r} has {len(grouping.label_M)} labels for "
            f"{len(trace.domains)} domains; give one for each domain, None to leave it out"
        )
    domain_P = document_domains(trace)
    there = set(np.unique(domain_P[domain_P >= 0]).tolist())
    names = [name if index in there else None for index, name in enumerate(grouping.label_M)]
    labels = tuple(dict.fromkeys(name for name in names if name is not None))
    number_M = np.array([-1 if name is None else labels.index(name) for name in names])
    return labels, np.where(domain_P < 0, -1, number_M[domain_P])


def _drawn(
    label_P: Ints, alone_M: Bools, counts_PLE: Floats, draws: int, seed: int
) -> tuple[Floats, Floats]:
    """Distances with documents dealt to labels, and with each label's resampled. [Z, L, M] each."""
    member_MP = membership(label_P, len(alone_M))
    dealt_P = np.flatnonzero((label_P >= 0) & ~alone_M[label_P])
    rng, chance, resampled = np.random.default_rng(seed), [], []
    for weights_P in document_weights(label_P, draws, seed + 1):
        dealt_MP = member_MP.copy()
        dealt_MP[:, dealt_P] = rng.permutation(member_MP[:, dealt_P], axis=1)
        chance.append(distances(dealt_MP, counts_PLE).T)
        resampled.append(distances(member_MP * weights_P, counts_PLE).T)
    return np.stack(chance), np.stack(resampled)
