"""Findings as pictures, each beside chance: load, domains, specialisation, repetition, caches."""

from __future__ import annotations

import re
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moestro.errors import MoestroError
from moestro.probe.ablation.effects import Ablations
from moestro.probe.measures.bootstrap import Floats
from moestro.probe.measures.measure import Findings
from moestro.probe.measures.specialise import Specialisation
from moestro.probe.recording.traces import place_of
from moestro.probe.report.charts import Chart, caching_chart, errors, label_chart

# Okabe and Ito's colours, told apart in every common kind of colour blindness; the first seven
# domains differ by colour, all by marker and label.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*X<>"
CHANCE = "#9A9A9A"
LINES = {"dashed": "--", "dotted": ":"}
MOST_NUMBERS = 400  # cells beyond which a heat map is read by colour alone
MOST_PANELS = 12
MOST_ROWS = 60  # changed experts
MOST_DOMAINS = 10  # told apart by marker; the others only in the tables


def save_figures(
    findings: Findings,
    folder: Path,
    layer: int | None = None,
    ablations: Ablations | None = None,
) -> list[Path]:
    """Draw all that the findings hold, each as PNG and as SVG, and return the paths.

    Args:
        findings: From `moestro.probe.measure`.
        folder: Existing folder to write to.
        layer: Layer number shown in the expert × domain figure; unset: every mixture layer.
        ablations: What changing single experts did.

    Raises:
        MoestroError: `layer` is not a mixture layer, or a file cannot be written.
    """
    figures = {"load": load_figure(findings), "experts_by_domain": table_figure(findings, layer)}
    for number, found in enumerate(findings.specialisation):
        name = f"specialisation_by_{file_name(found.grouping)}" if number else "specialisation"
        figures[name] = specialisation_figure(findings, found)
    if findings.repetition is not None:
        figures["repetition"] = repetition_figure(findings)
    if findings.caching is not None:
        figures["caching"] = caching_figure(findings)
    if ablations is not None and ablations.rows:
        figures["ablation"] = ablation_figure(ablations)
    return [path for name, figure in figures.items() for path in _save(figure, folder / name)]


def load_figure(findings: Findings) -> Figure:
    """Heat map of load: layers down, experts across, 1 being an equal share."""
    title = "Load of each expert: tokens received ÷ equal share (1 = balanced)"
    relative_LE = findings.load.share_LE * findings.num_experts
    names = [str(layer) for layer in findings.moe_layers]
    figure = _heat([(title, relative_LE)], names, 1.0, ".2f", "load ÷ equal share", 12.0)
    figure.axes[0].set_ylabel("layer")
    return figure


def table_figure(findings: Findings, layer: int | None = None) -> Figure:
    """Heat map of each domain's use of experts, one panel a layer (the last layers if many).

    Raises:
        MoestroError: `layer` is not a mixture layer.
    """
    chosen = list(range(len(findings.moe_layers)))[-MOST_PANELS:]
    if layer is not None:
        chosen = [place_of(layer, findings.moe_layers)]
    equal, names = 100 / findings.num_experts, [_plain(name) for name in findings.domains]
    panels = [
        (f"layer {findings.moe_layers[index]}", 100 * findings.table_LME[index]) for index in chosen
    ]
    figure = _heat(panels, names, equal, ".0f", "% of the domain's assignments", 7.0)
    title = f"Share of each domain's assignments by expert, % (equal share {equal:.3g} %)"
    figure.suptitle(title, fontsize=10)
    return figure


def specialisation_figure(findings: Findings, found: Specialisation) -> Figure:
    """Distance of each label from the average by layer, beside what chance seldom exceeds.

    Beside it, where tokens occur under two labels, what token identity does not explain of it.
    """
    beyond, shown = found.beyond, found.labels[:MOST_DOMAINS]
    panels = {
        "How far each label's use of experts lies from the average": (
            found.distance_LM, found.interval_LM2, found.chance_high_LM
        ),
        "The same tokens only: what token identity does not explain": (
            beyond.excess_LM, beyond.interval_LM2, beyond.chance_high_LM
        ),
    }  # fmt: skip
    if np.isnan(beyond.excess_LM).all():
        panels.popitem()
    y_name = "total variation distance (0 to 1)"
    drawn = {
        title: label_chart(findings, shown, y_name, *arrays, "95 % of its chance", percent=False)
        for title, arrays in panels.items()
    }
    return _panels(
        drawn,
        f"Specialisation by {_plain(found.grouping)}{_some(found.labels)} (bars: 95 % interval "
        "over documents, upward bias of sampling subtracted)",
    )


