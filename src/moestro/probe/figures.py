"""Findings as pictures: load, experts by domain, specialisation and repetition beside chance."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from moestro.errors import MoestroError
from moestro.probe.measure import Findings

# Okabe and Ito's colours, told apart in every common kind of colour blindness; the first seven
# domains differ by colour, all by marker and label.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*X<>"
CHANCE = "#9A9A9A"
MOST_NUMBERS = 400  # cells beyond which a heat map is read by colour alone
MOST_PANELS = 12
MOST_DOMAINS = 10  # told apart by marker; the others are left to the numbers


def save_figures(findings: Findings, folder: Path, layer: int | None = None) -> list[Path]:
    """Draw all that the findings hold into PNG files and return their paths.

    Args:
        findings: From `moestro.probe.measure.measure`.
        folder: Existing folder to write to.
        layer: Layer number shown in the expert × domain figure; unset: every mixture layer.

    Raises:
        MoestroError: `layer` is not a mixture layer, or a file cannot be written.
    """
    drawings: dict[str, Callable[[], Figure]] = {
        "load.png": lambda: load_figure(findings),
        "experts_by_domain.png": lambda: table_figure(findings, layer),
    }
    if findings.specialisation is not None:
        drawings["specialisation.png"] = lambda: specialisation_figure(findings)
    if findings.repetition is not None:
        drawings["repetition.png"] = lambda: repetition_figure(findings)
    paths = []
    for name, draw in drawings.items():
        path, figure = folder / name, draw()
        FigureCanvasAgg(figure)
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise MoestroError(
                f"cannot write the figure {path}: {error}; choose another folder"
            ) from None
        paths.append(path)
    return paths


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
        panel.set_yticks(range(domains), findings.domains)
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


def specialisation_figure(findings: Findings) -> Figure:
    """Distance of each domain from the average by layer, over the band that chance makes.

    Raises:
        MoestroError: the findings hold no specialisation (one domain only).
    """
    found = findings.specialisation
    if found is None:
        raise MoestroError("specialisation needs at least two domains; there is one to draw")
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    x_L, shown = np.arange(len(findings.moe_layers)), findings.domains[:MOST_DOMAINS]
    highest_L = found.chance_high_LM.max(axis=1)
    axes.fill_between(
        *_widen(x_L, highest_L), color=CHANCE, alpha=0.3, lw=0, label="chance (below its 95 %)"
    )
    axes.plot(
        *_widen(x_L, found.chance_LM.mean(axis=1)), color=CHANCE, ls="--", label="chance, mean"
    )
    for index, name in enumerate(shown):
        distance_L, shift = found.distance_LM[:, index], _shift(index, len(shown))
        colour, marker = _look(index)
        interval_L2 = found.interval_LM2[:, index]
        low_L, high_L = np.where(np.isnan(interval_L2), distance_L[:, None], interval_L2).T
        axes.errorbar(
            x_L + shift,
            distance_L,
            # A reflected interval need not hold the measured point; its bars end there then.
            yerr=np.maximum([distance_L - low_L, high_L - distance_L], 0.0),
            capsize=2,
            color=colour,
            marker=marker,
            ls="none",
            ms=5,
            lw=1,
            label=name,
        )
    _layers_axis(axes, findings)
    axes.set_ylabel("total variation distance (0 to 1)")
    axes.set_ylim(0, None)
    axes.set_title(
        f"How far each domain's use of experts lies from the average{_some(findings)}\n"
        "(bars: 95 % interval over pieces of text, upward bias of sampling taken off)",
        fontsize=10,
    )
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
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
            at_L, (colour, marker) = x_L + _shift(index, len(shown)), _look(index)
            error_L = 2 * np.nan_to_num(error_LM[:, index])
            panel.errorbar(
                at_L, rate_LM[:, index], yerr=error_L, capsize=2, color=colour, marker=marker,
                ls="none", ms=5, lw=1, label=name,
            )  # fmt: skip
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
        "How often a token and the next use the same expert, ± 2 standard errors" + _some(findings),
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


def _heat_size(rows: int, columns: int) -> tuple[float, float]:
    """Figure size in inches for a heat map: large enough to read, small enough for a page."""
    return min(12.0, max(6.0, 2.2 + 0.5 * columns)), min(10.0, 1.3 + 0.36 * rows)


def _around(equal: float, values: NDArray[np.float64]) -> TwoSlopeNorm:
    """Colours with white at the equal share: less goes down to 0, more up to the largest value."""
    return TwoSlopeNorm(vmin=0.0, vcenter=equal, vmax=max(2 * equal, float(values.max())))


def _write_cells(axes: Axes, values: NDArray[np.float64], form: str, norm: TwoSlopeNorm) -> None:
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


def _some(findings: Findings) -> str:
    """What a title adds where there are more domains than can be told apart."""
    total = len(findings.domains)
    return f" (first {MOST_DOMAINS} of {total} domains)" if total > MOST_DOMAINS else ""


def _layers_axis(axes: Axes, findings: Findings) -> None:
    """Layers as whole positions, named by their number in the model."""
    layers = findings.moe_layers
    step = ceil(len(layers) / 16)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_xlabel("layer")
    axes.spines[["top", "right"]].set_visible(False)


def _widen(
    x_L: NDArray[np.int64], y_L: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Carry a line half a step past its ends, so that one layer alone still makes a band."""
    return np.concatenate(([x_L[0] - 0.5], x_L, [x_L[-1] + 0.5])), y_L[[0, *x_L, -1]]


def _shift(index: int, total: int) -> float:
    """Sideways place of a domain around its layer, so that error bars do not overlap."""
    return 0.4 * ((index + 0.5) / total - 0.5)


def _look(index: int) -> tuple[str, str]:
    """Colour and marker of a domain, the same in every figure."""
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
