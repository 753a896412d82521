"""`moestro compare`: train a mixture and its dense twin on the same text and report the result."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moestro.cli.train import (
    DEMO,
    AsJson,
    Assignments,
    ConfigPath,
    OutPath,
    Sources,
    exit_if_stopped,
    fit_vocabulary,
    prepare_options,
)

if TYPE_CHECKING:
    from moestro.config import RunConfig
    from moestro.data.windows import Corpus
    from moestro.train.compare import ComparedRun, Curve

Minutes = Annotated[
    float | None,
    typer.Option(
        min=0.1,
        help="Choose train.steps so that all runs together take about this long here; "
        "default: what the settings say.",
    ),
]
Seeds = Annotated[
    int | None, typer.Option(min=1, help="Runs of each model, with seeds counted up; default 1.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Resume the comparison in --out, with its settings.")
]

SETTINGS_NAME = "compare-settings.json"


def compare(
    config: ConfigPath = None,
    out: OutPath = None,
    assignments: Assignments = None,
    source: Sources = None,
    minutes: Minutes = None,
    seeds: Seeds = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Train a mixture and its dense twin on the same text, and report the compute saved.

    The twin has the same active parameters per token, so both cost the same compute. Progress
    goes to stderr, the result to stdout; the run folder gets compare.json and compare.png.
    """
    from moestro.errors import ConfigError
    from moestro.files import write_json
    from moestro.train.compare import as_json as to_json
    from moestro.train.compare import plan
    from moestro.train.figures import comparison_figure
    from moestro.train.memory import keep_freed_memory

    keep_freed_memory()
    folder, stated = prepare_options(out, assignments, source)
    if resume:
        if out is None:
            raise ConfigError(
                "--resume needs --out FOLDER, the folder of the comparison to go on with"
            )
        if config or assignments or source or seeds or minutes:
            raise ConfigError("--resume takes the saved settings; leave the other options out")
        cfg, corpus, seeds = _reopen(folder)
    else:
        seeds = seeds or 1
        cfg, corpus = _open(folder, config, stated)
        cfg = _settle(cfg, corpus, folder, seeds, minutes)
        write_json(folder / SETTINGS_NAME, {"seeds": seeds, "run": cfg.model_dump(mode="json")})
    curves = [_train(entry, corpus, folder) for entry in plan(cfg, folder, seeds)]
    result = to_json(cfg, curves)
    write_json(folder / "compare.json", result)
    comparison_figure(curves, folder / "compare.png")
    if as_json:
        typer.echo(json.dumps(result))
        return
    _print(cfg, curves)
    typer.echo(result["sentence"])
    typer.echo(f"written: {folder / 'compare.json'}, {folder / 'compare.png'}")


def _open(folder: Path, config: Path | None, stated: list[str]) -> tuple[RunConfig, Corpus]:
    """Settings and text of a new comparison, in a folder that holds nothing of the kind."""
    from moestro.config import RunConfig
    from moestro.data.windows import prepare
    from moestro.errors import ConfigError
    from moestro.settings import load_settings
    from moestro.train.state import claim_folder, holds_run

    if (folder / SETTINGS_NAME).exists():
        raise ConfigError(f"{folder} holds a comparison already; add --resume, or choose --out")
    if holds_run(folder):
        raise ConfigError(f"{folder} holds a run of moestro train; choose another --out")
    cfg = load_settings(RunConfig, config or DEMO, stated)
    if cfg.data.chat is not None:
        raise ConfigError("compare trains on text; leave data.chat out, which is moestro tune's")
    claim_folder(folder, resume=False)
    return cfg, prepare(cfg.data, folder / "data")