def repetition_figure(findings: Findings) -> Figure:
    """How often neighbouring tokens share experts, by layer, beside both nulls.

    Raises:
        MoestroError: the findings hold no repetition (expert choice).
    """
    found, shown = findings.repetition, findings.domains[:MOST_DOMAINS]
    if found is None:
        raise MoestroError("repetition needs token choice and windows of at least 2 tokens")
    y_name, null = "neighbouring pairs of tokens", "same tokens shuffled"
    panels = {
        "same first choice": label_chart(
            findings, shown, y_name, found.first_LM, errors(found.first_LM, found.first_error_LM),
            found.first_shuffled_LM, null, found.first_uniform,
        ),
        f"any of the {findings.top_k} shared": label_chart(
            findings, shown, y_name, found.any_LM, errors(found.any_LM, found.any_error_LM),
            found.any_shuffled_LM, null, found.any_uniform,
        ),
    }  # fmt: skip
    if findings.top_k == 1:
        panels.popitem()
    title = "How often a token and the next use the same expert, ± 2 standard errors"
    return _panels(panels, title + _some(findings.domains))


def caching_figure(findings: Findings) -> Figure:
    """Hit rate by the size of the cache, mean over layers, beside tokens in random order.

    Raises:
        MoestroError: the findings hold no caching (expert choice).
    """
    if findings.caching is None:
        raise MoestroError("caching needs token choice: under expert choice experts choose")
    title = "Hit rates, mean over layers (bands: 95 % interval)"
    return _panels({title: caching_chart(findings.caching)})


def ablation_figure(ablations: Ablations) -> Figure:
    """Rise of the loss in each expert's own domain beyond that elsewhere, with intervals."""
    rows = ablations.rows[:MOST_ROWS]
    figure = Figure(figsize=(7.0, 1.2 + 0.26 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0.0, color=CHANCE, lw=1)
    labels = []
    for place, row in enumerate(rows):
        colour = CHANCE if row.control else COLOURS[row.matters_more]
        axes.plot(row.difference_interval_2, [place, place], color=colour, lw=1.5)
        axes.plot(row.difference, place, color=colour, marker=MARKERS[row.matters_more], ms=5)
        compared = " (for comparison)" if row.control else ""
        labels.append(f"layer {row.layer}, expert {row.expert}: {_plain(row.domain)}{compared}")
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"rise there less rise elsewhere, {ablations.unit}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"Experts changed one at a time ({_plain(ablations.mode)}), 95 % intervals\n"
        "(squares: matters more to its domain, beyond noise)",
        fontsize=10,
    )
    return figure


def file_name(name: str) -> str:
    """A name as part of a file's: letters, digits and - only."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", name).strip("-") or "other"


def _save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and SVG, the same bytes every time."""
    FigureCanvasAgg(figure)
    paths = []
    with rc_context({"svg.hashsalt": "moestro", "svg.fonttype": "none"}):
        for ending, metadata in (("png", None), ("svg", {"Date": None})):
            file = path.with_name(f"{path.name}.{ending}")
            try:
                figure.savefig(file, dpi=150, metadata=metadata)
            except OSError as error:
                raise MoestroError(
                    f"cannot write the figure {file}: {error}; choose another folder"
                ) from None
            paths.append(file)
    return paths


def _plain(name: str) -> str:
    """A name whose signs mean nothing to matplotlib."""
    return name.replace("$", r"\$")


