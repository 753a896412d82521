"""Every table of the findings: its rows, and what a page and a terminal show of them.

Column names are those of the fields in probe.json, without their axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import numpy as np

from moestro.probe.ablation.effects import Ablation, Ablations
from moestro.probe.measures.measure import Findings
from moestro.probe.measures.saturation import Saturation
from moestro.probe.measures.specialise import Specialisation
from moestro.probe.report.table import Row, Table, View, fields, rows

_SURE = "* beyond chance, all that is looked at considered"
_MOST_ROWS = 120


def tables(
    findings: Findings,
    ablations: Ablations | None = None,
    saturation: Saturation | None = None,
    name: Callable[[int], str] | None = None,
    layer: int | None = None,
) -> Iterator[Table]:
    """Every table that the findings allow.

    Args:
        findings: From `moestro.probe.measure`.
        ablations: What changing single experts did.
        saturation: How early in training the routing was settled.
        name: Text of a token id, for a column of it; unset: ids only.
        layer: Number of the layer whose experts a terminal shows; unset: the last mixture's.
    """
    yield _layers(findings)
    yield _load(findings)
    yield _experts_by_domain(findings, findings.moe_layers[-1] if layer is None else layer)
    yield _tokens(findings, name)
    for found in findings.specialisation:
        yield _specialisation(findings, found)
    for table in (_explained, _repetition, _caching, _coactivation, _overlap):
        yield from table(findings)
    if ablations is not None:
        yield _ablation(ablations)
    if saturation is not None:
        yield _saturation(saturation)
    yield _text(findings)


def _layers(findings: Findings) -> Table:
    load, entropy, margin = findings.load, findings.entropy, findings.margin
    columns = fields("L", load, "imbalance_L imbalance_interval_L2")
    columns |= fields("L", load, "variation_L variation_interval_L2")
    columns["dead"] = [len(dead) for dead in load.dead_L]
    columns |= fields("L", load, "dropped_L dropped_interval_L2")
    page = (
        "layer: {layer} | busiest ÷ equal share: {imbalance:.2f}{imbalance_~:.2f} | "
        "variation: {variation:.2f}{variation_~:.2f} | unused: {dead} | "
        "no room: {dropped:.1%}{dropped_~:.1%}"
    )
    terminal = (
        "layer: {layer} | max / mean: {imbalance:.2f}{imbalance_~:.2f} | CV: {variation:.2f} | "
        "dead: {dead} | dropped: {dropped:.1%}"
    )
    if entropy is not None:
        columns |= fields("L", entropy, "balance_L balance_interval_L2 spread_L spread_interval_L2")
        page += " | spread of a token's choice: {spread:.2f}{spread_~:.2f}"
        terminal += " | overall: {balance:.3f} | by token: {spread:.3f}"
    if margin is not None:
        columns |= fields("L", margin, "margin=mean_L margin_interval=interval_L2")
        page += " | lead of the last chosen: {margin:.3f}{margin_~:.3f}"
    return Table(
        "layers",
        rows({"layer": findings.moe_layers}, **columns),
        View(
            "Balance of each layer, with 95 % intervals. Variation: standard deviation of the "
            "loads over their mean. Spread: 0 if the router is sure of one expert, 1 if all are "
            "alike to it. Lead: how far, in probability, the last expert chosen is ahead of the "
            "next.",
            page,
        ),
        View(
            "Load, and entropy of the router overall and by token (1 = spread over all experts); "
            "in brackets the 95 % interval over documents",
            terminal,
        ),
    )


def _load(findings: Findings) -> Table:
    axes = {"layer": findings.moe_layers, "expert": range(findings.num_experts)}
    columns = fields("LE", findings.load, "share_LE interval=share_interval_LE2")
    return Table("load", rows(axes, **columns, equal_share=1 / findings.num_experts))


def _experts_by_domain(findings: Findings, layer: int) -> Table:
    equal = 1 / findings.num_experts
    axes = {
        "layer": findings.moe_layers,
        "domain": findings.domains,
        "expert": range(findings.num_experts),
    }
    columns = fields("LME", findings, "share=table_LME interval=table_interval_LME2")
    columns["equal_share"] = equal
    columns |= fields("LME", findings, "p_value=table_p_value_LME supported=table_supported_LME")
    terminal = View(
        f"Layer {layer}: share of each domain's assignments by expert (equal share {equal:.1%}; "
        f"{_SURE})",
        "expert: {expert} | {domain}: {share:.1%}{supported:*}",
        by="expert",
        where=lambda row: row["layer"] == layer,
    )
    return Table("experts_by_domain", rows(axes, **columns), terminal=terminal)


def _tokens(findings: Findings, name: Callable[[int], str] | None) -> Table:
    found = findings.tokens
    _, experts, ranks = found.token_LEX.shape
    axes = {"layer": findings.moe_layers, "expert": range(experts), "_rank": range(ranks)}
    columns = fields("LEX", found, "token_LEX")
    if name is not None:
        text = np.frompyfunc(lambda token: name(token) if token >= 0 else "", 1, 1)
        columns["text"] = text(found.token_LEX)
    columns |= fields("LEX", found, "count_LEX rate_LEX lift_LEX low_LEX supported_LEX")
    return Table("tokens", (row for row in rows(axes, **columns) if row["token"] >= 0))


def _specialisation(findings: Findings, found: Specialisation) -> Table:
    axes = {"grouping": [found.grouping], "layer": findings.moe_layers, "label": found.labels}
    columns = fields(
        "LM",
        found,
        "documents_M distance_LM interval_LM2 chance_LM chance_high_LM layer_mean=mean_L "
        "layer_chance=mean_chance_L _high=mean_chance_high_L layer_p_value=p_value_L "
        "layer_supported=supported_L",
    )
    columns |= fields(
        "LM",
        found.beyond,
        "shared_tokens=shared_M shared_distance=distance_LM tokens_alone=tokens_LM "
        "tokens_alone_interval=tokens_interval_LM2 excess_LM excess_interval=interval_LM2 "
        "excess_chance=chance_LM excess_chance_high=chance_high_LM excess_layer_mean=mean_L "
        "excess_layer_chance=mean_chance_L _excess_high=mean_chance_high_L "
        "excess_layer_p_value=p_value_L excess_layer_supported=supported_L",
    )
    for kind, each in (("", found), ("_excess", found.beyond)):
        pairs = zip(each.p_value_L, each.supported_L, strict=True)
        columns[f"{kind}_verdict"] = np.array([[_verdict(*pair)] for pair in pairs])
    return Table(
        "specialisation",
        rows(axes, **columns),
        View(
            f"How far the experts of each layer tell the text apart by {found.grouping}: share of "
            "choices that would have to move, and of them what the words do not explain. Up to: "
            "95 % of what chance gives. Yes: at a rate of error of 5 % over all layers together.",
            "layer: {layer} | apart: {layer_mean:.1%} | "
            "by chance: {layer_chance:.1%}, up to {_high:.1%} | beyond chance?: {_verdict} | "
            "not by words: {excess_layer_mean:.1%} | "
            "by chance: {excess_layer_chance:.1%}, up to {_excess_high:.1%} | "
            "beyond chance?: {_excess_verdict}",
            by="layer",
        ),
        View(
            f"Specialisation by {found.grouping}: distance from the average use of experts (0 to "
            "1), where chance deals whole documents at random; beyond tokens: what token identity "
            f"does not explain ({_SURE})",
            "layer: {layer} | mean: {layer_mean:.3f}{layer_supported:*} | "
            "chance: {layer_chance:.3f} | "
            "beyond tokens: {excess_layer_mean:.3f}{excess_layer_supported:*} | "
            "chance: {excess_layer_chance:.3f} | {label}: {distance:.3f}",
            by="layer",
        ),
    )


def _verdict(p_value: float, supported: bool) -> str:
    if np.isnan(p_value):
        return "undetermined"
    return f"{'yes' if supported else 'no'} (p = {p_value:.3f})"


def _explained(findings: Findings) -> Iterator[Table]:
    found = findings.explained
    if found is None:
        return
    columns = fields(
        "LJ",
        found,
        "accuracy_LJ interval=accuracy_interval_LJ2 majority_L majority_interval_L2 explained_LJ "
        "explained_interval_LJ2 unseen_J",
    )
    page = View(
        "Share of first choices predicted in documents that the predictors were not fitted to, "
        "with 95 % intervals",
        "layer: {layer} | busiest expert: {majority:.1%}{majority_~:.1%} | "
        "by {predictor}: {accuracy:.1%}{~:.1%}",
        by="layer",
    )
    axes = {"layer": findings.moe_layers, "predictor": found.predictors}
    yield Table("explained", rows(axes, **columns), page)


def _repetition(findings: Findings) -> Iterator[Table]:
    found = findings.repetition
    if found is None:
        return
    columns = fields(
        "LM",
        found,
        "first_LM first_error_LM first_shuffled_LM first_uniform any_LM any_error_LM "
        "any_shuffled_LM any_uniform",
    )
    yield Table(
        "repetition",
        rows({"layer": findings.moe_layers, "domain": findings.domains}, **columns),
        View(
            "How often a token and the next share their first expert, or any, with standard "
            f"errors; drawn at random: {found.first_uniform:.1%} and {found.any_uniform:.1%}"
            + ("" if found.any_LM.size <= _MOST_ROWS else "; all rows are in repetition.csv"),
            "layer: {layer} | domain: {domain:name} | "
            "first: {first:.1%} ± {first_error:.1%} | shuffled: {first_shuffled:.1%} | "
            "any: {any:.1%} ± {any_error:.1%} | shuffled: {any_shuffled:.1%}",
            most=_MOST_ROWS,
        ),
        View(
            "Repetition: the same first choice in neighbouring tokens (in brackets: the same "
            f"tokens shuffled; uniform routing: {found.first_uniform:.1%})",
            "layer: {layer} | {domain}: {first:.1%} ({first_shuffled:.1%})",
            by="layer",
        ),
    )


def _caching(findings: Findings) -> Iterator[Table]:
    found, experts = findings.caching, findings.num_experts
    if found is None:
        return
    names = ("least recently used goes", "least often used goes", "best possible")
    axes = {"layer": findings.moe_layers, "size": range(1, experts + 1)}
    parts = []
    for policy, name in zip(("lru", "lfu", "oracle"), names, strict=True):
        columns = fields(
            "LE",
            getattr(found, policy),
            "rate_LE interval_LE2 shuffled_LE uniform_E mean_over_layers=mean_E mean_interval_E2 "
            "_shuffled=shuffled_E",
        )
        parts.append(rows({"policy": [policy], **axes}, **columns, _name=name))
    sizes = {max(1, round(experts * part / 16)) for part in range(1, 17)}
    page = View(
        f"Hit rates, mean over layers, with 95 % intervals, of {found.tokens:,} tokens of "
        f"{found.documents:,} documents; each sequence starts with an empty cache",
        "experts in the cache: {size} | {_name}: {mean_over_layers:.1%}{mean_~:.1%} | "
        "first policy, tokens shuffled: {_shuffled:.1%} | "
        "first policy, experts at random: {uniform:.1%}",
        by="size",
        where=lambda row: row["size"] in sizes and row["layer"] == findings.moe_layers[0],
    )
    yield Table("caching", chain.from_iterable(parts), page)


def _coactivation(findings: Findings) -> Iterator[Table]:
    found, experts = findings.coactivation, range(findings.num_experts)
    if found is None:
        return
    columns = fields(
        "LEE",
        found,
        "given_LEE independent_LEE ratio_LEE ratio_interval_LEE2 p_value_LEE",
    )
    pairs = rows({"layer": findings.moe_layers, "expert": experts, "other": experts}, **columns)
    yield Table("coactivation", (row for row in pairs if row["expert"] != row["other"]))
    page = View(
        "Pairs chosen together most above, and most below, what their loads give, beyond chance "
        "at a rate of error of 5 % over all pairs",
        "layer: {layer} | experts: {experts[0]} and {experts[1]} | "
        "together: {together:.2%} | by loads: {independent:.2%} | "
        "ratio (95 % interval): {ratio:.2f}{~:.2f}",
    )
    most = [
        {**pair._asdict(), "layer": findings.moe_layers[pair.layer]}
        for pair in found.pairs[:10] + found.pairs[10:][-10:]
    ]
    if most:
        yield Table("pairs", most, page, is_file=False)


def _overlap(findings: Findings) -> Iterator[Table]:
    found, layers = findings.overlap, findings.moe_layers
    if found is None:
        return
    columns = fields("L", found, "information_L interval_L2 chance_L")
    page = View(
        "What the first expert of one layer says about that of the next: 0 nothing, 1 all (95 % "
        "interval); what finite text gives by chance is subtracted",
        "layers: {layer} → {next_layer} | information: {information:.2f}{~:.2f} | "
        "subtracted: {chance:.3f}",
    )
    yield Table("overlap", rows({"layer": layers[:-1]}, next_layer=layers[1:], **columns), page)


def _ablation(found: Ablations) -> Table:
    def row(one: Ablation) -> Row:
        return {
            "mode": found.mode,
            "unit": found.unit,
            **fields(
                "", one,
                "layer expert other domain control own elsewhere elsewhere_interval_2 difference "
                "difference_interval_2 p_own p_elsewhere p_more verdict tokens_verdict "
                "matters_more",
            ),
            **{f"change: {name}": one.change_M[at] for at, name in enumerate(found.domains)},
            "_experts": f"{one.expert}" + (f" ↔ {one.other}" if one.other is not None else ""),
            "_compared": " (for comparison)" if one.control else "",
            "_control": " (control)" if one.control else "",
            "_tokens": f"; {one.tokens_verdict}" if one.tokens_verdict else "",
        }  # fmt: skip

    return Table(
        "ablation",
        map(row, found.rows),
        View(
            f"Rise of the loss ({found.unit}) when one expert is changed ({found.mode}), with "
            "95 % intervals over documents",
            "layer: {layer} | expert: {_experts}{_compared} | domain: {domain:name} | "
            "rise there: {own:+.3f} | rise elsewhere: {elsewhere:+.3f}{elsewhere_~:+.3f} | "
            "difference: {difference:+.3f}{difference_~:+.3f} | verdict: {verdict}{_tokens}",
            most=_MOST_ROWS,
        ),
        View(
            f"Ablation ({found.mode}): rise of the held-out loss, {found.unit}, without one "
            "expert; in brackets the 95 % interval over documents",
            "layer: {layer} | expert: {expert} | domain: {domain}{_control} | "
            "rise there: {own:+.4f} | rise elsewhere: {elsewhere:+.4f} | verdict: {verdict}",
        ),
    )


def _saturation(found: Saturation) -> Table:
    columns = fields(
        "JL",
        found,
        "share_JL interval_JL2 chance_at_loads=loads_JL chance=random mean_over_layers=mean_J "
        "mean_interval_J2",
    )
    columns["_loads"] = found.loads_JL.mean(axis=1, keepdims=True)
    return Table(
        "saturation",
        rows({"step": found.steps_J.tolist(), "layer": found.moe_layers}, **columns),
        View(
            "Share of the last checkpoint's choices that an earlier one made already, mean over "
            "layers, with 95 % intervals",
            "step: {step:,} | as at the end: {mean_over_layers:.1%}{mean_~:.1%} | "
            "chance at these loads: {_loads:.1%} | chance: {chance:.1%}",
            by="step",
        ),
        View(
            "Saturation: share of the last checkpoint's choices that an earlier one made already "
            f"(at random: {found.random:.1%}); in brackets the 95 % interval over documents",
            "step: {step} | all layers: {mean_over_layers:.1%}{mean_~:.3f} | "
            "layer {layer}: {share:.1%}",
            by="step",
        ),
    )


def _text(findings: Findings) -> Table:
    columns = fields("M", findings, "tokens_M documents_M")
    cells = "domain: {domain:name} | tokens: {tokens:,} | documents: {documents:,}"
    found = rows({"domain": findings.domains}, **columns)
    return Table("text", found, View("The text that was read", cells), is_file=False)
