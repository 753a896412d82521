"""Draws the figures of docs/mixture-of-experts.md: `python docs/figures/draw.py`.

Nothing is read but the settings below; the same call gives the same figures.
"""

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from moestro import MoEConfig, RouterConfig
from moestro.config import AttentionConfig, DenseConfig, ModelConfig
from moestro.models.count import count
from moestro.moe.balance import update_bias
from moestro.moe.routers import build_router

HERE = Path(__file__).parent
INK, GREY, PALE = "#222222", "#8a8a8a", "#f3f3f1"
# Okabe and Ito's colours, told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#aa4499"
TOKENS = {"The": BLUE, "cat": ORANGE, "sat": GREEN, "down": PURPLE}
# Router logits of the worked example on the page: a row per token, a column per expert.
LOGITS = [[2, 1, 0, -1], [0, 3, 1, 2], [1, 0, 3, 0], [3, 0, 2, 1]]

# Billions of parameters, stored and passed by one token, both embeddings counted. Exact counts of
# the published checkpoints' settings; a mixture's name says (experts, experts per token).
MODELS = {
    "OLMoE-1B-7B (64, 8)": (6_919_161_856, 1_282_017_280),
    "Qwen3-30B-A3B (128, 8)": (30_532_122_624, 3_353_032_704),
    "Mixtral-8x7B (8, 2)": (46_702_792_704, 12_879_925_248),
    "gpt-oss-120b (128, 4)": (116_829_156_672, 5_711_982_912),
    "DeepSeek-V3 (256, 8)": (671_026_419_200, 37_552_297_472),
}


def dense(dim: int, layers: int, heads: int, hidden: int) -> tuple[int, int]:
    """(stored, passed) parameters of a dense decoder with Llama's layout and vocabulary."""
    cfg = ModelConfig(
        vocab_size=32_000,
        dim=dim,
        num_layers=layers,
        dense=DenseConfig(hidden_dim=hidden),
        attention=AttentionConfig(num_heads=heads, num_kv_heads=8, head_dim=128),
        head={"tied": False},
    )
    return count(cfg).total, count(cfg).active


def box(
    axes: Axes, x: float, y: float, text: str, colour: str, width: float = 0.8, **more: object
) -> None:
    """A rounded box around (x, y) with a word in it."""
    height = float(more.pop("height", 0.5))
    filled = bool(more.pop("filled", True))
    patch = FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.1",
        facecolor=colour if filled else PALE,
        edgecolor=colour if filled else GREY,
        linewidth=1.2,
        zorder=3,
    )
    axes.add_patch(patch)
    ink = "white" if filled else INK
    axes.text(x, y, text, ha="center", va="center", color=ink, zorder=4, **more)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, bold: float = 1.0
) -> None:
    """A line from left to right that ends in a small head."""
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=8,
            color=colour,
            linewidth=0.8 + 1.6 * bold,
            alpha=0.85,
            shrinkA=0,
            shrinkB=0,
            zorder=2,
        )
    )


def layer_figure() -> Figure:
    """Four tokens through one layer: router, rows grouped by expert, experts, weighted sum."""
    cfg = MoEConfig(dim=4, hidden_dim=4, num_experts=4, top_k=2)
    router = build_router(cfg)
    with torch.no_grad():
        router.weight.copy_(torch.tensor(LOGITS).T)
        routing = router(torch.eye(4))
    chosen_TK, weights_TK = routing.experts_TK().tolist(), routing.weights_R.view(4, 2).tolist()
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.add_subplot(xlim=(-0.6, 12.9), ylim=(-0.1, 6.75))
    axes.set_axis_off()
    heads = ("tokens", "router", "dispatch", "experts", "combine")
    below = ("", "a weight per expert,\nthe best 2 kept", "rows grouped\nby expert")
    below += ("each works on\nits rows only", "weighted sum,\nback in place")
    for x, head, note in zip((0, 3.1, 6.4, 8.9, 12.3), heads, below, strict=True):
        axes.text(x, 6.5, head, ha="center", va="center", fontsize=13, weight="bold", color=INK)
        axes.text(x, 5.95, note, ha="center", va="center", fontsize=9, color="#555555")
    rows: list[list[tuple[int, float]]] = [[] for _ in range(4)]
    for token, (experts, weights) in enumerate(zip(chosen_TK, weights_TK, strict=True)):
        for expert, weight in zip(experts, weights, strict=True):
            rows[expert].append((token, weight))
    _tokens_and_router(axes, chosen_TK, weights_TK)
    top = 5.0
    for expert, group in enumerate(rows):
        middle = top - 0.27 * (len(group) - 1)
        height = 0.54 * len(group)
        box(axes, 8.9, middle, f"expert {expert}", INK, 1.4, height=height, filled=False)
        for place, (token, weight) in enumerate(group):
            y, colour = top - 0.54 * place, list(TOKENS.values())[token]
            arrow(axes, (4.85, token_y(token)), (5.95, y), colour, weight)
            box(axes, 6.4, y, list(TOKENS)[token], colour, 0.9, height=0.44, fontsize=9)
            arrow(axes, (6.85, y), (8.2, y), colour, 0.2)
            axes.text(9.68, y, f"× {weight:.2f}", va="center", fontsize=9, color=colour)
            arrow(axes, (10.35, y), (11.85, token_y(token)), colour, weight)
        top -= 0.54 * len(group) + 0.25
    return figure


