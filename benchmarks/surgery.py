"""What fewer experts cost: every criterion and way to merge, at three sizes, over several runs.

Held-out bits per byte after the cut, and after a short recovery of the routers alone and of all
weights (AdamW, on the run's own text, the whole model's under the same recovery beside it). Of
three models with as many experts removed at random each number is the mean. The standard error is
over the runs, of the increase over the whole model; of a single run, over its held-out windows.

    moestro train --out runs/s0 --set train.seed=0 --set train.steps=1000   # and s1, s2
    .venv/bin/python benchmarks/surgery.py runs/s0 runs/s1 runs/s2
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import measure
import torch
from torch.nn import functional as F

from moestro.checkpoints.hub import find_checkpoint
from moestro.checkpoints.reading import read_model
from moestro.data.domains import ALL
from moestro.data.windows import Corpus, HeldOut
from moestro.surgery import merge, prune
from moestro.surgery.calibration import collect
from moestro.surgery.cost import WHOLE, Cost, costs
from moestro.surgery.layers import Change, Layers
from moestro.train.evaluate import evaluate

RATIOS = (0.75, 0.5, 0.25)
DRAWS = 3
RECOVERED = ["reap", "ean", "frequency", "random 0", "hc-smoe aligned", "m-smoe aligned"]
BATCH = 8  # windows of a recovery's step


def changes_of(layers: Layers, corpus: Corpus, tokens: int) -> dict[str, Change]:
    """Every method at every ratio, named `ratio method`."""
    windows_NS = corpus.batch(0, tokens // corpus.seq_len)
    seen, moe = collect(layers, windows_NS, every=True), layers.cfg.moe
    assert moe is not None
    found = {}
    for ratio in RATIOS:
        number = round(ratio * moe.num_experts)
        for method in prune.CRITERIA:
            kept = prune.chosen(layers.cfg, seen, method, number)
            found[f"{ratio} {method}"] = prune.pruned(layers.cfg, kept)
        for draw in range(DRAWS):
            kept = prune.at_random(layers.cfg, number, draw)
            found[f"{ratio} random {draw}"] = prune.pruned(layers.cfg, kept)
        for method in merge.METHODS:
            groups = {
                layer: merge.groups_of(layers.cfg, each, method, number)
                for layer, each in seen.items()
            }
            for align in (False, True):
                name = f"{ratio} {method}{' aligned' if align else ''}"
                found[name] = merge.merged(layers.cfg, groups, seen, align)
    return found


def recovered(
    layers: Layers, change: Change, corpus: Corpus, held_out: Mapping[str, HeldOut], steps: int
) -> tuple[float, float]:
    """Bits per byte after the same steps of the routers alone, and of all weights."""
    bits = []
    for part in ("router.", ""):
        with tempfile.TemporaryDirectory() as folder:
            family = layers.hf_config.get("model_type", "mixtral")
            layers.write(change, Path(folder) / "cut", family)
            model = read_model(Path(folder) / "cut").train()
        chosen = [weight for name, weight in model.named_parameters() if part in name]
        optimizer = torch.optim.AdamW(chosen, lr=1e-3 if part else 6e-4, weight_decay=0.0)
        for step in range(steps):
            windows_NS = corpus.batch(10_000 + step, BATCH)
            logits = model(windows_NS[:, :-1]).logits.flatten(0, 1)
            optimizer.zero_grad()
            F.cross_entropy(logits, windows_NS[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(chosen, 1.0)
            optimizer.step()
        bits.append(evaluate(model, dict(held_out), BATCH)[ALL])
    return bits[0], bits[1]


def numbers_of(run: Path, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """A run's costs by name, with what a recovery leaves of those asked for."""
    layers, corpus = Layers(find_checkpoint(run)), Corpus(run / "data")
    held_out = corpus.held_out(args.tokens)
    changes = changes_of(layers, corpus, args.calibration)
    after: dict[str, Cost] = costs(layers, held_out, changes)
    found: dict[str, dict[str, Any]] = {}
    for name, cost in after.items():
        row = {"bits": cost.bits[ALL], "change": cost.change, "error": cost.error}
        wanted = name.partition(" ")[2] in args.recover or name == WHOLE
        if args.steps and wanted:
            change = changes.get(name, layers.unchanged())
            row["router"], row["weights"] = recovered(layers, change, corpus, held_out, args.steps)
        found[name] = row
    return found


def mean(values: list[float]) -> float | str:
    """Of what was measured."""
    return statistics.fmean(values) if values else ""


def rows_of(runs: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row for each method and ratio: means over the runs, and over random draws."""
    names = dict.fromkeys(name.split(" random")[0] + " random" * ("random" in name)
                          for name in runs[0])  # fmt: skip
    rows = []
    for name in names:
        each = [[row for key, row in run.items() if key.startswith(name)
                 and ("random" in name or key == name)] for run in runs]  # fmt: skip
        increases = [statistics.fmean(row["change"] for row in run) for run in each]
        error = each[0][0]["error"]
        if len(runs) > 1:
            error = statistics.stdev(increases) / math.sqrt(len(runs))
        ratio, _, method = name.partition(" ")
        rows.append(
            {
                "keep": ratio, "method": method,
                "bits per byte": mean([row["bits"] for run in each for row in run]),
                "increase": mean(increases), "se": error,
                "router": mean([row["router"] for run in each for row in run if "router" in row]),
                "all weights": mean(
                    [row["weights"] for run in each for row in run if "weights" in row]
                ),
            }
        )  # fmt: skip
    return rows


def claims_of(runs: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """REAP's lead over others, paired by run, with its standard error where there are several."""
    claims: dict[str, Any] = {"runs": len(runs)}
    for ratio in RATIOS:
        for other in ("ean", "frequency", "random"):
            leads = []
            for run in runs:
                rivals = [row["change"] for key, row in run.items()
                          if key.startswith(f"{ratio} {other}")]  # fmt: skip
                leads.append(statistics.fmean(rivals) - run[f"{ratio} reap"]["change"])
            told = f"{statistics.fmean(leads):+.3f}"
            if len(runs) > 1:
                error = statistics.stdev(leads) / math.sqrt(len(runs))
                told += f" ± {error:.3f}, {statistics.fmean(leads) / error:.1f} standard errors"
            claims[f"keep {ratio}: REAP's lead over {other}, bits per byte"] = told
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of `moestro train`")
    parser.add_argument("--tokens", type=int, default=65_536, help="held out")
    parser.add_argument("--calibration", type=int, default=65_536, help="tokens")
    parser.add_argument("--steps", type=int, default=40, help="of the recovery; 0: none")
    parser.add_argument("--recover", nargs="*", default=RECOVERED, help="methods to train on")
    parser.add_argument("--name", default="surgery", help="of the result file")
    args = parser.parse_args()
    torch.manual_seed(0)
    runs = []
    for run in args.runs:
        runs.append(numbers_of(run, args))
        print(f"{run}: done", flush=True)
    measure.report(args.name, rows_of(runs), claims_of(runs))


if __name__ == "__main__":
    main()