def _panels(charts: dict[str, Chart], title: str = "") -> Figure:
    """Charts of lines side by side under their titles, with the legend of the last."""
    figure = Figure(figsize=(2.4 + 4.6 * len(charts), 4.3), layout="constrained")
    panels = figure.subplots(1, len(charts), squeeze=False).ravel()
    for panel, (name, chart) in zip(panels, charts.items(), strict=True):
        _draw(panel, chart)
        panel.set_title(name, fontsize=10)
    panels[0].set_ylabel(chart.y_name)
    panels[-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(title, fontsize=10)
    return figure


def _draw(axes: Axes, chart: Chart) -> None:
    """A chart of lines; points of one place stand beside each other."""
    places = np.asarray(chart.x) if chart.dense else np.arange(len(chart.x))
    labels = sum(one.look == "tick" and one.colour is not None for one in chart.series)
    for one in chart.series:
        colour, marker, x = CHANCE, "", places
        if one.colour is not None:
            colour, marker = COLOURS[one.colour % len(COLOURS)], MARKERS[one.colour % len(MARKERS)]
            x = places + (0.4 * ((one.colour + 0.5) / labels - 0.5) if labels else 0)
        look: dict[str, Any] = {"color": colour, "label": _plain(one.name) or None}
        if one.look == "tick":
            axes.plot(x, one.y, ls="none", marker="_", ms=10, **look)
        elif one.look == "dashed" and np.ptp(one.y) == 0:
            axes.axhline(one.y[0], ls=LINES[one.look], **look)
        elif one.interval is None:
            axes.plot(x, one.y, ls=LINES[one.look], **look)
        else:
            # Where there is no interval it ends at the point. A reflected one need not hold it.
            low, high = np.where(np.isnan(one.interval.T), one.y, one.interval.T)
            if one.line:
                axes.plot(x, one.y, marker=marker, ms=4, lw=1.2, **look)
                axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
            else:
                bars = np.maximum([one.y - low, high - one.y], 0.0)
                axes.errorbar(
                    x, one.y, bars, capsize=2, marker=marker, ls="none", ms=5, lw=1, **look
                )
    if chart.dense:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        step = ceil(len(places) / 16)
        axes.set_xticks(places[::step], [str(name) for name in chart.x[::step]])
        axes.set_xlim(-0.5, len(places) - 0.5)
    if chart.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(0, 1 if chart.dense else None)
    axes.set_xlabel(chart.x_name)
    axes.spines[["top", "right"]].set_visible(False)


def _heat(
    panels: list[tuple[str, Floats]],
    names: list[str],
    equal: float,
    form: str,
    label: str,
    widest: float,
) -> Figure:
    """Heat maps over experts of [names, experts] under titles; white is the equal share."""
    rows, experts = panels[0][1].shape
    columns = 1 if len(panels) == 1 or experts > 16 else 2
    down = ceil(len(panels) / columns)
    width, height = min(widest, max(6.0, 2.2 + 0.5 * experts)), min(9.3, 0.6 + 0.36 * rows)
    figure = Figure(figsize=(width * columns, height * down + 0.7), layout="constrained")
    places = figure.subplots(down, columns, squeeze=False).ravel()
    most = max(float(values.max()) for _, values in panels)
    norm = TwoSlopeNorm(vmin=0.0, vcenter=equal, vmax=max(2 * equal, most))
    for axes, (title, values) in zip(places, panels, strict=False):
        image = axes.imshow(values, cmap="PuOr_r", norm=norm, aspect="auto")
        _write_cells(axes, values, form, norm)
        axes.set_title(title, fontsize=9)
        axes.set_yticks(range(rows), names)
        axes.set_xlabel("expert")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    for unused in places[len(panels) :]:
        unused.set_axis_off()
    shown = places[: len(panels)].tolist()
    figure.colorbar(image, ax=shown, pad=0.02, aspect=25).set_label(label, fontsize=8)
    return figure


def _write_cells(axes: Axes, values: Floats, form: str, norm: TwoSlopeNorm) -> None:
    """Write each cell's value, white on the dark ends of the colours."""
    if values.size > MOST_NUMBERS or values.shape[1] > 24:
        return
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if abs(float(norm(value)) - 0.5) > 0.35 else "black"
        axes.text(
            column, row, f"{value:{form}}", ha="center", va="center", color=colour, fontsize=7
        )


def _some(labels: tuple[str, ...]) -> str:
    """What a title adds where there are more labels than can be told apart."""
    total = len(labels)
    return f" (first {MOST_DOMAINS} of {total})" if total > MOST_DOMAINS else ""
