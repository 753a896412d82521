"""The findings in plain English: only what the intervals support, and what they do not.

Every function here makes one sentence, or None where the measure was not taken.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from moestro.probe.ablation.effects import BEYOND_TOKENS, Ablations
from moestro.probe.measures.bootstrap import SIGNIFICANCE, Floats
from moestro.probe.measures.measure import Findings
from moestro.probe.measures.specialise import Specialisation

_MOST_NAMED = 4


class Said(NamedTuple):
    """A sentence of the summary."""

    about: str  # in a word or two
    text: str
    sure: bool  # something was found beyond noise; False where chance may be all there is


def summary(findings: Findings, ablations: Ablations | None = None) -> list[Said]:
    """What the findings support, the most asked-for first."""
    said: list[Said | None] = [balance(findings)]
    for found in findings.specialisation:
        said += [told_apart(findings, found), beyond_tokens(findings, found)]
    said += [
        tokens(findings),
        ablated(ablations) if ablations is not None else None,
        repeated(findings),
        cached(findings),
        together(findings),
        single_documents(findings),
    ]
    return [each for each in said if each is not None]


def balance(findings: Findings) -> Said:
    """How unevenly the experts are used, and whether any is not used at all."""
    load, layers = findings.load, findings.moe_layers
    worst = int(load.imbalance_L.argmax())
    low, high = load.imbalance_interval_L2[worst]
    busiest = int(load.share_LE[worst].argmax())
    text = (
        f"The busiest expert, number {busiest} of layer {layers[worst]}, takes "
        f"{load.imbalance_L[worst]:.2f} times an equal share of the work"
        f"{_between(low, high)}."
    )
    if low <= 1:
        text += " The work may as well be even."
    dead = sum(map(len, load.dead_L))
    total = len(layers) * findings.num_experts
    if dead == 0:
        text += f" All {total} experts were used."
    else:
        text += (
            f" {dead} of {total} experts were not used in this text; other text of this kind may "
            f"still use one, in up to {load.dead_limit:.1%} of documents."
        )
    return Said("Balance", text, bool(low > 1))


def told_apart(findings: Findings, found: Specialisation) -> Said:
    """Whether the layers use experts differently by the labels of a grouping."""
    layers, kind = findings.moe_layers, found.grouping
    supported = int(found.supported_L.sum())
    if np.isnan(found.mean_L).all():
        text = (
            f"Whether the choice of experts differs by {kind} cannot be determined: fewer than two "
            f"{_plural(kind)} have more than one document, so nothing separates a {kind} from a "
            "document."
        )
    elif not supported:
        text = (
            f"The choice of experts does not differ by {kind} beyond chance in any of the "
            f"{len(layers)} mixture layers: assigning the documents to the labels at random gives "
            f"differences as large."
        )
    else:
        most = int(np.where(found.supported_L, found.mean_L - found.mean_chance_L, -1.0).argmax())
        widest = int(np.nan_to_num(found.distance_LM[most]).argmax())
        text = (
            f"The choice of experts differs by {kind} beyond chance in {supported} of "
            f"{len(layers)} mixture layers. Most in layer {layers[most]}: {found.mean_L[most]:.0%} "
            f"of a {kind}'s choices would have to go elsewhere to equal the average, where chance "
            f"gives {found.mean_chance_L[most]:.0%}; the furthest from the average is "
            f"{found.labels[widest]} with {found.distance_LM[most, widest]:.0%}"
            f"{_between(*found.interval_LM2[most, widest], percent=True)}."
        )
    return Said(f"By {kind}", text, bool(supported))


def beyond_tokens(findings: Findings, found: Specialisation) -> Said | None:
    """Whether token identity alone explains the differences between labels."""
    beyond, layers, kind = found.beyond, findings.moe_layers, found.grouping
    supported, unknown = int(beyond.supported_L.sum()), bool(np.isnan(beyond.mean_L).all())
    elsewhere = f"that the same token goes to other experts under another {kind}"
    if unknown and np.isnan(found.mean_L).all():
        return None
    if unknown:
        text = (
            f"Whether it is the {kind} or just its words cannot be determined: too few "
            f"tokens occur under two {_plural(kind)} of more than one document."
        )
    elif not supported and found.supported_L.any():
        text = f"The words alone can explain that: {elsewhere} is not shown."
    elif not supported:
        text = f"Nor is it shown {elsewhere}."
    else:
        excess_L = np.where(beyond.supported_L, beyond.mean_L - beyond.mean_chance_L, -1.0)
        most = int(np.nan_to_num(excess_L, nan=-1.0).argmax())
        text = (
            f"It is not the words alone in {supported} of {len(layers)} layers: there the same "
            f"token goes to other experts under another {kind}. Most in layer {layers[most]}, for "
            f"{beyond.mean_L[most]:.0%} of the choices, where chance gives "
            f"{beyond.mean_chance_L[most]:.0%}."
        )
    return Said(f"{kind.capitalize()} or words?", text, not unknown and bool(supported))


def tokens(findings: Findings) -> Said | None:
    """How well the token alone predicts where it goes."""
    found = findings.explained
    if found is None or "token" not in found.predictors:
        return None
    which, layers = found.predictors.index("token"), findings.moe_layers
    told = []
    for layer in sorted({0, len(layers) - 1}):
        low, high = found.accuracy_interval_LJ2[layer, which]
        told.append(
            f"in layer {layers[layer]} it names {found.accuracy_LJ[layer, which]:.0%} of the first "
            f"choices{_between(low, high, percent=True)}, where always naming the busiest expert "
            f"is right for {found.majority_L[layer]:.0%}"
        )
    sure = bool((found.explained_interval_LJ2[:, which, 0] > 0).all())
    opening = "Knowing the token alone helps to predict its first expert" if sure else (
        "Whether knowing the token alone helps to predict its first expert cannot be determined"
    )  # fmt: skip
    return Said("Tokens", f"{opening}: {'; '.join(told)}.", sure)


def ablated(ablations: Ablations) -> Said | None:
    """Whether experts that look special matter to their domain."""
    rows = [row for row in ablations.rows if not row.control]
    if not rows:
        return None
    mattering = [row for row in rows if row.matters_more]
    done = {"silence": "silenced", "swap": "swapped"}.get(ablations.mode, "changed")
    text = (
        f"{len(rows)} {'expert that looks' if len(rows) == 1 else 'experts that look'} "
        f"specialised {'was' if len(rows) == 1 else 'were'} {done}, one at a time. "
    )
    if not mattering:
        text += "None of them was shown to matter more to its domain than to other text."
        return Said("Does it matter?", text, False)
    strongest = sorted(mattering, key=lambda row: -row.difference)[:_MOST_NAMED]
    text += (
        f"{len(mattering)} matter{'s' if len(mattering) == 1 else ''} more to "
        f"{'its' if len(mattering) == 1 else 'their'} domain than elsewhere: "
        + "; ".join(
            f"expert {row.expert} of layer {row.layer} to {row.domain}, whose loss rises by "
            f"{row.difference:.3f} {ablations.unit} more"
            f"{_between(*row.difference_interval_2, digits=3)}"
            for row in strongest
        )
        + ("; and others" if len(mattering) > _MOST_NAMED else "")
        + "."
    )
    beyond = sum(row.tokens_verdict == BEYOND_TOKENS for row in mattering)
    text += (
        " That more is lost there than the same tokens lose elsewhere is shown for "
        f"{beyond or 'none'} of the {len(mattering)}."
    )
    rest = len(rows) - len(mattering)
    if rest:
        text += f" Of the other {rest} that cannot be said."
    return Said("Does it matter?", text, True)


def repeated(findings: Findings) -> Said | None:
    """Whether neighbouring tokens share their first choice more often than shuffled ones."""
    found = findings.repetition
    if found is None:
        return None
    layers, domains = found.first_LM.shape
    excess_L = (found.first_LM - found.first_shuffled_LM).mean(axis=1)
    error_L = np.sqrt(np.square(found.first_error_LM).sum(axis=1)) / domains
    # Two-sided and corrected for the number of layers (Bonferroni).
    errors = NormalDist().inv_cdf(1 - SIGNIFICANCE / 2 / layers)
    more = int((excess_L > errors * error_L).sum())
    fewer = int((excess_L < -errors * error_L).sum())
    rates = (
        f"{found.first_LM.mean():.0%} of the time, {found.first_shuffled_LM.mean():.0%} with the "
        "same tokens shuffled"
    )
    if not more and not fewer:
        return Said(
            "Neighbours",
            f"Whether neighbouring tokens share their first expert more often than chance cannot "
            f"be determined ({rates}).",
            False,
        )
    parts = [f"more often in {more}"] * bool(more) + [f"less often in {fewer}"] * bool(fewer)
    return Said(
        "Neighbours",
        f"A token and the next have the same first expert {rates}: {' and '.join(parts)} of "
        f"{layers} layers, beyond chance.",
        True,
    )


def together(findings: Findings) -> Said | None:
    """Pairs of experts that are chosen for the same tokens."""
    found = findings.coactivation
    if found is None:
        return None
    if not found.pairs:
        return Said(
            "Pairs",
            "Whether any two experts are chosen together more or less often than by chance cannot "
            "be determined.",
            False,
        )
    first = found.pairs[0]
    a, b = first.experts
    return Said(
        "Pairs",
        f"{len(found.pairs)} pairs of experts are chosen together more, or less, often than their "
        f"loads predict. Most out of line: {a} and {b} of layer "
        f"{findings.moe_layers[first.layer]}, "
        f"{first.ratio:.1f} times as often as by chance"
        f"{_between(first.low, first.high, digits=1)}.",
        True,
    )


def cached(findings: Findings) -> Said | None:
    """What a cache of a quarter of the experts would hold, and how much order adds to it."""
    found = findings.caching
    if found is None:
        return None
    # With room for one token's experts only, no rule has anything to choose.
    size = max(findings.top_k + 1, findings.num_experts // 4)
    if size >= findings.num_experts:
        return None
    at, rates = size - 1, found.lru
    low, high = rates.mean_interval_E2[at]
    sure = bool(low > rates.shuffled_E[at])
    return Said(
        "Caching",
        f"A cache of {size} of {findings.num_experts} experts in each layer, from which the least "
        f"recently used goes, would hold {rates.mean_E[at]:.0%} of those wanted"
        f"{_between(low, high, percent=True)}; with the tokens in random order "
        f"{rates.shuffled_E[at]:.0%}, the best possible {found.oracle.mean_E[at]:.0%}."
        + ("" if sure else " Whether the order of the text helps cannot be determined."),
        sure,
    )


def single_documents(findings: Findings) -> Said | None:
    """Domains about whose noise nothing is known."""
    pairs = zip(findings.domains, findings.documents_M, strict=True)
    single = [name for name, documents in pairs if documents < 2]
    if not single:
        return None
    more = len(single) - _MOST_NAMED
    names = ", ".join(single[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
    return Said(
        "Caution",
        f"Only one document was read of {names}. How much such text varies cannot be known from "
        "it, so its own numbers have no interval.",
        False,
    )


def _plural(kind: str) -> str:
    return f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"


def _between(
    low: float | Floats, high: float | Floats, *, percent: bool = False, digits: int = 2
) -> str:
    """An interval in brackets; or that there is none."""
    if np.isnan(low) or np.isnan(high):
        return " (no interval: too few documents)"
    form = ".0%" if percent else f".{digits}f"
    if percent and f"{low:{form}}" == f"{high:{form}}":
        form = ".1%"
    return f" (95 % interval {low:{form}} to {high:{form}})"
