"""Which experts to change: those that look most special to one domain, and controls beside them.

Letters beside those of docs/shapes.md: M domains, P documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moestro.errors import DataError, MoestroError
from moestro.probe.measures.bootstrap import Floats, document_domains, membership, shares
from moestro.probe.recording.traces import Trace, place_of

_SURE = 3.0  # standard errors by which a domain's use of an expert must exceed the others'


class Target(NamedTuple):
    """An expert to change, and the domain that it is thought to serve.

    Attributes:
        layer: its layer number in the model.
        expert: its number in that layer.
        domain: the label.
        other: an expert of the same layer that handles about as much of the domain; the one that
            `swap` takes. None where the layer has no other.
        control: it is here for comparison, and not thought to be special.
    """

    layer: int
    expert: int
    domain: str
    other: int | None = None
    control: bool = False


def targets(trace: Trace, most: int = 12, *, controls: bool = True, seed: int = 0) -> list[Target]:
    """The experts that look most specialised, each for one domain, and as many controls.

    Ranked by lift: the expert's share of the domain's assignments over its share of those of the
    other domains together. Only shares of at least 1 / E count; those that exceed the other
    domains' by three standard errors over documents come first.

    A control is of the same layer and no target itself, where there is such an expert: one drawn
    at random from the quarter (at least two) that handles most nearly as much of the domain.

    Args:
        trace: of the model, with at least two domains; written tokens do not count.
        most: targets, each an expert of its own.
        controls: choose controls too.
        seed: of their choice.

    Raises:
        MoestroError: there is one domain only, `most` is below 1, or experts choose the tokens.
    """
    if most < 1:
        raise MoestroError(f"most is {most}; give at least 1")
    share_LME, score_LME = _lifts(trace)
    chosen: list[tuple[int, int, int]] = []
    for flat in np.argsort(-score_LME, axis=None, kind="stable"):
        layer, domain, expert = map(int, np.unravel_index(flat, score_LME.shape))
        if len(chosen) == most or score_LME[layer, domain, expert] <= 0:
            break
        if all((layer, expert) != (known[0], known[2]) for known in chosen):
            chosen.append((layer, domain, expert))
    return _with_controls(trace, share_LME, chosen, controls, seed)


def every(trace: Trace, layer: int) -> list[Target]:
    """Every expert of one layer, each for the domain where its lift is highest: for a sweep.

    Args:
        trace: as in `targets`.
        layer: layer number in the model.

    Raises:
        MoestroError: as in `targets`, or there is no such mixture layer.
    """
    place = place_of(layer, trace.subject.moe_layers)
    share_LME, score_LME = _lifts(trace)
    best_E = score_LME[place].argmax(axis=0)
    chosen = [(place, int(domain), expert) for expert, domain in enumerate(best_E)]
    return _with_controls(trace, share_LME, chosen, False, 0)


def require_token_choice(token_choice: bool) -> None:
    """Refuse a model for ablation whose tokens do not choose their experts."""
    if not token_choice:
        raise MoestroError(
            "experts choose the tokens in this model (expert choice), so taking one away changes "
            "who is chosen elsewhere; ablation needs a model whose tokens choose"
        )


def _lifts(trace: Trace) -> tuple[Floats, Floats]:
    """Shares of each domain's assignments, and scores to rank them by. Both [L, M, E].

    A score is the lift where the share is at least 1 / E, else 0; surely larger shares get a
    large number added, so that they come first.
    """
    if len(trace.domains) < 2:
        raise MoestroError(
            f"an expert is special to a domain beside others, but the trace has only "
            f"{', '.join(trace.domains) or 'none'}; give text with at least two labels"
        )
    require_token_choice(trace.subject.top_k > 0)
    domain_P, documents = document_domains(trace), len(trace.documents)
    document_T = np.where(trace.generated_T, -1, trace.document_T)
    counts_LPE = trace.counts(document_T, documents).astype(np.float64)
    own_MP = membership(domain_P, len(trace.domains))
    parts = [_shares_and_variance(counts_LPE, each_MP) for each_MP in (own_MP, 1 - own_MP)]
    (share, variance), (elsewhere, variance_elsewhere) = parts
    sure = share - elsewhere > _SURE * np.sqrt(variance + variance_elsewhere)
    lift = np.where(share >= 1 / trace.subject.num_experts, share, 0) / np.maximum(elsewhere, 1e-6)
    return share, lift + np.where(sure & (lift > 0), 1e9, 0.0)


def _shares_and_variance(counts_LPE: Floats, chosen_MP: Floats) -> tuple[Floats, Floats]:
    """Each expert's share of the chosen documents' assignments, and its variance over them."""
    share_LME = shares(chosen_MP @ counts_LPE)
    size_LP = counts_LPE.sum(axis=2)
    total_LM = np.maximum(size_LP @ chosen_MP.T, 1)
    documents_M = (size_LP[0] > 0) @ chosen_MP.T
    squares = (
        chosen_MP @ np.square(counts_LPE)
        - 2 * share_LME * (chosen_MP @ (counts_LPE * size_LP[..., None]))
        + np.square(share_LME) * (np.square(size_LP) @ chosen_MP.T)[..., None]
    )
    # One document shows no noise: its variance is unknown, and nothing about it is sure.
    with np.errstate(divide="ignore"):
        factor_M = np.where(documents_M > 1, documents_M / (documents_M - 1.0), np.inf)
    known = np.maximum(squares, 1e-12) / np.square(total_LM)[..., None]
    return share_LME, known * factor_M[:, None]


def _with_controls(
    trace: Trace,
    share_LME: Floats,
    chosen: Sequence[tuple[int, int, int]],
    controls: bool,
    seed: int,
) -> list[Target]:
    rng = np.random.default_rng(seed)
    layers, domains = trace.subject.moe_layers, trace.domains
    found, beside = [], []
    for layer, domain, expert in chosen:
        share_E = share_LME[layer, domain]
        used = {number for place, _, number in chosen if place == layer}
        free = [n for n in range(len(share_E)) if n not in used]
        free = free or [n for n in range(len(share_E)) if n != expert]
        nearest = sorted(free, key=lambda n: abs(share_E[n] - share_E[expert]))
        nearest = nearest[: max(2, len(share_E) // 4)]
        other = int(rng.choice(nearest)) if nearest else None
        found.append(Target(layers[layer], expert, domains[domain], other))
        if other is not None:
            beside.append(Target(layers[layer], other, domains[domain], expert, control=True))
    if not found:
        raise DataError("no expert handles its equal share of any domain; there is nothing to test")
    return found + list(dict.fromkeys(beside)) if controls else found
