"""Findings: all that a trace says about its model's routing, with the noise of every number.

Letters beside those of docs/shapes.md: M domains, P documents. An array's axes are named by the
end of its name, in the JSON too; a last 2 is an interval's ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from moestro.errors import DataError, MoestroError
from moestro.probe.measures.bootstrap import Bools, Floats, Ints, document_domains
from moestro.probe.measures.caching import Caching, caching
from moestro.probe.measures.load import Entropy, Load, Margin, entropy, expert_table, load, margin
from moestro.probe.measures.overlap import Coactivation, LayerOverlap, coactivation, layer_overlap
from moestro.probe.measures.repeat import Repetition, repetition
from moestro.probe.measures.specialise import (
    Grouping,
    Specialisation,
    by_domain,
    labelled,
    specialisation,
)
from moestro.probe.measures.tokens import Explained, TypicalTokens, explained, typical_tokens
from moestro.probe.recording.traces import Trace

_FEW = 199
_Result = TypeVar("_Result")

# Below this, bootstrap intervals that are called 95 % miss in 10 % of cases or more (simulated).
FEW_DOCUMENTS = 8


class Findings(NamedTuple):
    """All measures of one trace. What cannot be measured is None, and `notes` says why."""

    model: str  # what it was called
    domains: tuple[str, ...]
    moe_layers: tuple[int, ...]  # the layer number of each of the L mixture layers
    num_experts: int
    top_k: int  # 0 for expert choice
    tokens_M: Ints
    documents_M: Ints
    load: Load
    table_LME: Floats  # experts by domain; see `DomainTable`, as of the next three
    table_interval_LME2: Floats
    table_p_value_LME: Floats
    table_supported_LME: Bools
    entropy: Entropy | None  # None where the router's probabilities are unknown
    margin: Margin | None  # None where they are unknown
    # One for each grouping that has two labels or more: by domain first.
    specialisation: tuple[Specialisation, ...]
    tokens: TypicalTokens
    # The rest is None for expert choice, under which no token chooses, or waits, in turn.
    explained: Explained | None  # None for fewer than two documents
    coactivation: Coactivation | None  # None for one expert per token
    overlap: LayerOverlap | None  # None for a single mixture layer
    repetition: Repetition | None  # None for sequences of a single token
    caching: Caching | None
    notes: tuple[str, ...]  # what could not be measured and why, and what has no interval


def measure(
    trace: Trace, *, groupings: Sequence[Grouping] = (), draws: int = 999, seed: int = 0
) -> Findings:
    """Every measure of a trace that it allows.

    Args:
        trace: from `moestro.probe.record` or `moestro.probe.read_trace`.
        groupings: of its domains, beside the domains themselves, to measure specialisation by.
        draws: random draws behind the noise of each number; of pairs of experts and layers 199
            at most.
        seed: of those draws.

    Raises:
        DataError: the trace has no token.
        MoestroError: a document lies in two domains, a grouping does not fit the domains, or
            fewer than one draw is asked for.
    """
    if len(trace.tokens_T) == 0:
        raise DataError("the trace has no token, so there is nothing to measure; record some text")
    notes: list[str] = []
    some: dict[str, Any] = {"draws": draws, "seed": seed}
    few = some | {"draws": min(draws, _FEW)}
    table = expert_table(trace, **some)
    entropies, margins = entropy(trace, **some), margin(trace, **some)
    if entropies is None or margins is None:
        notes.append("the trace does not know the router's probabilities: no entropy or no margin")
    return Findings(
        model=trace.subject.name,
        domains=trace.domains,
        moe_layers=trace.subject.moe_layers,
        num_experts=trace.subject.num_experts,
        top_k=trace.subject.top_k,
        tokens_M=np.bincount(trace.domain_T, minlength=len(trace.domains)),
        documents_M=_documents(trace, notes),
        load=load(trace, **some),
        table_LME=table.share_LME,
        table_interval_LME2=table.interval_LME2,
        table_p_value_LME=table.p_value_LME,
        table_supported_LME=table.supported_LME,
        entropy=entropies,
        margin=margins,
        specialisation=_specialisations(trace, groupings, notes, some),
        tokens=typical_tokens(trace),
        explained=_unless(notes, lambda: explained(trace, **some)),
        coactivation=_unless(notes, lambda: coactivation(trace, **few)),
        overlap=_unless(notes, lambda: layer_overlap(trace, **few)),
        repetition=_unless(notes, lambda: repetition(trace, seed=seed)),
        caching=caching(trace, **some) if trace.subject.top_k else None,
        notes=tuple(notes),
    )


def to_json(result: Any) -> Any:
    """Turn findings, or any part of them, into plain dicts, lists and numbers; NaN becomes None."""
    if isinstance(result, tuple) and hasattr(result, "_asdict"):
        return {name: to_json(value) for name, value in result._asdict().items()}
    if isinstance(result, np.ndarray | np.generic):
        return to_json(result.tolist())
    if isinstance(result, list | tuple):
        return [to_json(value) for value in result]
    if isinstance(result, float) and not np.isfinite(result):
        return None
    return result


def _documents(trace: Trace, notes: list[str]) -> Ints:
    """Documents of each domain, noting those of which no interval is possible. [M]."""
    domain_P = document_domains(trace)
    documents_M = np.bincount(domain_P[domain_P >= 0], minlength=len(trace.domains))
    if single := [trace.domains[index] for index in np.flatnonzero(documents_M == 1)]:
        notes.append(
            f"one document only in {', '.join(single)}: no interval is possible there, since "
            "the domain cannot be separated from the document; give at least two"
        )
    few = [
        name
        for name, count in zip(trace.domains, documents_M, strict=True)
        if 1 < count < FEW_DOCUMENTS
    ]
    if few:
        notes.append(
            f"of {', '.join(few)} fewer than {FEW_DOCUMENTS} documents were read: their intervals "
            "are somewhat too narrow"
        )
    if trace.subject.top_k == 0:
        notes.append("caching needs tokens that choose in turn; under expert choice experts choose")
    return documents_M


def _specialisations(
    trace: Trace, groupings: Sequence[Grouping], notes: list[str], some: dict[str, Any]
) -> tuple[Specialisation, ...]:
    """By domain and by each grouping, noting those that have fewer than two labels."""
    found = []
    for grouping in (by_domain(trace.domains), *groupings):
        labels, _ = labelled(trace, grouping)
        if len(labels) < 2:
            has = ", ".join(map(repr, labels)) or "text without a label"
            notes.append(
                f"specialisation compares labels, but by {grouping.name!r} the text has only "
                f"{has}; give text with at least two"
            )
        else:
            found.append(specialisation(trace, grouping, **some))
    return tuple(found)


def _unless(notes: list[str], measured: Callable[[], _Result]) -> _Result | None:
    """A measure, or None and a note where the trace does not allow it."""
    try:
        return measured()
    except MoestroError as error:
        notes.append(str(error))
        return None
