"""Which settings let the demo's mixture beat its dense twin by more: named trials, and a table.

    .venv/bin/python benchmarks/recipes.py run moe twin moe-32-experts --seeds 1
    .venv/bin/python benchmarks/recipes.py table              # mixtures beside the best twin
    .venv/bin/python benchmarks/recipes.py balance            # what balances, and its figure
    .venv/bin/python benchmarks/recipes.py list

A trial is the demo's settings with some changed, for the mixture or for its dense twin. All read
the same text in the same order for the same number of tokens, however large their steps are, and
each is one run of the trainer. `run` trains what `results/recipes.json` does not have yet and adds
it there; `table` compares every mixture with a twin: the share of the twin's training compute and
of its time at which the mixture reached the twin's final held-out loss, with the same seed.

Time is CPU time of the process, evaluations included, on one thread: of wall time nothing could
be said beside other work. Compute is counted from the settings; Muon's own products are in it.
MaxVio is the largest load over the mean, less one, as Wang et al. 2024 define it, mean over layers:
`global` over all held-out tokens after training, `batch` over each of the last tenth of the steps.
A spike is a step whose loss is 0.3 nats above the mean of the 20 before it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import measure
import torch
from matplotlib.figure import Figure
from recipes_trials import TRIALS, Trial

from moestro.cli.train import DEMO, fit_vocabulary
from moestro.config import RunConfig
from moestro.data.windows import Corpus, prepare
from moestro.models.network import ModelOutput
from moestro.models.twin import dense_twin
from moestro.settings import load_settings
from moestro.train.compare import crossing
from moestro.train.intervals import half_width
from moestro.train.loop import Trainer
from moestro.train.memory import keep_freed_memory
from moestro.train.metrics import METRICS_NAME, Point, read_metrics

RESULT = measure.RESULTS / "recipes.json"
FIGURE = measure.ROOT / "docs" / "figures" / "balance-methods.png"
TOKENS = 200 * 16 * 256
EVALUATIONS, EVAL_TOKENS = 20, 12_288
SPIKE_NATS, SPIKE_WINDOW = 0.3, 20


class Trained(NamedTuple):
    """What one run measured.

    Attributes:
        points: its evaluations.
        cpu_s: CPU time of all of it.
        max_vio_batch, max_vio_global: as above; None without a mixture.
        max_vio_curve: `batch`, over each twentieth of the steps.
        dead: experts without a held-out token, over all layers.
        spikes: steps with one.
    """

    points: list[dict[str, Any]]
    cpu_s: float
    max_vio_batch: float | None
    max_vio_global: float | None
    max_vio_curve: list[float]
    dead: int | None
    spikes: int


def settings(trial: Trial, seed: int, tokens: int) -> RunConfig:
    """The run's settings; steps follow from the tokens."""
    cfg = load_settings(RunConfig, DEMO, list(trial.settings))
    steps = max(1, int(tokens * trial.length) // (cfg.train.batch_size * cfg.data.seq_len))
    chosen = {
        "steps": steps, "seed": seed, "eval_every": max(1, steps // EVALUATIONS),
        "eval_tokens": EVAL_TOKENS, "save_every": steps,
    }  # fmt: skip
    return cfg.model_copy(update={"train": cfg.train.model_copy(update=chosen)})


def train(trial: Trial, seed: int, tokens: int, text: Path) -> Trained:
    """Train one run from nothing."""
    cfg = settings(trial, seed, tokens)
    corpus = prepare(cfg.data, text)
    cfg = fit_vocabulary(cfg, corpus)
    if trial.side == "twin":
        cfg = cfg.model_copy(update={"model": dense_twin(cfg.model)})
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(cfg, Path(folder), corpus)
        started_s = time.process_time()
        result = trainer.train()
        cpu_s = time.process_time() - started_s
        records = read_metrics(Path(folder) / METRICS_NAME)
    if result.stopped_by:
        sys.exit(f"stopped by signal {result.stopped_by}")
    vio, dead = held_out_loads(trainer, corpus)
    batch_N = [
        statistics.fmean(layer["imbalance"] - 1 for layer in record["layers"])
        for record in records
        if record["layers"]
    ]
    size = max(1, len(batch_N) // EVALUATIONS)
    curve = [statistics.fmean(batch_N[i : i + size]) for i in range(0, len(batch_N), size)]
    batch = statistics.fmean(batch_N[-max(1, len(batch_N) // 10) :]) if batch_N else None
    points = [point._asdict() for point in result.history]
    losses = [record["loss"] for record in records]
    return Trained(points, cpu_s, batch, vio, curve, dead, spikes(losses))


@torch.no_grad()
def held_out_loads(trainer: Trainer, corpus: Corpus) -> tuple[float | None, int | None]:
    """MaxVio and dead experts over the held-out text."""
    trainer.model.eval()
    counts_LE: Any = 0
    for tokens_NS, _ in corpus.held_out(EVAL_TOKENS).values():
        for rows in tokens_NS.split(16):
            output: ModelOutput = trainer.model(rows[:, :-1])
            if not output.routings:
                return None, None
            counts_LE = counts_LE + torch.stack([r.counts_E() for r in output.routings])
    counts_LE = counts_LE.double()
    vio_L = counts_LE.amax(1) / counts_LE.mean(1) - 1
    return float(vio_L.mean()), int((counts_LE == 0).sum())


def spikes(losses: list[float]) -> int:
    """Steps whose loss lies far above those before."""
    places = range(SPIKE_WINDOW, len(losses))
    return sum(
        losses[i] > statistics.fmean(losses[i - SPIKE_WINDOW : i]) + SPIKE_NATS for i in places
    )


def read() -> dict[str, Any]:
    """The results so far: by trial, by seed."""
    return json.loads(RESULT.read_text())["trials"] if RESULT.exists() else {}


def run(names: list[str], seeds: list[int], tokens: int) -> None:
    """Train what is missing; every run is written as it ends."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as text:
        for seed, name in itertools.product(seeds, names):
            trial, key = TRIALS[name], f"{name}@{tokens}"
            if str(seed) in read().get(key, {"runs": {}})["runs"]:
                continue
            data = sorted(each for each in trial.settings if each.startswith("data."))
            folder = Path(text) / (",".join(data).replace("/", "-") or "demo")
            trained = train(trial, seed, tokens, folder)
            done = read()
            entry = done.setdefault(key, {
                "trial": name, **trial._asdict(), "tokens": tokens,
                "runs": {},
                "command": f"python benchmarks/recipes.py run {name} --tokens {tokens} --seed SEED",
            })  # fmt: skip
            entry["runs"][str(seed)] = trained._asdict() | {"machine": measure.machine()}
            result = {"benchmark": "recipes", "trials": done}
            RESULT.write_text(json.dumps(result, indent=1) + "\n")
            loss = trained.points[-1]["bits_per_byte"]["all"]
            print(f"{key} seed {seed}: {loss:.4f} in {trained.cpu_s:.0f} CPU s", flush=True)


class Share(NamedTuple):
    """What a mixture took to reach the twin's final loss, over what the twin took."""

    tokens: float
    compute: float
    time: float


def share(mixture: dict[str, Any], twin: dict[str, Any]) -> Share | None:
    """None: it never reached it."""
    points = [Point(**point) for point in mixture["points"]]
    last = Point(**twin["points"][-1])
    tokens = crossing(points, last.bits_per_byte["all"], lambda point: point.tokens)
    if tokens is None:
        return None
    compute = tokens * mixture["token_flops"] / (last.tokens * twin["token_flops"])
    time = tokens / points[-1].tokens * mixture["cpu_s"] / twin["cpu_s"]
    return Share(tokens / last.tokens, compute, time)


def rows(tokens: int, against: str | None) -> list[dict[str, Any]]:
    """One row a trial; the twin is the named one, or the best by final loss."""
    trials = _trials(tokens, balance=False)
    for entry in trials:
        for each in entry["runs"].values():
            last = each["points"][-1]
            each["token_flops"] = last["train_flops"] / last["tokens"]
    twins = {v["trial"]: v["runs"] for v in trials if v["side"] == "twin"}
    best = against or min(twins, key=lambda name: mean_final(twins[name]))
    print(f"twin: {best}")
    table = []
    for entry in trials:
        runs, row = entry["runs"], _row(entry)
        if entry["side"] == "mixture":
            pairs = [share(each, twins[best][s]) for s, each in runs.items() if s in twins[best]]
            reached = [pair for pair in pairs if pair is not None]
            for name in Share._fields if len(reached) == len(pairs) > 0 else ():
                values = [getattr(each, name) for each in reached]
                row |= {name: statistics.fmean(values), f"± {name}": spread(values)}
        table.append(row)
    return sorted(table, key=lambda row: row["bits per byte"])


def _trials(tokens: int, balance: bool) -> list[dict[str, Any]]:
    """Those of as many tokens: of what balances a mixture, or all others."""
    found = (entry for entry in read().values() if entry["tokens"] == tokens)
    return [entry for entry in found if entry["trial"].startswith("balance-") == balance]


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    """What was measured of a trial alone, mean over seeds."""
    runs = list(entry["runs"].values())
    losses = [final(each) for each in runs]
    row: dict[str, Any] = {"trial": entry["trial"], "seeds": len(runs)}
    row |= {"bits per byte": statistics.fmean(losses), "spread": spread(losses)}
    row["CPU s"] = statistics.fmean(each["cpu_s"] for each in runs)
    if entry["side"] == "mixture":
        for name in ("max_vio_batch", "max_vio_global", "dead", "spikes"):
            row[name] = statistics.fmean(each[name] for each in runs)
    return row


def figure(tokens: int) -> None:
    """Balance over the training, and the final losses, of the trials that only differ in it."""
    drawn = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = drawn.subplots(1, 2)
    trials = _trials(tokens, balance=True)
    for place, entry in enumerate(trials):
        name, runs = entry["trial"].removeprefix("balance-"), list(entry["runs"].values())
        curves = list(zip(*(each["max_vio_curve"] for each in runs), strict=True))
        x = [(i + 0.5) / len(curves) for i in range(len(curves))]
        (line,) = left.plot(x, [statistics.fmean(c) for c in curves], lw=1.8, label=name)
        left.fill_between(x, [*map(min, curves)], [*map(max, curves)], alpha=0.2, lw=0)
        right.plot([final(each) for each in runs], [place] * len(runs), "o", color=line.get_color())
    left.set_xlabel("share of the training")
    left.set_ylabel("MaxVio of a step, mean over layers")
    left.set_yscale("log")
    left.set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    left.minorticks_off()
    left.legend(frameon=False)
    names = [entry["trial"].removeprefix("balance-") for entry in trials]
    right.set_yticks(range(len(trials)), names)
    right.set_xlabel("held-out bits per byte, each seed")
    right.margins(y=0.2)
    drawn.savefig(FIGURE, dpi=150)
    print(f"written to {FIGURE.relative_to(measure.ROOT)}")


def final(one: dict[str, Any]) -> float:
    """Final held-out bits per byte."""
    return float(one["points"][-1]["bits_per_byte"]["all"])


def mean_final(runs: dict[str, Any]) -> float:
    """The mean of `final` over seeds."""
    return statistics.fmean(final(each) for each in runs.values())


def balance_rows(tokens: int) -> list[dict[str, Any]]:
    """One row a method; differences to Switch's are paired by seed, with the 95 % interval."""
    trials = _trials(tokens, balance=True)
    (base,) = (each["runs"] for each in trials if each["trial"] == "balance-switch")
    table = []
    for entry in trials:
        row, runs = _row(entry), entry["runs"]
        if runs is not base:
            more = [final(each) - final(base[seed]) for seed, each in runs.items() if seed in base]
            mean, half = statistics.fmean(more), half_width(more)
            error = statistics.stdev(more) / len(more) ** 0.5 if len(more) > 1 else None
            row |= {"difference": mean, "error": error, "low": mean - half, "high": mean + half}
        table.append(row)
    return table


def spread(values: list[float]) -> float | None:
    """Standard deviation over seeds."""
    return statistics.stdev(values) if len(values) > 1 else None


def show(table: list[dict[str, Any]]) -> None:
    """The rows, in columns."""
    keys = list(dict.fromkeys(key for row in table for key in row))
    cells = [keys, *([_cell(row.get(key)) for key in keys] for row in table)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "table", "balance", "list"))
    parser.add_argument("names", nargs="*", help="trials; see `list`")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--seeds", type=int, default=1, help="that many, from 0 up")
    chosen.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--against", help="the twin's trial; default: the best one")
    args = parser.parse_args()
    if args.what == "list":
        for name, trial in TRIALS.items():
            print(f"{name} ({trial.side}): {' '.join(trial.settings)}")
    elif args.what == "balance":
        show(balance_rows(args.tokens))
        figure(args.tokens)
    elif args.what == "table":
        show(rows(args.tokens, args.against))
    else:
        if unknown := set(args.names) - TRIALS.keys():
            parser.error(f"no such trial: {', '.join(sorted(unknown))}; see `list`")
        seeds = list(range(args.seeds)) if args.seed is None else [args.seed]
        run(args.names, seeds, args.tokens)


if __name__ == "__main__":
    main()