def _reopen(folder: Path) -> tuple[RunConfig, Corpus, int]:
    """Settings, text and seeds of a comparison to go on with."""
    from moestro.checkpoints.folders import read_json
    from moestro.config import RunConfig
    from moestro.data.windows import Corpus
    from moestro.errors import CheckpointError, ConfigError
    from moestro.train.compare import plan
    from moestro.train.state import corpus_of, newest_or_none

    saved = folder / SETTINGS_NAME
    if not saved.is_file():
        raise ConfigError(f"{folder} holds no comparison to go on with: no {SETTINGS_NAME}")
    try:
        values = read_json(saved)
        cfg, seeds = RunConfig(**values["run"]), int(values["seeds"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{saved} was altered: {error}; start another comparison") from None
    saves = [newest_or_none(entry.folder) for entry in plan(cfg, folder, seeds)]
    checkpoint = next((save for save in saves if save is not None), None)
    corpus = corpus_of(folder / "data", cfg.data, checkpoint)
    assert isinstance(corpus, Corpus)
    return cfg, corpus, seeds


def _settle(
    cfg: RunConfig, corpus: Corpus, folder: Path, seeds: int, minutes: float | None
) -> RunConfig:
    """Fit the vocabulary to the tokenizer, and the steps to the minutes."""
    from moestro.train.compare import fit_to, plan

    cfg = fit_vocabulary(cfg, corpus)
    plan(cfg, folder, seeds)  # refuses a dense model before anything is timed
    for note in corpus.notes:
        typer.echo(note, err=True)
    if minutes is not None:
        typer.echo("timing a few steps of each model …", err=True)
        cfg = fit_to(cfg, corpus, folder, seeds, minutes)
    tokens = cfg.train.steps * cfg.train.batch_size * cfg.data.seq_len
    typer.echo(
        f"{cfg.train.steps} steps of {cfg.train.batch_size} × {cfg.data.seq_len} tokens for each "
        f"run ({tokens:,} of {corpus.num_train_tokens:,} training tokens)",
        err=True,
    )
    return cfg


def _train(entry: ComparedRun, corpus: Corpus, folder: Path) -> Curve:
    """Train one run to its end, or read it where it has been trained already."""
    from moestro.train.compare import Curve, done
    from moestro.train.loop import Trainer
    from moestro.train.metrics import METRICS_NAME, history, read_metrics
    from moestro.train.progress import ProgressDisplay
    from moestro.train.state import newest_or_none

    if done(entry):
        return Curve(entry.kind, entry.seed, history(read_metrics(entry.folder / METRICS_NAME)))
    title = {"moe": "mixture of experts", "dense": "dense twin"}[entry.kind]
    with ProgressDisplay(f"{title}, seed {entry.seed}: {entry.folder}") as progress:
        trainer = Trainer(entry.cfg, entry.folder, corpus, progress)
        result = trainer.train(resume=newest_or_none(entry.folder) is not None)
    exit_if_stopped(result, f"compare --resume --out {shlex.quote(str(folder))}")
    return Curve(entry.kind, entry.seed, result.history)


def _print(cfg: RunConfig, curves: list[Curve]) -> None:
    """The table for people."""
    from rich.console import Console
    from rich.table import Table

    from moestro.models.count import count
    from moestro.train.compare import mean_and_spread, models

    table = Table("", "mixture", "dense twin", title="held-out bits per byte after the same tokens")
    counts = [count(model) for model in models(cfg).values()]
    table.add_row("parameters", *(f"{c.total:,}" for c in counts))
    table.add_row("active per token", *(f"{c.active:,}" for c in counts))
    flops = [c.train_flops(cfg.data.seq_len) / 1e6 for c in counts]
    table.add_row("training MFLOP per token", *(f"{f:.2f}" for f in flops))
    finals = [[c.final for c in curves if c.kind == kind] for kind in models(cfg)]
    speeds = [[p.tokens / p.seconds for p in points] for points in finals]
    table.add_row("tokens/s", *(f"{mean_and_spread(s)[0]:,.0f}" for s in speeds))
    for name in finals[0][0].bits_per_byte:
        cells = []
        for points in finals:
            mean, spread = mean_and_spread([p.bits_per_byte[name] for p in points])
            cells.append(f"{mean:.4f}" if len(points) == 1 else f"{mean:.4f} ± {spread:.4f}")
        table.add_row(name, *cells, style="bold" if name == "all" else "")
    Console().print(table)
