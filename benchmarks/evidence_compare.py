r"""Mixtures beside their dense twin on the text of docs/evidence.md: cost saved, loss by domain.

Reads a finished comparison and evaluates its last checkpoints on held-out authors, works, sections
and packages. Differences are paired by seed; intervals are Student's, of 95 %.

    python benchmarks/evidence_corpus.py GRID corpus
    moestro compare --config benchmarks/evidence.toml --source corpus/train --experts 16,64 \
        --seeds 3 --set train.steps=1600 --set train.eval_every=100 --out runs/evidence
    python benchmarks/evidence_compare.py runs/evidence corpus/held_out
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import measure
from matplotlib.figure import Figure
from PIL import Image

from moestro.data.domains import ALL
from moestro.train.compare import TWIN
from moestro.train.figures import COLORS, VERMILION
from moestro.train.intervals import half_width

FIGURES = measure.ROOT / "docs" / "figures"
Scores = dict[str, dict[int, dict[str, float]]]  # kind, seed, domain: bits per byte


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", type=Path, help="the folder of `moestro compare --seeds N`")
    parser.add_argument("held_out", type=Path, help="text that no run has seen, a folder a domain")
    parser.add_argument("--tokens", type=int, default=262_144, help="shared by the domains")
    given = parser.parse_args()
    compared = json.loads((given.comparison / "compare.json").read_text())
    scores: Scores = {}
    for curve in compared["curves"]:
        kind, seed = curve["kind"], curve["seed"]
        found = evaluated(given.comparison / f"{kind}-seed{seed}", given.held_out, given.tokens)
        scores.setdefault(kind, {})[seed] = found
        print(f"{kind}, seed {seed}: {found[ALL]:.4f}", flush=True)
    domains = next(iter(scores[TWIN].values()))
    rows = [row_of(domain, scores) for domain in domains]
    claims = {"tokens held out": given.tokens, "seeds": sorted(scores[TWIN])} | saved(compared)
    measure.report("evidence_compare", rows, claims)
    draw(rows, [kind for kind in scores if kind != TWIN], FIGURES / "evidence-compare-domains.png")
    # As few bytes as a page of the documentation may have.
    drawn = Image.open(given.comparison / "compare.png").quantize(32)
    drawn.save(FIGURES / "evidence-compare.png", optimize=True)


def evaluated(run: Path, held_out: Path, tokens: int) -> dict[str, float]:
    """Bits per byte by domain of a run's last checkpoint, in bf16."""
    words = ("--weights", "bf16", "--tokens", tokens, "--json")
    (row,) = json.loads(measure.moestro("eval", run, "--source", held_out, *words).text)["rows"]
    bits: dict[str, float] = row["bits_per_byte"]
    return bits


def row_of(domain: str, scores: Scores) -> dict[str, Any]:
    """The twin's mean loss on a domain, and what each mixture's is beyond it."""
    twins = {seed: bits[domain] for seed, bits in scores[TWIN].items()}
    row: dict[str, Any] = {"domain": domain, TWIN: statistics.fmean(twins.values())}
    for kind, runs in scores.items():
        if kind != TWIN:
            row |= interval(kind, [runs[seed][domain] - twins[seed] for seed in twins])
    return row


def interval(kind: str, differences: list[float]) -> dict[str, float]:
    """The mean of paired differences, and where its interval begins and ends."""
    mean, half = statistics.fmean(differences), half_width(differences)
    return {kind: mean, f"{kind} low": mean - half, f"{kind} high": mean + half}


def saved(compared: dict[str, Any]) -> dict[str, Any]:
    """What the comparison found on the text that its runs held out themselves."""
    found: dict[str, Any] = {"sentence": compared["sentence"]}
    for kind in dict.fromkeys(curve["kind"] for curve in compared["curves"]):
        finals = [c["points"][-1] for c in compared["curves"] if c["kind"] == kind]
        found[f"{kind}: minutes of each seed"] = [round(p["seconds"] / 60, 1) for p in finals]
        found[f"{kind}: bits per byte of each seed"] = [p["bits_per_byte"][ALL] for p in finals]
        for cost in ("compute", "time"):
            shares = [v[cost] for v in compared["verdicts"] if v["kind"] == kind]
            if shares:
                found[f"{kind}: share of the twin's {cost}"] = shares
    found["parameters"] = {kind: model["total"] for kind, model in compared["models"].items()}
    found["active"] = {kind: model["active"] for kind, model in compared["models"].items()}
    return found


def draw(rows: list[dict[str, Any]], kinds: list[str], to: Path) -> None:
    """Differences to the twin by domain, the largest of the last mixture on top."""
    ordered = sorted(rows, key=lambda row: -float(row[kinds[-1]]))
    figure = Figure(figsize=(8, 0.32 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    for number, kind in enumerate(kinds):
        places = [place + 0.15 * (1 - 2 * number) for place in range(len(ordered))]
        means = [row[kind] for row in ordered]
        halves = [row[f"{kind} high"] - row[kind] for row in ordered]
        axes.errorbar(
            means, places, xerr=halves, fmt="o", ms=4, color=COLORS[number], label=kind, lw=1.2
        )
    axes.axvline(0, color=VERMILION, lw=1, ls=":")
    axes.set_yticks(range(len(ordered)), [row["domain"] for row in ordered])
    axes.set_xlabel("held-out bits per byte less the dense twin's, 95 % interval over seeds")
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(to, dpi=110)


if __name__ == "__main__":
    main()
