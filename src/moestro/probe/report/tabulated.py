"""The report's tables: the numbers behind its charts, as text, readable without a script."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from moestro.probe.ablation.effects import Ablation, Ablations
from moestro.probe.measures.bootstrap import Floats
from moestro.probe.measures.measure import Findings
from moestro.probe.measures.saturation import Saturation
from moestro.probe.measures.specialise import Specialisation
from moestro.probe.report.pieces import visible

_MOST_ROWS = 120


class Table(NamedTuple):
    """A table of text.

    Attributes:
        caption: what it shows.
        head: names of its columns.
        rows: as many texts each as there are columns.
    """

    caption: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def text_table(findings: Findings) -> Table:
    """What was read."""
    rows = zip(findings.domains, findings.tokens_M, findings.documents_M, strict=True)
    return Table(
        "The text that was read",
        ("domain", "tokens", "documents"),
        [(visible(name), f"{tokens:,}", f"{documents:,}") for name, tokens, documents in rows],
    )


def load_table(findings: Findings) -> Table:
    """Balance and decision of every layer."""
    load, entropy, margin = findings.load, findings.entropy, findings.margin
    head = ["layer", "busiest ÷ equal share", "variation", "unused", "no room"]
    head += ["spread of a token's choice"] * (entropy is not None)
    head += ["lead of the last chosen"] * (margin is not None)
    rows = []
    for index, layer in enumerate(findings.moe_layers):
        row = [
            str(layer),
            _with(load.imbalance_L[index], load.imbalance_interval_L2[index], ".2f"),
            _with(load.variation_L[index], load.variation_interval_L2[index], ".2f"),
            str(len(load.dead_L[index])),
            _with(load.dropped_L[index], load.dropped_interval_L2[index], ".1%"),
        ]
        if entropy is not None:
            row.append(_with(entropy.spread_L[index], entropy.spread_interval_L2[index], ".2f"))
        if margin is not None:
            row.append(_with(margin.mean_L[index], margin.interval_L2[index], ".3f"))
        rows.append(tuple(row))
    return Table(
        "Balance of each layer, with 95 % intervals. Variation: standard deviation of the loads "
        "over their mean. Spread: 0 if the router is sure of one expert, 1 if all are alike to it. "
        "Lead: how far, in probability, the last expert chosen is ahead of the next.",
        tuple(head),
        rows,
    )


def special_table(findings: Findings, found: Specialisation) -> Table:
    """Specialisation of every layer beside both nulls."""
    beyond, rows = found.beyond, []
    for index, layer in enumerate(findings.moe_layers):
        rows.append((
            str(layer),
            f"{found.mean_L[index]:.1%}",
            f"{found.mean_chance_L[index]:.1%}, up to {found.mean_chance_high_L[index]:.1%}",
            _verdict(found.p_value_L[index], bool(found.supported_L[index])),
            _percent(beyond.mean_L[index]),
            f"{_percent(beyond.mean_chance_L[index])}, up to "
            f"{_percent(beyond.mean_chance_high_L[index])}",
            _verdict(beyond.p_value_L[index], bool(beyond.supported_L[index])),
        ))  # fmt: skip
    return Table(
        f"How far the experts of each layer tell the text apart by {found.grouping}: share of "
        "choices that would have to move, and of them what the words do not explain. Up to: 95 % "
        "of what chance gives. Yes: at a rate of error of 5 % over all layers together.",
        ("layer", "apart", "by chance", "beyond chance?", "not by words", "by chance",
         "beyond chance?"),
        rows,
    )  # fmt: skip


def explained_table(findings: Findings) -> Table | None:
    """What foretells a token's first choice."""
    found = findings.explained
    if found is None:
        return None
    rows = []
    for index, layer in enumerate(findings.moe_layers):
        cells = [
            _with(found.accuracy_LJ[index, which], found.accuracy_interval_LJ2[index, which], ".1%")
            for which in range(len(found.predictors))
        ]
        busiest = _with(found.majority_L[index], found.majority_interval_L2[index], ".1%")
        rows.append((str(layer), busiest, *cells))
    return Table(
        "Share of first choices foretold in documents that the foretelling was not made from, "
        "with 95 % intervals",
        ("layer", "busiest expert", *(f"by {name}" for name in found.predictors)),
        rows,
    )


def overlap_table(findings: Findings) -> Table | None:
    """What a layer's choice tells about the next layer's."""
    found = findings.overlap
    if found is None:
        return None
    layers = findings.moe_layers
    rows = [
        (f"{here} → {there}", _with(found.information_L[index], found.interval_L2[index], ".2f"),
         f"{found.chance_L[index]:.3f}")
        for index, (here, there) in enumerate(pairwise(layers))
    ]  # fmt: skip
    return Table(
        "What the first expert of one layer tells about that of the next: 0 nothing, 1 all (95 % "
        "interval); what finite text gives by chance is taken off",
        ("layers", "told", "taken off"),
        rows,
    )


