"""What the page's script draws, as one value that JSON can hold, within a given size."""

from __future__ import annotations

from typing import Any

import numpy as np

from moestro.probe.measures.measure import Findings, to_json
from moestro.probe.measures.saturation import Saturation
from moestro.probe.recording.traces import Trace
from moestro.probe.report.charts import charts
from moestro.probe.report.samples import SNIPPET, Samples, packed, quantised, without_dropped
from moestro.probe.report.token_text import TokenText, visible

_CELLS = 200_000  # of expert × domain tables
_CELLS_WITH_INTERVALS = 80_000
_TOKENS = 30_000  # typical tokens of all experts together
_FULL = 50_000  # what a share of 1 is as 16 bits; 65535 stands for NaN


def view(
    findings: Findings,
    trace: Trace,
    token_text: TokenText,
    saturation: Saturation | None = None,
    detail: float = 1.0,
) -> dict[str, Any]:
    """All that the script draws.

    Args:
        findings: All measures of the trace.
        trace: What they are of.
        token_text: Text of its tokens.
        saturation: How early in training the routing was settled.
        detail: 1 for the usual size; less shows fewer layers, tokens and passages.
    """
    layers = shown_layers(findings, detail)
    trace = without_dropped(trace)
    samples = Samples(trace, layers, token_text)
    cells = len(layers) * findings.table_LME[0].size
    with_intervals = cells <= _CELLS_WITH_INTERVALS * detail
    chosen = list(layers)
    relative_LE = findings.load.share_LE * findings.num_experts
    relative_LE2 = findings.load.share_interval_LE2 * findings.num_experts
    low_LME, high_LME = np.moveaxis(findings.table_interval_LME2[chosen], -1, 0)
    result: dict[str, Any] = {
        "layers": [findings.moe_layers[layer] for layer in layers],
        "all_layers": list(findings.moe_layers),
        "first_layer": layers.index(most_special(findings, layers)),
        "experts": findings.num_experts,
        "top_k": findings.top_k,
        "places": trace.experts_TLK.shape[2],
        "largest_weight": max(1.0, float(trace.weights_TLK.max(initial=0.0))),
        "domains": [visible(name) for name in findings.domains],
        "load": _rounded(to_json(relative_LE), 3),
        "load_low": _rounded(to_json(relative_LE2[..., 0]), 3),
        "load_high": _rounded(to_json(relative_LE2[..., 1]), 3),
        "table": {
            "share": quantised(findings.table_LME[chosen], _FULL, np.uint16),
            "low": quantised(low_LME, _FULL, np.uint16) if with_intervals else None,
            "high": quantised(high_LME, _FULL, np.uint16) if with_intervals else None,
            "sure": packed(findings.table_supported_LME[chosen].astype(np.uint8)),
        },
        "tokens": _typical(findings, samples, detail),
        "snippets": samples.snippets(int(120_000 * detail)),
        "passages": samples.passages(int(750_000 * detail)),
        "charts": {
            name: _rounded(to_json(chart), 4)
            for name, chart in charts(findings, layers, saturation).items()
        },
    }
    return {**result, "strings": list(samples.strings)}


def shown_layers(findings: Findings, detail: float = 1.0) -> tuple[int, ...]:
    """The mixture layers, evenly spaced and with the last, that the page shows in detail."""
    total = len(findings.moe_layers)
    cells = len(findings.domains) * findings.num_experts
    most = min(
        int(_CELLS * detail) // cells, int(120_000 * detail) // (SNIPPET * findings.num_experts)
    )
    count = max(1, min(total, most))
    return tuple(sorted({round((index + 1) * total / count) - 1 for index in range(count)}))


def most_special(findings: Findings, layers: tuple[int, ...]) -> int:
    """The shown layer that tells the domains apart best; the last if none does beyond chance."""
    if not findings.specialisation:
        return layers[-1]
    found = findings.specialisation[0]
    supported = [layer for layer in layers if found.supported_L[layer]]
    excess_L = found.mean_L - found.mean_chance_L
    return max(supported, key=lambda layer: float(excess_L[layer]), default=layers[-1])


def _typical(findings: Findings, samples: Samples, detail: float) -> list[list[list[list[Any]]]]:
    """By layer and expert: [number of its text, count, rate, lift, lowest lift, sure]."""
    found, experts = findings.tokens, range(findings.num_experts)
    each = int(np.clip(_TOKENS * detail // (len(samples.layers) * len(experts)), 3, 10))
    columns = (found.token_LEX, found.count_LEX, found.rate_LEX, found.lift_LEX, found.low_LEX,
               found.supported_LEX)  # fmt: skip

    def of_expert(at: tuple[int, int]) -> list[list[Any]]:
        entries = zip(*(column_LEX[at][:each].tolist() for column_LEX in columns), strict=True)
        return [
            [samples.number(samples.token_text.name(token)), count, round(rate, 3),
             round(lift, 2), round(low, 2), sure]
            for token, count, rate, lift, low, sure in entries
            if token >= 0
        ]  # fmt: skip

    return [[of_expert((layer, expert)) for expert in experts] for layer in samples.layers]


def _rounded(value: Any, digits: int) -> Any:
    """What JSON can hold, with so many digits behind the point."""
    if isinstance(value, dict):
        return {name: _rounded(each, digits) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each, digits) for each in value]
    return round(value, digits) if isinstance(value, float) else value
