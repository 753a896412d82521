"""Charts as plain values, each measure beside what chance gives, for the page and for figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moestro.probe.measures.beyond import BeyondTokens
from moestro.probe.measures.bootstrap import Floats
from moestro.probe.measures.caching import Caching
from moestro.probe.measures.measure import Findings
from moestro.probe.measures.saturation import Saturation
from moestro.probe.measures.specialise import Specialisation

_SPARSE = 16  # layers up to which points stand alone; more are joined by lines


class Series(NamedTuple):
    """Points of one kind."""

    name: str  # in the legend; empty for none there
    y: Floats  # by place, NaN for no point
    colour: int | None  # its number, which has a shape too; None: neutral
    look: str  # dot, tick, dashed, dotted, or band (the interval alone)
    interval: Floats | None = None  # [..., 2]
    line: bool = False  # joins the dots, and makes the interval a band


class Chart(NamedTuple):
    """Series over places."""

    kind: str  # "lines" (places from left to right) or "rows" (one below the other)
    x: Sequence[Any]  # names of the places
    y_name: str
    series: Sequence[Series]  # in the order of drawing
    x_name: str = "layer"
    dense: bool = False  # the places are numbers close to each other
    percent: bool = True  # the values are shares


def charts(
    findings: Findings, layers: tuple[int, ...], saturation: Saturation | None = None
) -> dict[str, Chart | list[Chart]]:
    """Every chart of the page, by name; a list has one for each shown layer."""
    found: dict[str, Chart | list[Chart]] = {}
    for index, special in enumerate(findings.specialisation):
        if not np.isnan(special.mean_L).all():
            found[f"apart-{index}"] = _by_layer(
                findings, special, 0, "choices that would have to move", "95 % of chance"
            )
        found[f"labels-{index}"] = [_labels(special, layer) for layer in layers]
        if not np.isnan(special.beyond.mean_L).all():
            found[f"beyond-{index}"] = _by_layer(
                findings, special.beyond, 1, "choices that the words do not explain",
                "95 % of chance if words explain all",
            )  # fmt: skip
    if findings.explained is not None:
        found["explained"] = _explained(findings)
    if findings.repetition is not None:
        found["repetition"] = [_repetition(findings, layer) for layer in layers]
    if findings.caching is not None:
        found["caching"] = [caching_chart(findings.caching, layer) for layer in layers]
    if saturation is not None:
        found["saturation"] = _saturation(saturation)
    return found


def label_chart(
    findings: Findings,
    labels: Sequence[str],
    y_name: str,
    y_LM: Floats,
    interval_LM2: Floats,
    chance_LM: Floats,
    chance_name: str,
    uniform: float | None = None,
    percent: bool = True,
) -> Chart:
    """A measure of each label over the layers: ticks for its chance, a line for uniform routing."""
    nowhere_L, series = np.full(len(y_LM), np.nan), []
    if uniform is not None:
        series.append(Series("uniform routing", np.full(len(y_LM), uniform), None, "dashed"))
    for index, name in enumerate(labels):
        series += [
            Series(name, y_LM[:, index], index, "dot", interval_LM2[:, index]),
            Series("", chance_LM[:, index], index, "tick"),
        ]
    series.append(Series(chance_name, nowhere_L, None, "tick"))
    return Chart("lines", findings.moe_layers, y_name, series, percent=percent)


def caching_chart(found: Caching, layer: int | None = None) -> Chart:
    """Hit rates by size of the cache; of all layers on average unless one is given."""
    names = ("least recently used goes", "least often used goes", "best possible, with foresight")
    series = []
    for colour, (name, rates) in enumerate(
        zip(names, (found.lru, found.lfu, found.oracle), strict=True)
    ):
        rate_E, interval_E2 = rates.mean_E, rates.mean_interval_E2
        if layer is not None:
            rate_E, interval_E2 = rates.rate_LE[layer], rates.interval_LE2[layer]
        series.append(Series(name, rate_E, colour, "dot", interval_E2, line=True))
    shuffled_E = found.lru.shuffled_E if layer is None else found.lru.shuffled_LE[layer]
    series += [
        Series("least recently used, tokens shuffled", shuffled_E, 0, "dashed"),
        Series("experts drawn at random", found.lru.uniform_E, None, "dotted"),
    ]
    return Chart(
        "lines",
        list(range(1, len(found.full_E) + 1)),
        "share of wanted experts found there",
        series,
        "experts in the cache of each layer" if layer is None else
        "experts in the cache of this layer",
        dense=True,
    )  # fmt: skip


def errors(rate: Floats, error: Floats) -> Floats:
    """The interval of two standard errors. [..., 2]."""
    return np.stack((rate - 2 * error, rate + 2 * error), axis=-1)


def _up_to(high: Floats) -> Floats:
    """The band from 0 to `high`."""
    return np.stack((np.zeros_like(high), high), axis=-1)


def _by_layer(
    findings: Findings, found: Specialisation | BeyondTokens, colour: int, y_name: str, chance: str
) -> Chart:
    """The mean over labels by layer, beside the band of chance."""
    chance_L, band_L2 = found.mean_chance_L, _up_to(found.mean_chance_high_L)
    series = [
        Series(f"below this, {chance}", chance_L, None, "band", band_L2),
        Series("chance, on average", chance_L, None, "dashed"),
        Series("measured", found.mean_L, colour, "dot"),
    ]
    return Chart("lines", findings.moe_layers, y_name, series)


def _labels(found: Specialisation, layer: int) -> Chart:
    beyond, band_M2 = found.beyond, _up_to(found.chance_high_LM[layer])
    series = [
        Series("below this, 95 % of chance", found.chance_LM[layer], None, "band", band_M2),
        Series("distance from the average, with 95 % interval", found.distance_LM[layer], 0, "dot",
               found.interval_LM2[layer]),
    ]  # fmt: skip
    if not np.isnan(beyond.excess_LM[layer]).all():
        series += [
            Series("95 % of chance if words explain all", beyond.chance_high_LM[layer], 1, "tick"),
            Series("same token, other experts, with 95 % interval", beyond.excess_LM[layer], 1,
                   "dot", beyond.interval_LM2[layer]),
        ]  # fmt: skip
    return Chart("rows", found.labels, "share of choices", series)


def _explained(findings: Findings) -> Chart:
    found, line = findings.explained, len(findings.moe_layers) > _SPARSE
    assert found is not None
    series = [
        Series(f"knowing the {name}", found.accuracy_LJ[:, which], which % 4, "dot",
               found.accuracy_interval_LJ2[:, which], line)
        for which, name in enumerate(found.predictors)
    ]  # fmt: skip
    series.append(Series("always naming the busiest expert", found.majority_L, None, "dashed"))
    return Chart("lines", findings.moe_layers, "first choices predicted", series)


def _repetition(findings: Findings, layer: int) -> Chart:
    found = findings.repetition
    assert found is not None
    rate_M = found.first_LM[layer]
    uniform_M = np.full(len(rate_M), found.first_uniform)
    series = [
        Series("equal loads at random", uniform_M, None, "tick"),
        Series("the same tokens shuffled", found.first_shuffled_LM[layer], 1, "tick"),
        Series("measured, ± 2 standard errors", rate_M, 0, "dot",
               errors(rate_M, found.first_error_LM[layer])),
    ]  # fmt: skip
    return Chart("rows", findings.domains, "neighbours with the same first expert", series)


def _saturation(found: Saturation) -> Chart:
    """How early the routing of the last checkpoint was there, mean and outer layers."""
    series = [Series("mean of all layers", found.mean_J, 0, "dot", found.mean_interval_J2, True)]
    outer = sorted({0, len(found.moe_layers) - 1})
    for colour, layer in enumerate(outer if len(found.moe_layers) > 1 else [], start=1):
        name, interval_J2 = f"layer {found.moe_layers[layer]}", found.interval_JL2[:, layer]
        series.append(Series(name, found.share_JL[:, layer], colour, "dot", interval_J2, True))
    series += [
        Series("chance at these loads", found.loads_JL.mean(axis=1), None, "dashed"),
        Series("chance", np.full(len(found.mean_J), found.random), None, "dotted"),
    ]
    x_name = "step of training (the checkpoints, one beside the other)"
    steps = found.steps_J.tolist()
    return Chart("lines", steps, "choices already as at the end", series, x_name)
