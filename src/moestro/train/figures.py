"""Figures of a comparison: held-out bits per byte against compute and time, and its scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moestro.config import RunConfig
from moestro.data.domains import ALL
from moestro.train.compare import (
    MIXTURE,
    TWIN,
    Comparison,
    Curve,
    Verdict,
    compared_mixtures,
    fitted,
    judge,
    mean_loss,
)
from moestro.train.scaling import Axis, Law, Mixture, mixture_of, predict

# Okabe and Ito's colours: apart for every kind of colour vision. Vermilion is the twin's.
BLUE, VERMILION = "#0072B2", "#D55E00"
COLORS, MARKERS = (BLUE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"), "o^vD"


def comparison_figure(curves: list[Curve], path: Path) -> None:
    """Draw both panels and write a PNG."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    styles = _styles(curves)
    for curve in curves:
        bits = [point.bits_per_byte[ALL] for point in curve.points]
        compute = [point.train_flops / 1e12 for point in curve.points]
        _line(left, styles[curve.kind], compute, bits)
        _line(right, styles[curve.kind], [point.seconds / 60 for point in curve.points], bits)
    goals = [curve.final.bits_per_byte[ALL] for curve in curves if curve.kind == TWIN]
    for axes in (left, right):
        for goal in goals:
            axes.axhline(goal, color=VERMILION, lw=0.8, ls=":")
        _plain(axes)
    left.set_xlabel("training compute (TFLOP, counted)")
    right.set_xlabel("time in training steps (minutes)")
    left.set_ylabel("held-out bits per byte")
    _zoom(left, curves)
    left.legend(frameon=False)
    what = "A mixture of experts and its" if len(styles) < 3 else "Mixtures of experts and their"
    figure.suptitle(f"{what} dense twin on the same text")
    figure.savefig(path, dpi=150)


def _styles(curves: list[Curve]) -> dict[str, dict[str, Any]]:
    """How each kind of model is drawn, the same for all its seeds."""
    styles = {TWIN: {"color": VERMILION, "marker": "s", "label": "dense twin"}}
    kinds = [kind for kind in dict.fromkeys(curve.kind for curve in curves) if kind != TWIN]
    for number, kind in enumerate(kinds):
        styles[kind] = {
            "color": COLORS[number % len(COLORS)],
            "marker": MARKERS[number // len(COLORS) % len(MARKERS)],
            "label": "mixture of experts" if kind == MIXTURE else kind,
        }
    return styles


def _line(axes: Axes, style: dict[str, Any], cost: list[float], bits: list[float]) -> None:
    """One run's; a kind is named once."""
    if any(line.get_label() == style["label"] for line in axes.lines):
        style = {**style, "label": "_again"}
    axes.plot(cost, bits, ms=3.5, lw=1.6, **style)


def _zoom(axes: Axes, curves: list[Curve]) -> None:
    """Leave the first steep fall out of sight: the end is what is compared."""
    finals = [curve.final.bits_per_byte[ALL] for curve in curves]
    seen = [point.bits_per_byte[ALL] for c in curves for point in c.points[len(c.points) // 5 :]]
    margin = 0.05 * (max(seen) - min(finals)) or 0.01
    axes.set_ylim(min(finals) - margin, max(seen) + margin)


def scaling_figure(cfg: RunConfig, comparison: Comparison, curves: list[Curve], path: Path) -> None:
    """Compute and time saved, and final loss with the fitted laws, against experts; write a PNG.

    Against granularity where only that varies.
    """
    made, found = compared_mixtures(cfg, comparison), fitted(cfg, comparison, curves)
    axis: Axis = "experts" if len({m.experts for m in made}) > 1 else "granularity"
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    verdicts = judge(curves)
    groups = sorted({m.granularity if axis == "experts" else m.experts for m in made})
    for number, fixed in enumerate(groups):
        row = [m for m in made if fixed == (m.granularity if axis == "experts" else m.experts)]
        color = f"C{number}" if len(groups) > 1 else BLUE
        _shares(left, axis, row, verdicts, color, _label(axis, fixed))
        at = [_place(axis, m) for m in row]
        right.plot(at, [mean_loss(curves, m.name) for m in row], "o", color=color)
        for law in found:
            if (law.axis, law.fixed) == (axis, fixed):
                _law_line(right, law, at, mixture_of(cfg).top_k, color)
    right.axhline(mean_loss(curves, TWIN), color=VERMILION, lw=0.8, ls=":", label="dense twin")
    left.axhline(1, color=VERMILION, lw=0.8, ls=":")
    places = sorted({_place(axis, m) for m in made})
    left.set_xlim(places[0] / 1.15, places[-1] * 1.15)  # there may be no point to choose it by
    if all(line.get_xdata().size == 0 for line in left.get_lines()[:-1]):
        left.set_ylim(0, 1.2)
        left.text(0.5, 0.4, "none reached it", transform=left.transAxes, ha="center")
    for axes in (left, right):
        _plain(axes)
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [str(place) for place in places])
        axes.set_xlabel("experts" if axis == "experts" else "granularity")
        axes.legend(frameon=False)
    left.set_ylabel("share of the dense twin's cost for its loss")
    right.set_ylabel("held-out bits per byte at the end")
    figure.suptitle("More and finer experts beside the same dense twin")
    figure.savefig(path, dpi=150)


def _place(axis: Axis, mixture: Mixture) -> int:
    return mixture.experts if axis == "experts" else mixture.granularity


def _label(axis: Axis, fixed: int) -> str:
    return f"granularity {fixed}" if axis == "experts" else f"{fixed} experts"


def _shares(
    axes: Axes, axis: Axis, row: list[Mixture], verdicts: list[Verdict], color: str, label: str
) -> None:
    """Compute (solid) and time (dashed) that each mixture needed; gaps where it never got there."""
    for cost, style in (("compute", "-o"), ("time", "--s")):
        at, shares = [], []
        for mixture in row:
            values = [getattr(v, cost) for v in verdicts if v.kind == mixture.name]
            if None not in values:
                at.append(_place(axis, mixture))
                shares.append(sum(values) / len(values))
        axes.plot(at, shares, style, color=color, ms=4, lw=1.4, label=f"{cost}, {label}")


def _law_line(axes: Axes, law: Law, at: list[int], top_k: int, color: str) -> None:
    """The fitted law, between the points and twice as far."""
    low, high = min(at), 2 * max(at)
    places = [low * (high / low) ** (step / 40) for step in range(41)]
    losses = [predict(law, place, top_k) for place in places]
    axes.plot(
        places, losses, color=color, lw=1, alpha=0.6, label=f"law, {_label(law.axis, law.fixed)}"
    )
    if law.largest is not None and law.predicted is not None:
        axes.plot([law.largest], [law.predicted], "x", color=color, label="predicted from the rest")


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
