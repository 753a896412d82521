"""The report's charts as plain values: what is measured, beside what chance gives.

A chart has a `kind`, "lines" (over layers or sizes) or "rows" (a row a domain), `x` labels, names
of its axes, and series; a series has a `name`, `y`, perhaps `low` and `high`, a `colour` (a number,
with a shape of its own) and a `look`: dot, tick, line, dashed, dotted or band.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moestro.probe.measures.bootstrap import Floats
from moestro.probe.measures.caching import Caching
from moestro.probe.measures.measure import Findings
from moestro.probe.measures.saturation import Saturation
from moestro.probe.measures.specialise import Specialisation

Chart = dict[str, Any]
_SPARSE = 16  # layers up to which points stand alone; more are joined by lines


def charts(findings: Findings, layers: tuple[int, ...]) -> dict[str, Chart | list[Chart]]:
    """Every chart that the findings allow, by name; a list has one for each shown layer."""
    found: dict[str, Chart | list[Chart]] = {}
    for index, special in enumerate(findings.specialisation):
        if not np.isnan(special.mean_L).all():
            found[f"apart-{index}"] = _apart(findings, special)
        found[f"labels-{index}"] = [_labels(special, layer) for layer in layers]
        if not np.isnan(special.beyond.mean_L).all():
            found[f"beyond-{index}"] = _beyond(findings, special)
    if findings.explained is not None:
        found["explained"] = _explained(findings)
    if findings.repetition is not None:
        found["repetition"] = [_repetition(findings, layer) for layer in layers]
    if findings.caching is not None:
        found["caching"] = [_caching(findings.caching, layer) for layer in layers]
    return found


def series(
    name: str,
    y: Floats,
    colour: int,
    look: str,
    interval: Floats | None = None,
    *,
    line: bool = False,
) -> dict[str, Any]:
    """One series; `interval` is [..., 2]."""
    result: dict[str, Any] = {
        "name": name,
        "y": numbers(y),
        "colour": colour,
        "look": look,
        "line": line,
    }
    if interval is not None:
        result |= {"low": numbers(interval[..., 0]), "high": numbers(interval[..., 1])}
    return result


def numbers(values: Floats) -> list[float | None]:
    """Four digits behind the point; None for NaN."""
    return [round(float(value), 4) if np.isfinite(value) else None for value in values]


def _over_layers(findings: Findings, y_name: str, content: list[dict[str, Any]]) -> Chart:
    return {
        "kind": "lines",
        "x": list(findings.moe_layers),
        "x_name": "layer",
        "y_name": y_name,
        "percent": True,
        "series": content,
    }


def _up_to(high: Floats) -> Floats:
    """The band from 0 to `high`."""
    return np.stack((np.zeros_like(high), high), axis=-1)


def _apart(findings: Findings, found: Specialisation) -> Chart:
    return _over_layers(
        findings,
        "choices that would have to move",
        [
            series("below this, 95 % of chance", found.mean_chance_L, 4, "band",
                   _up_to(found.mean_chance_high_L)),
            series("chance, on average", found.mean_chance_L, 4, "dashed"),
            series("measured", found.mean_L, 0, "dot"),
        ],
    )  # fmt: skip


def _beyond(findings: Findings, found: Specialisation) -> Chart:
    beyond = found.beyond
    return _over_layers(
        findings,
        "choices that the words do not explain",
        [
            series("below this, 95 % of chance if words explain all", beyond.mean_chance_L, 4,
                   "band", _up_to(beyond.mean_chance_high_L)),
            series("chance, on average", beyond.mean_chance_L, 4, "dashed"),
            series("measured", beyond.mean_L, 1, "dot"),
        ],
    )  # fmt: skip


def _labels(found: Specialisation, layer: int) -> Chart:
    beyond = found.beyond
    content = [
        series("below this, 95 % of chance", found.chance_LM[layer], 4, "band",
               _up_to(found.chance_high_LM[layer])),
        series("distance from the average, with 95 % interval", found.distance_LM[layer], 0, "dot",
               found.interval_LM2[layer]),
    ]  # fmt: skip
    if not np.isnan(beyond.excess_LM[layer]).all():
        content += [
            series("95 % of chance if words explain all", beyond.chance_high_LM[layer], 1, "tick"),
            series("same token, other experts, with 95 % interval", beyond.excess_LM[layer], 1,
                   "dot", beyond.interval_LM2[layer]),
        ]  # fmt: skip
    return {
        "kind": "rows",
        "x": list(found.labels),
        "y_name": "share of choices",
        "percent": True,
        "series": content,
    }


def _explained(findings: Findings) -> Chart:
    found = findings.explained
    assert found is not None
    content = [
        series(f"knowing the {name}", found.accuracy_LJ[:, which], which % 4, "dot",
               found.accuracy_interval_LJ2[:, which], line=len(findings.moe_layers) > _SPARSE)
        for which, name in enumerate(found.predictors)
    ]  # fmt: skip
    content.append(series("always naming the busiest expert", found.majority_L, 4, "dashed"))
    return _over_layers(findings, "first choices foretold", content)


def _repetition(findings: Findings, layer: int) -> Chart:
    found = findings.repetition
    assert found is not None
    rate_M, error_M = found.first_LM[layer], found.first_error_LM[layer]
    interval_M2 = np.stack((rate_M - 2 * error_M, rate_M + 2 * error_M), axis=-1)
    uniform_M = np.full(len(rate_M), found.first_uniform)
    return {
        "kind": "rows",
        "x": list(findings.domains),
        "y_name": "neighbours with the same first expert",
        "percent": True,
        "series": [
            series("equal loads at random", uniform_M, 4, "tick"),
            series("the same tokens shuffled", found.first_shuffled_LM[layer], 1, "tick"),
            series("measured, ± 2 standard errors", rate_M, 0, "dot", interval_M2),
        ],
    }


def _caching(found: Caching, layer: int) -> Chart:
    names = ("least recently used goes", "least often used goes", "best possible, with foresight")
    content = [
        series(name, rates.rate_LE[layer], colour, "dot", rates.interval_LE2[layer], line=True)
        for colour, (name, rates) in enumerate(
            zip(names, (found.lru, found.lfu, found.oracle), strict=True)
        )
    ]
    content.append(
        series("least recently used, tokens shuffled", found.lru.shuffled_LE[layer], 0, "dashed")
    )
    content.append(series("experts drawn at random", found.lru.uniform_E, 4, "dotted"))
    return {
        "kind": "lines",
        "dense": True,
        "x": list(range(1, len(found.full_E) + 1)),
        "x_name": "experts in the cache of this layer",
        "y_name": "share of wanted experts found there",
        "percent": True,
        "series": content,
    }


def saturation_chart(found: Saturation) -> Chart:
    """How early the routing of the last checkpoint was there, mean and outer layers."""
    content = [
        series("mean of all layers", found.mean_J, 0, "dot", found.mean_interval_J2, line=True)
    ]
    outer = sorted({0, len(found.moe_layers) - 1})
    for colour, layer in enumerate(outer if len(found.moe_layers) > 1 else [], start=1):
        name, interval_J2 = f"layer {found.moe_layers[layer]}", found.interval_JL2[:, layer]
        content.append(
            series(name, found.share_JL[:, layer], colour, "dot", interval_J2, line=True)
        )
    content.append(series("chance at these loads", found.loads_JL.mean(axis=1), 4, "dashed"))
    content.append(series("chance", np.full(len(found.mean_J), found.random), 4, "dotted"))
    return {
        "kind": "lines",
        "x": found.steps_J.tolist(),
        "x_name": "step of training (the checkpoints, one beside the other)",
        "y_name": "choices already as at the end",
        "percent": True,
        "series": content,
    }
