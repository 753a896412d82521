"""Findings as pictures, each beside chance: load, domains, specialisation, repetition, caches."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from moestro.errors import MoestroError
from moestro.probe.ablation.effects import Ablations
from moestro.probe.measures.bootstrap import Floats
from moestro.probe.measures.measure import Findings
from moestro.probe.measures.specialise import Specialisation

# Okabe and Ito's colours, told apart in every common kind of colour blindness; the first seven
# domains differ by colour, all by marker and label.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*X<>"
CHANCE = "#9A9A9A"
MOST_NUMBERS = 400  # cells beyond which a heat map is read by colour alone
MOST_PANELS = 12
MOST_ROWS = 60  # changed experts
MOST_DOMAINS = 10  # told apart by marker; the others are left to the numbers


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
    drawings: dict[str, Callable[[], Figure]] = {
        "load": lambda: load_figure(findings),
        "experts_by_domain": lambda: table_figure(findings, layer),
    }
    for number, found in enumerate(findings.specialisation):
        name = f"specialisation_by_{file_name(found.grouping)}" if number else "specialisation"
        drawings[name] = partial(specialisation_figure, findings, found)
    if findings.repetition is not None:
        drawings["repetition"] = lambda: repetition_figure(findings)
    if findings.caching is not None:
        drawings["caching"] = lambda: caching_figure(findings)
    if ablations is not None and ablations.rows:
        drawings["ablation"] = lambda: ablation_figure(ablations)
    return [path for name, draw in drawings.items() for path in _save(draw(), folder / name)]


def load_figure(findings: Findings) -> Figure:
    """Heat map of load: layers down, experts across, 1 being an equal share."""
    relative_LE = findings.load.share_LE * findings.num_experts
    layers, experts = relative_LE.shape
    figure = Figure(figsize=_heat_size(layers, experts), layout="constrained")
    axes = figure.subplots()
    norm = _around(1.0, relative_LE)
    image = axes.imshow(relative_LE, cmap="PuOr_r", norm=norm, aspect="auto")
    _write_cells(axes, relative_LE, "{:.2f}", norm)
    axes.set_yticks(range(layers), [str(layer) for layer in findings.moe_layers])
    axes.set(xlabel="expert", ylabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.set_title("Load of each expert: tokens received ÷ equal share (1 = balanced)", fontsize=10)
    _colour_bar(figure, image, axes, "load ÷ equal share")
    return figure


def table_figure(findings: Findings, layer: int | None = None) -> Figure:
    """Heat map of each domain's use of experts, one panel a layer (the last layers if many).

    Raises:
        MoestroError: `layer` is not a mixture layer.
    """
    chosen = list(range(len(findings.moe_layers)))[-MOST_PANELS:]
    if layer is not None:
        chosen = [layer_index(findings, layer)]
    domains, experts = findings.table_LME.shape[1:]
    columns = 1 if len(chosen) == 1 or experts > 16 else 2
    rows = ceil(len(chosen) / columns)
    width, height = _heat_size(domains, experts)
    size = (min(width, 7.0) * columns, (height - 0.7) * rows + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    equal = 100 / findings.num_experts
    norm = _around(equal, 100 * findings.table_LME[chosen])
    for panel, index in zip(panels, chosen, strict=False):
        percent_ME = 100 * findings.table_LME[index]
        image = panel.imshow(percent_ME, cmap="PuOr_r", norm=norm, aspect="auto")
        _write_cells(panel, percent_ME, "{:.0f}", norm)
        panel.set_title(f"layer {findings.moe_layers[index]}", fontsize=9)
        panel.set_yticks(range(domains), [_plain(name) for name in findings.domains])
        panel.set_xlabel("expert")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    for unused in panels[len(chosen) :]:
        unused.set_axis_off()
    figure.suptitle(
        f"Share of each domain's assignments by expert, % (equal share {equal:.3g} %)", fontsize=10
    )
    label = "% of the domain's assignments"
    _colour_bar(figure, image, panels[: len(chosen)].tolist(), label)
    return figure


def specialisation_figure(findings: Findings, found: Specialisation) -> Figure:
    """Distance of each label from the average by layer, beside what chance seldom exceeds.

    Beside it, where tokens occur under two labels, what token identity does not explain of it.
    """
    beyond = found.beyond
    panels_of = [
        ("How far each label's use of experts lies from the average", found.distance_LM,
         found.interval_LM2, found.chance_high_LM),
        ("The same tokens only: what token identity does not explain", beyond.excess_LM,
         beyond.interval_LM2, beyond.chance_high_LM),
    ][: 1 if np.isnan(beyond.excess_LM).all() else 2]  # fmt: skip
    figure = Figure(figsize=(1.6 + 5.0 * len(panels_of), 4.4), layout="constrained")
    panels = figure.subplots(1, len(panels_of), squeeze=False).ravel()
    x_L, shown = np.arange(len(findings.moe_layers)), found.labels[:MOST_DOMAINS]
    for panel, (title, value_LM, interval_LM2, high_LM) in zip(panels, panels_of, strict=True):
        for index, name in enumerate(shown):
            value_L = value_LM[:, index]
            low_L, high_L = _or(interval_LM2[:, index], value_L).T
            # A reflected interval need not hold the measured point; its bars end there then.
            error_2L = np.maximum([value_L - low_L, high_L - value_L], 0.0)
            at_L, colour = x_L + _shift(index, len(shown)), _look(index)[0]
            _points(panel, at_L, value_L, error_2L, index, name)
            panel.plot(at_L, high_LM[:, index], ls="none", marker="_", ms=10, color=colour)
        panel.plot([], [], ls="none", marker="_", ms=10, color="black", label="95 % of its chance")
        _layers_axis(panel, findings)
        panel.set_ylim(0, None)
        panel.set_title(title, fontsize=10)
    panels[0].set_ylabel("total variation distance (0 to 1)")
    panels[-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(
        f"Specialisation by {_plain(found.grouping)}{_some(found.labels)} (bars: 95 % interval "
        "over documents, upward bias of sampling taken off)",
        fontsize=10,
    )
    return figure


def repetition_figure(findings: Findings) -> Figure:
    """How often neighbouring tokens share experts, by layer, beside both nulls.

    Raises:
        MoestroError: the findings hold no repetition (expert choice).
    """
    found = findings.repetition
    if found is None:
        raise MoestroError("repetition needs token choice and windows of at least 2 tokens")
    panels_of = [
        ("same first choice", found.first_LM, found.first_error_LM, found.first_uniform,
         found.first_shuffled_LM),
        (f"any of the {findings.top_k} shared", found.any_LM, found.any_error_LM,
         found.any_uniform, found.any_shuffled_LM),
    ][: 1 if findings.top_k == 1 else 2]  # fmt: skip
    figure = Figure(figsize=(1.6 + 4.0 * len(panels_of), 4.2), layout="constrained")
    panels = figure.subplots(1, len(panels_of), squeeze=False).ravel()
    x_L, shown = np.arange(len(findings.moe_layers)), findings.domains[:MOST_DOMAINS]
    for panel, (title, rate_LM, error_LM, uniform, shuffled_LM) in zip(
        panels, panels_of, strict=True
    ):
        panel.axhline(uniform, color=CHANCE, ls="--", label="uniform routing")
        for index, name in enumerate(shown):
            at_L, colour = x_L + _shift(index, len(shown)), _look(index)[0]
            error_L = 2 * np.nan_to_num(error_LM[:, index])
            _points(panel, at_L, rate_LM[:, index], np.stack((error_L, error_L)), index, name)
            panel.plot(at_L, shuffled_LM[:, index], ls="none", marker="_", ms=10, color=colour)
        panel.plot(
            [], [], ls="none", marker="_", ms=10, color="black", label="same tokens shuffled"
        )
        _layers_axis(panel, findings)
        panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panel.set_ylim(0, None)
        panel.set_title(title, fontsize=10)
    panels[0].set_ylabel("neighbouring pairs of tokens")
    panels[-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(
        "How often a token and the next use the same expert, ± 2 standard errors"
        + _some(findings.domains),
        fontsize=10,
    )
    return figure


def caching_figure(findings: Findings) -> Figure:
    """Hit rate by the size of the cache, mean over layers, beside tokens in random order.

    Raises:
        MoestroError: the findings hold no caching (expert choice).
    """
    found = findings.caching
    if found is None:
        raise MoestroError("caching needs token choice: under expert choice experts choose")
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    size_E = np.arange(1, findings.num_experts + 1)
    curves = (
        ("oracle: wanted latest goes", found.oracle, 2),
        ("LRU: least recently used goes", found.lru, 0),
        ("LFU: least often used goes", found.lfu, 1),
    )
    for name, rates, index in curves:
        colour, marker = _look(index)
        low_E, high_E = _or(rates.mean_interval_E2, rates.mean_E).T
        axes.fill_between(size_E, low_E, high_E, color=colour, alpha=0.2, lw=0)
        axes.plot(size_E, rates.mean_E, color=colour, marker=marker, ms=4, lw=1.2, label=name)
    axes.plot(size_E, found.lru.shuffled_E, color=_look(0)[0], ls="--", label="LRU, shuffled")
    axes.plot(size_E, found.lru.uniform_E, color=CHANCE, ls=":", label="LRU, uniform routing")
    axes.set(xlabel="experts in the cache of each layer", ylabel="wanted experts found there")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    axes.set_title("Hit rates, mean over layers (bands: 95 % interval)", fontsize=10)
    return figure


def ablation_figure(ablations: Ablations) -> Figure:
    """Rise of the loss in each expert's own domain beyond that elsewhere, with intervals."""
    rows = ablations.rows[:MOST_ROWS]
    figure = Figure(figsize=(7.0, 1.2 + 0.26 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0.0, color=CHANCE, lw=1)
    for place, row in enumerate(rows):
        low, high = _or(row.difference_interval_2, np.array(row.difference))
        colour = _look(1 if row.matters_more else 0)[0] if not row.control else CHANCE
        axes.plot([low, high], [place, place], color=colour, lw=1.5)
        axes.plot(
            row.difference, place, color=colour, marker="s" if row.matters_more else "o", ms=5
        )
    labels = [
        f"layer {row.layer}, expert {row.expert}: {_plain(row.domain)}"
        + (" (for comparison)" if row.control else "")
        for row in rows
    ]
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


def layer_index(findings: Findings, layer: int) -> int:
    """Position of layer number `layer` among the mixture layers.

    Raises:
        MoestroError: it is not one of them.
    """
    if layer not in findings.moe_layers:
        known = ", ".join(map(str, findings.moe_layers))
        raise MoestroError(f"layer {layer} is not a mixture layer; choose one of {known}")
    return findings.moe_layers.index(layer)


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


def _or(interval: Floats, value: Floats) -> Floats:
    """The interval, or where there is none the value itself. [..., 2]."""
    return np.where(np.isnan(interval), np.asarray(value)[..., None], interval)


def _points(
    axes: Axes, x_L: NDArray[Any], value_L: Floats, error_2L: Floats, index: int, name: str
) -> None:
    """The points of a label with their error bars."""
    colour, marker = _look(index)
    axes.errorbar(
        x_L, value_L, yerr=error_2L, capsize=2, color=colour, marker=marker, ls="none", ms=5, lw=1,
        label=_plain(name),
    )  # fmt: skip


def _heat_size(rows: int, columns: int) -> tuple[float, float]:
    """Figure size in inches for a heat map: large enough to read, small enough for a page."""
    return min(12.0, max(6.0, 2.2 + 0.5 * columns)), min(10.0, 1.3 + 0.36 * rows)


def _around(equal: float, values: Floats) -> TwoSlopeNorm:
    """Colours with white at the equal share: less goes down to 0, more up to the largest value."""
    return TwoSlopeNorm(vmin=0.0, vcenter=equal, vmax=max(2 * equal, float(values.max())))


def _write_cells(axes: Axes, values: Floats, form: str, norm: TwoSlopeNorm) -> None:
    """Write each cell's value, white on the dark ends of the colours."""
    if values.size > MOST_NUMBERS or values.shape[1] > 24:
        return
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if abs(float(norm(value)) - 0.5) > 0.35 else "black"
        axes.text(
            column, row, form.format(value), ha="center", va="center", color=colour, fontsize=7
        )


def _colour_bar(figure: Figure, image: AxesImage, axes: Axes | list[Axes], label: str) -> None:
    figure.colorbar(image, ax=axes, pad=0.02, aspect=25).set_label(label, fontsize=8)


def _some(labels: tuple[str, ...]) -> str:
    """What a title adds where there are more labels than can be told apart."""
    total = len(labels)
    return f" (first {MOST_DOMAINS} of {total})" if total > MOST_DOMAINS else ""


def _layers_axis(axes: Axes, findings: Findings) -> None:
    """Layers as whole positions, named by their number in the model."""
    layers = findings.moe_layers
    step = ceil(len(layers) / 16)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_xlabel("layer")
    axes.spines[["top", "right"]].set_visible(False)


def _shift(index: int, total: int) -> float:
    """Sideways place of a domain around its layer, so that error bars do not overlap."""
    return 0.4 * ((index + 0.5) / total - 0.5)


def _look(index: int) -> tuple[str, str]:
    """Colour and marker of a domain, the same in every figure."""
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