def token_y(token: int) -> float:
    """Height of a token's line."""
    return 4.7 - 1.25 * token


def _tokens_and_router(
    axes: Axes, chosen_TK: list[list[int]], weights_TK: list[list[float]]
) -> None:
    """The left of the figure: tokens, the router's table of weights, and the tokens again."""
    for expert in range(4):
        x = 2.05 + 0.7 * expert
        axes.text(x, 5.4, str(expert), ha="center", va="center", fontsize=9, color="#555555")
    for token, (word, colour) in enumerate(TOKENS.items()):
        y = token_y(token)
        box(axes, 0, y, word, colour, 1.0, fontsize=11)
        arrow(axes, (0.5, y), (1.65, y), colour, 0.2)
        weights = dict(zip(chosen_TK[token], weights_TK[token], strict=True))
        for expert in range(4):
            kept = expert in weights
            text = f"{weights[expert]:.2f}" if kept else "–"
            x = 2.05 + 0.7 * expert
            box(axes, x, y, text, colour if kept else GREY, 0.62, filled=kept, fontsize=9)
        axes.plot([4.5, 4.85], [y, y], color=colour, linewidth=1.4)
        box(axes, 12.3, y, word, colour, 0.9, fontsize=11)


def counts_figure() -> Figure:
    """Parameters stored beside parameters passed, for mixtures and two dense models."""
    models = {
        "Mistral-7B (dense)": dense(4096, 32, 32, 14_336),
        "Llama-2-70B (dense)": dense(8192, 80, 64, 28_672),
        **MODELS,
    }
    names = sorted(models, key=lambda name: -models[name][0])
    colours = [GREY if "dense" in name else BLUE for name in names]
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = ("parameters to keep in memory", "parameters that one token passes")
    for which, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        values = [models[name][which] / 1e9 for name in names]
        bars = axes.barh(names, values, color=colours, height=0.65)
        axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=4, color=INK)
        axes.set_title(title, fontsize=12, weight="bold", loc="left")
        axes.set_xlabel("billions")
        axes.set_xlim(0, max(values) * 1.14)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    return figure


def simulate(rate: float, steps: int = 400) -> tuple[list[int], list[float]]:
    """Route fresh random tokens each step and move the bias.

    Tokens are noise around one common direction, so that a router with random weights prefers
    some experts from the start.

    Returns:
        (assignments per expert over the last 50 steps, busiest over mean at each step).
    """
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(5)
    settings = RouterConfig(kind="sigmoid", selection_bias=True)
    router = build_router(MoEConfig(dim=32, hidden_dim=1, num_experts=8, top_k=2, router=settings))
    common_D = 0.5 * torch.randn(32, generator=generator)
    total_E, history = torch.zeros(8, dtype=torch.int64), []
    for step in range(steps):
        x_TD = torch.randn(512, 32, generator=generator) + common_D
        with torch.no_grad():
            counts_E = router(x_TD).counts_E()
        update_bias(router.bias, counts_E, rate)
        history.append(float(counts_E.max() / counts_E.float().mean()))
        if step >= steps - 50:
            total_E += counts_E
    return total_E.tolist(), history


def balance_figure() -> Figure:
    """Load of 8 experts without and with the loss-free bias, and how the bias gets there."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    runs = {"without balancing": (left, 0.0, ORANGE), "with the bias": (middle, 5e-3, BLUE)}
    for title, (axes, rate, colour) in runs.items():
        counts, history = simulate(rate)
        axes.bar(range(8), [100 * n / sum(counts) for n in counts], color=colour, width=0.75)
        axes.axhline(12.5, color=INK, linewidth=1, linestyle="--")
        axes.set_title(title, fontsize=12, weight="bold", loc="left")
        axes.set(xlabel="expert", ylabel="share of the assignments, %", ylim=(0, 50))
        axes.set_xticks(range(8))
        right.plot(history, color=colour, linewidth=1.5)
        end = sum(history[-50:]) / 50
        right.text(398, end + 0.25, title, color=colour, ha="right", va="bottom", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    left.text(5.4, 13.2, "even: 12.5", ha="right", fontsize=9, color=INK)
    right.axhline(1, color=INK, linewidth=1, linestyle="--")
    right.set_title("busiest expert over the mean", fontsize=12, weight="bold", loc="left")
    right.set(xlabel="step", ylim=(0.8, 4.2), xlim=(0, 400))
    right.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Write every figure beside this file."""
    mpl.rcParams.update({"font.family": "DejaVu Sans", "figure.facecolor": "white"})
    figures = {"layer": layer_figure, "counts": counts_figure, "balance": balance_figure}
    for name, make in figures.items():
        # No date and no version in the file, so that drawing again changes nothing.
        make().savefig(HERE / f"{name}.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
