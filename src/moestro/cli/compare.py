"""`moestro compare`: train mixtures and their dense twin on the same text and report the result."""

from __future__ import annotations

import json
import os
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
    from moestro.train.compare import ComparedRun, Comparison, Curve

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
Experts = Annotated[
    str | None,
    typer.Option(
        metavar="E,E,…",
        help="A mixture for each number of experts, as 8,16,32,64; default: the settings'.",
    ),
]
Granularity = Annotated[
    str | None,
    typer.Option(
        metavar="G,G,…",
        help="A mixture for each number of parts that every expert is split into, as 1,2,4: G "
        "times the experts, G times as many per token, 1/G as wide.",
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        metavar="TFLOP",
        help="Choose each run's steps so that it costs this training compute (10^12 operations).",
    ),
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
    budget: Budget = None,
    seeds: Seeds = None,
    experts: Experts = None,
    granularity: Granularity = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Train a mixture and its dense twin on the same text, and report the compute saved.

    The twin has the same active parameters per token, so both cost the same compute. With
    --experts or --granularity several mixtures are compared with the twin of the settings' own:
    they cost more by their larger routers, which is counted. The published laws are fitted to what
    they reached. Progress goes to stderr, the result to stdout; the run folder
    gets compare.json and compare.png, and scaling.png of several mixtures.
    """
    from moestro.errors import ConfigError
    from moestro.files import write_json
    from moestro.train.compare import as_json as to_json
    from moestro.train.compare import plan
    from moestro.train.figures import comparison_figure, scaling_figure
    from moestro.train.memory import keep_freed_memory

    _refuse_ranks()
    keep_freed_memory()
    folder, stated = prepare_options(out, assignments, source)
    if resume:
        if out is None:
            raise ConfigError(
                "--resume needs --out FOLDER, the folder of the comparison to go on with"
            )
        if config or assignments or source or seeds or minutes or budget or experts or granularity:
            raise ConfigError("--resume takes the saved settings; leave the other options out")
        cfg, corpus, comparison = _reopen(folder)
    else:
        comparison = _asked(seeds, experts, granularity, budget, minutes)
        if budget or minutes:
            _refuse_steps("--budget" if budget else "--minutes", stated)
        cfg, corpus = _begin(folder, config, stated, comparison, minutes)
    curves = [_train(entry, corpus, folder) for entry in plan(cfg, folder, comparison)]
    result = to_json(cfg, curves, comparison)
    write_json(folder / "compare.json", result)
    comparison_figure(curves, folder / "compare.png")
    written = ["compare.json", "compare.png"]
    if comparison.several:
        scaling_figure(cfg, comparison, curves, folder / "scaling.png")
        written.append("scaling.png")
    if as_json:
        typer.echo(json.dumps(result))
        return
    _print(cfg, curves, comparison)
    typer.echo(result["sentence"])
    typer.echo(f"written: {', '.join(str(folder / name) for name in written)}")


def _asked(
    seeds: int | None,
    experts: str | None,
    granularity: str | None,
    budget: float | None,
    minutes: float | None,
) -> Comparison:
    """What the options ask for."""
    from moestro.errors import ConfigError
    from moestro.train.compare import Comparison

    if budget is not None and minutes is not None:
        raise ConfigError("--budget and --minutes both choose the steps; give one of them")
    if budget is not None and not 0 < budget < float("inf"):
        raise ConfigError(f"--budget must be a number of TFLOP above 0, not {budget:g}")
    return Comparison(
        seeds or 1, _numbers("--experts", experts), _numbers("--granularity", granularity), budget
    )


def _refuse_ranks() -> None:
    """Every process would train every run in the same folders."""
    from moestro.errors import ConfigError
    from moestro.train.distributed import ranks_from

    if (world := ranks_from(os.environ).world) > 1:
        raise ConfigError(
            f"compare trains one run after the other in one process, not in {world}; start it "
            "without torchrun"
        )


def _refuse_steps(option: str, stated: list[str]) -> None:
    """An option that chooses the steps leaves none to be set."""
    from moestro.errors import ConfigError
    from moestro.settings import read_values
    from moestro.train.state import dotted

    chosen = ("train.steps", "train.eval_every", "train.save_every")
    for name, value in dotted(read_values(None, stated)).items():
        if name in chosen:
            raise ConfigError(
                f"{option} chooses {', '.join(chosen)}; leave --set {name}={value} out, or {option}"
            )


def _numbers(name: str, text: str | None) -> tuple[int, ...]:
    """The numbers of an option like 8,16,32."""
    from moestro.errors import ConfigError

    if text is None:
        return ()
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise ConfigError(f"{name} takes numbers above 0 with commas between, as 8,16; not {text}")
    return tuple(map(int, words))


def _begin(
    folder: Path, config: Path | None, stated: list[str], comparison: Comparison,
    minutes: float | None,
) -> tuple[RunConfig, Corpus]:  # fmt: skip
    """Settings and text of a new comparison, in a folder that holds nothing of the kind."""
    from moestro.config import RunConfig
    from moestro.data.windows import prepare
    from moestro.errors import ConfigError
    from moestro.files import write_json
    from moestro.settings import load_settings
    from moestro.train.compare import plan
    from moestro.train.initial import claimed
    from moestro.train.preflight import check_run
    from moestro.train.state import holds_run

    if (folder / SETTINGS_NAME).exists():
        raise ConfigError(f"{folder} holds a comparison already; add --resume, or choose --out")
    if holds_run(folder):
        raise ConfigError(f"{folder} holds a run of moestro train; choose another --out")
    cfg = load_settings(RunConfig, config or DEMO, stated)
    if cfg.data.chat is not None:
        raise ConfigError("compare trains on text; leave data.chat out, which is moestro tune's")
    # Refuses what cannot be trained before text is read; the steps of a budget are known after it.
    for entry in plan(cfg, folder, comparison._replace(budget_tflop=None)):
        check_run(entry.cfg)
    with claimed(folder):
        corpus = prepare(cfg.data, folder / "data")
        cfg = _settle(cfg, corpus, folder, comparison, minutes)
        saved = {"comparison": comparison._asdict(), "run": cfg.model_dump(mode="json")}
        write_json(folder / SETTINGS_NAME, saved)
    return cfg, corpus


def _reopen(folder: Path) -> tuple[RunConfig, Corpus, Comparison]:
    """Settings and text of a comparison to go on with."""
    from moestro.checkpoints.folders import read_json
    from moestro.config import RunConfig
    from moestro.data.windows import Corpus
    from moestro.errors import CheckpointError, ConfigError
    from moestro.train.compare import Comparison, plan
    from moestro.train.state import corpus_of, newest_or_none

    saved = folder / SETTINGS_NAME
    if not saved.is_file():
        raise ConfigError(f"{folder} holds no comparison to go on with: no {SETTINGS_NAME}")
    try:
        values = read_json(saved)
        cfg, asked = RunConfig(**values["run"]), dict(values["comparison"])
        for name in ("experts", "granularities"):
            asked[name] = tuple(map(int, asked[name]))
        comparison = Comparison(**asked)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{saved} was altered: {error}; start another comparison") from None
    saves = [newest_or_none(entry.folder) for entry in plan(cfg, folder, comparison)]
    checkpoint = next((save for save in saves if save is not None), None)
    corpus = corpus_of(folder / "data", cfg.data, checkpoint)
    assert isinstance(corpus, Corpus)
    return cfg, corpus, comparison


def _settle(
    cfg: RunConfig, corpus: Corpus, folder: Path, comparison: Comparison, minutes: float | None
) -> RunConfig:
    """Fit the vocabulary to the tokenizer, and the steps to the minutes."""
    from moestro.train.compare import fit_to, plan

    cfg = fit_vocabulary(cfg, corpus)
    entries = plan(cfg, folder, comparison)
    for note in corpus.notes:
        typer.echo(note, err=True)
    if minutes is not None:
        typer.echo("timing a few steps of each model …", err=True)
        cfg = fit_to(cfg, corpus, folder, comparison, minutes)
        entries = plan(cfg, folder, comparison)
    step_tokens = cfg.train.batch_size * cfg.data.seq_len
    for steps in sorted({entry.cfg.train.steps for entry in entries}):
        kinds = dict.fromkeys(e.kind for e in entries if e.cfg.train.steps == steps)
        whose = ", ".join(kinds) if comparison.budget_tflop else "each run"
        typer.echo(
            f"{steps} steps of {cfg.train.batch_size} × {cfg.data.seq_len} tokens for {whose} "
            f"({steps * step_tokens:,} of {corpus.num_train_tokens:,} training tokens)",
            err=True,
        )
    return cfg


def _train(entry: ComparedRun, corpus: Corpus, folder: Path) -> Curve:
    """Train one run to its end, or read it where it has been trained already."""
    from moestro.train.compare import MIXTURE, TWIN, Curve, done
    from moestro.train.loop import Trainer
    from moestro.train.metrics import METRICS_NAME, history, read_metrics
    from moestro.train.progress import ProgressDisplay
    from moestro.train.state import holds_run

    if done(entry):
        return Curve(entry.kind, entry.seed, history(read_metrics(entry.folder / METRICS_NAME)))
    title = {MIXTURE: "mixture of experts", TWIN: "dense twin"}.get(entry.kind, entry.kind)
    with ProgressDisplay(f"{title}, seed {entry.seed}: {entry.folder}") as progress:
        trainer = Trainer(entry.cfg, entry.folder, corpus, progress)
        result = trainer.train(resume=holds_run(entry.folder))
    exit_if_stopped(result, f"compare --resume --out {shlex.quote(str(folder))}")
    return Curve(entry.kind, entry.seed, result.history)


def _print(cfg: RunConfig, curves: list[Curve], comparison: Comparison) -> None:
    """The table for people, and the laws of several mixtures."""
    from rich.console import Console
    from rich.table import Table

    from moestro.cli.tables import cell
    from moestro.data.domains import ALL
    from moestro.models.count import count
    from moestro.train.compare import MIXTURE, TWIN, fitted, mean_and_spread, models
    from moestro.train.scaling import told

    alike = "compute" if comparison.budget_tflop else "tokens"
    table = Table("", title=f"held-out bits per byte after the same {alike}")
    made = models(cfg, comparison)
    for kind in made:
        table.add_column({MIXTURE: "mixture", TWIN: "dense twin"}.get(kind, kind))
    counts = [count(model) for model in made.values()]
    table.add_row("parameters", *(f"{c.total:,}" for c in counts))
    table.add_row("active per token", *(f"{c.active:,}" for c in counts))
    finals = [[c.final for c in curves if c.kind == kind] for kind in made]
    flops = [points[0].train_flops / points[0].tokens / 1e6 for points in finals]
    table.add_row("training MFLOP per token", *(f"{f:.2f}" for f in flops))
    speeds = [[p.tokens / p.seconds for p in points] for points in finals]
    table.add_row("tokens/s", *(f"{mean_and_spread(s)[0]:,.0f}" for s in speeds))
    for name in finals[0][0].bits_per_byte:
        cells = []
        for points in finals:
            mean, spread = mean_and_spread([p.bits_per_byte[name] for p in points])
            cells.append(f"{mean:.4f}" if len(points) == 1 else f"{mean:.4f} ± {spread:.4f}")
        table.add_row(cell(name), *cells, style="bold" if name == ALL else "")
    Console().print(table)
    for law in fitted(cfg, comparison, curves):
        typer.echo(f"law of {told(law)}")