def pairs_table(findings: Findings) -> Table | None:
    """Experts that are chosen together."""
    found = findings.coactivation
    if found is None or not found.pairs:
        return None
    rows = [
        (str(findings.moe_layers[pair.layer]), f"{pair.experts[0]} and {pair.experts[1]}",
         f"{pair.together:.2%}", f"{pair.independent:.2%}",
         f"{pair.ratio:.2f} ({_range(pair.low, pair.high, '.2f')})")
        for pair in (found.pairs[:10] + found.pairs[10:][-10:])
    ]  # fmt: skip
    return Table(
        "Pairs chosen together most above, and most below, what their loads give, beyond chance "
        "at a rate of error of 5 % over all pairs",
        ("layer", "experts", "together", "by loads", "ratio (95 % interval)"),
        rows,
    )


def repetition_table(findings: Findings) -> Table | None:
    """Repetition of the first choice and of any, by layer and domain."""
    found = findings.repetition
    if found is None:
        return None
    rows = []
    for index, layer in enumerate(findings.moe_layers):
        for which, domain in enumerate(findings.domains):
            at = index, which
            rows.append((
                str(layer), visible(domain),
                _error(found.first_LM[at], found.first_error_LM[at]),
                f"{found.first_shuffled_LM[at]:.1%}",
                _error(found.any_LM[at], found.any_error_LM[at]),
                f"{found.any_shuffled_LM[at]:.1%}",
            ))  # fmt: skip
    return Table(
        "How often a token and the next share their first expert, or any, with standard errors; "
        f"drawn at random: {found.first_uniform:.1%} and {found.any_uniform:.1%}"
        + ("" if len(rows) <= _MOST_ROWS else "; all rows are in repetition.csv"),
        ("layer", "domain", "first", "shuffled", "any", "shuffled"),
        rows[:_MOST_ROWS],
    )


def caching_table(findings: Findings) -> Table | None:
    """Hit rates, mean over layers, at some sizes."""
    found = findings.caching
    if found is None:
        return None
    experts = findings.num_experts
    sizes = sorted({max(1, round(experts * part / 16)) for part in range(1, 17)})
    rows = []
    for size in sizes:
        cells = [
            _with(rates.mean_E[size - 1], rates.mean_interval_E2[size - 1], ".1%")
            for rates in (found.lru, found.lfu, found.oracle)
        ]
        shuffled, uniform = found.lru.shuffled_E[size - 1], found.lru.uniform_E[size - 1]
        rows.append((str(size), *cells, f"{shuffled:.1%}", f"{uniform:.1%}"))
    return Table(
        f"Hit rates, mean over layers, with 95 % intervals, of {found.tokens:,} tokens of "
        f"{found.documents:,} documents; each sequence starts with an empty cache",
        ("experts in the cache", "least recently used goes", "least often used goes",
         "best possible", "first policy, tokens shuffled", "first policy, experts at random"),
        rows,
    )  # fmt: skip


def saturation_table(found: Saturation) -> Table:
    """How early the routing was settled."""
    rows = [
        (f"{step:,}", _with(found.mean_J[at], found.mean_interval_J2[at], ".1%"),
         f"{found.loads_JL[at].mean():.1%}", f"{found.random:.1%}")
        for at, step in enumerate(found.steps_J)
    ]  # fmt: skip
    return Table(
        "Share of the last checkpoint's choices that an earlier one made already, mean over "
        "layers, with 95 % intervals",
        ("step", "as at the end", "chance at these loads", "chance"),
        rows,
    )


def ablation_table(found: Ablations) -> Table:
    """What changing an expert did."""
    return Table(
        f"Rise of the loss ({found.unit}) when one expert is changed ({found.mode}), with 95 % "
        f"intervals over documents",
        ("layer", "expert", "domain", "rise there", "rise elsewhere", "difference", "verdict"),
        [_ablation(row) for row in found.rows[:_MOST_ROWS]],
    )


def _ablation(row: Ablation) -> tuple[str, ...]:
    expert = f"{row.expert}" if row.other is None else f"{row.expert} ↔ {row.other}"
    verdict = row.verdict + (f"; {row.tokens_verdict}" if row.tokens_verdict else "")
    return (
        str(row.layer),
        expert + (" (for comparison)" if row.control else ""),
        visible(row.domain),
        f"{row.own:+.3f}",
        _with(row.elsewhere, row.elsewhere_interval_2, "+.3f"),
        _with(row.difference, row.difference_interval_2, "+.3f"),
        verdict,
    )


def _with(value: float | Floats, interval_2: Floats, form: str) -> str:
    """A number and its interval."""
    return f"{value:{form}} ({_range(interval_2[0], interval_2[1], form)})"


def _range(low: float | Floats, high: float | Floats, form: str) -> str:
    if np.isnan(low) or np.isnan(high):
        return "no interval"
    return f"{low:{form}} to {high:{form}}"


def _error(rate: float | Floats, error: float | Floats) -> str:
    return f"{rate:.1%} ± " + (f"{error:.1%}" if np.isfinite(error) else "?")


def _percent(value: float | Floats) -> str:
    return f"{value:.1%}" if np.isfinite(value) else "?"


def _verdict(p_value: float | Floats, supported: bool) -> str:
    if np.isnan(p_value):
        return "cannot be told"
    return f"{'yes' if supported else 'no'} (p = {p_value:.3f})"
