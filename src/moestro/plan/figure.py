"""The figure of a plan: total against active parameters of each model, and what a token costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moestro.plan.report import Report
from moestro.plan.sizes import flops_text, number_text, parameters_text

# Okabe and Ito's blue and vermilion: apart for every kind of colour vision.
TOTAL, ACTIVE, COST = "#0072B2", "#D55E00", "#555555"
ROOM = 3.2
"""How far beyond its largest value a logarithmic axis reaches, for the text there."""


def figure(reports: Sequence[Report], path: Path) -> None:
    """Draw one line for each model and write a PNG.

    A rumour is marked in its name and drawn hollow. With a price per hour, cost is the least price
    of a million written tokens; else it is FLOPs per token.
    """
    priced = all(r.decode is not None and r.decode.usd_per_million is not None for r in reports)
    drawing = Figure(figsize=(10, 1.3 + 0.42 * len(reports)), layout="constrained")
    left, right = drawing.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for place, report in enumerate(reports):
        _sizes(left, place, report)
        cost, text = _cost(report, priced)
        fill = "white" if report.rumour else COST
        right.plot(cost, place, "D", color=COST, mfc=fill, ms=6)
        right.annotate(
            text, (cost, place), (8, 0), textcoords="offset points", va="center", fontsize=9
        )
    left.set_yticks(range(len(reports)), [report.title for report in reports])
    left.set_ylim(len(reports) - 0.5, -0.5)
    left.set_xlabel("parameters")
    right.set_xlabel("least $ per million tokens written" if priced else "FLOPs per token, forward")
    left.plot([], [], "o", color=ACTIVE, label="active per token")
    left.plot([], [], "s", color=TOTAL, label="in all")
    left.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    _scale(left, [r.active for r in reports], [r.total for r in reports])
    costs = [_cost(r, priced)[0] for r in reports]
    _scale(right, costs, [cost * ROOM for cost in costs])
    drawing.savefig(path, dpi=150)


def _sizes(axes: Axes, place: int, report: Report) -> None:
    """Active and total parameters of one model, joined by a line."""
    axes.plot([report.active, report.total], [place, place], color="#BBBBBB", lw=2, zorder=1)
    for number, color, marker, side in (
        (report.active, ACTIVE, "o", "right"),
        (report.total, TOTAL, "s", "left"),
    ):
        fill = "white" if report.rumour else color
        axes.plot(number, place, marker, color=color, mfc=fill, ms=7)
        shift = -7 if side == "right" else 7
        if side == "right" and report.active == report.total:
            continue
        axes.annotate(
            parameters_text(number), (number, place), (shift, 0),
            textcoords="offset points", ha=side, va="center", fontsize=9,
        )  # fmt: skip


def _cost(report: Report, priced: bool) -> tuple[float, str]:
    if priced and report.decode is not None and report.decode.usd_per_million is not None:
        price = report.decode.usd_per_million
        return price, f"${number_text(price)}"
    return report.forward_flops, flops_text(report.forward_flops)


def _scale(axes: Axes, low: Sequence[float], high: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(min(low) / ROOM, max(high) * ROOM)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
