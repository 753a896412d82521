"""Figures of a comparison: held-out bits per byte against compute and against wall time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moestro.train.compare import Curve
from moestro.train.evaluate import ALL

# Okabe and Ito's blue and vermilion: apart for every kind of colour vision.
STYLES: dict[str, dict[str, Any]] = {
    "moe": {"color": "#0072B2", "marker": "o", "label": "mixture of experts"},
    "dense": {"color": "#D55E00", "marker": "s", "label": "dense twin"},
}


def comparison_figure(curves: list[Curve], path: Path) -> None:
    """Draw both panels and write a PNG."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for curve in curves:
        bits = [point.bits_per_byte[ALL] for point in curve.points]
        _line(left, curve, [point.train_flops / 1e12 for point in curve.points], bits)
        _line(right, curve, [point.seconds / 60 for point in curve.points], bits)
    goals = [curve.final.bits_per_byte[ALL] for curve in curves if curve.kind == "dense"]
    for axes in (left, right):
        for goal in goals:
            axes.axhline(goal, color=STYLES["dense"]["color"], lw=0.8, ls=":")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_xlabel("training compute (TFLOP, counted)")
    right.set_xlabel("time in training steps (minutes)")
    left.set_ylabel("held-out bits per byte")
    _zoom(left, curves)
    left.legend(frameon=False)
    figure.suptitle("A mixture of experts and its dense twin on the same text")
    figure.savefig(path, dpi=150)


def _line(axes: Axes, curve: Curve, cost: list[float], bits: list[float]) -> None:
    style = dict(STYLES[curve.kind])
    if axes.lines and any(line.get_label() == style["label"] for line in axes.lines):
        style["label"] = "_again"
    axes.plot(cost, bits, ms=3.5, lw=1.6, **style)


def _zoom(axes: Axes, curves: list[Curve]) -> None:
    """Leave the first steep fall out of sight: the end is what is compared."""
    finals = [curve.final.bits_per_byte[ALL] for curve in curves]
    seen = [point.bits_per_byte[ALL] for c in curves for point in c.points[len(c.points) // 5 :]]
    margin = 0.05 * (max(seen) - min(finals)) or 0.01
    axes.set_ylim(min(finals) - margin, max(seen) + margin)
