"""`moestro train`: train a language model on text, with a live display, checkpoints and resume."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import moestro
from moestro.cli.opening import AcceptField
from moestro.cli.tables import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moestro.config import RunConfig
    from moestro.data.rows import ChatCorpus
    from moestro.data.windows import Corpus
    from moestro.train.distributed import Ranks
    from moestro.train.loop import Result

DEMO = Path(moestro.__file__).with_name("demo.toml")

ConfigPath = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Settings as TOML or JSON; default: the demo's.")
]
OutPath = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Folder of the run; default runs/DATE-TIME.")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="One setting, as in train.steps=200; repeat."),
]
Sources = Annotated[
    list[str] | None,
    typer.Option(
        "--source", metavar="PATH",
        help="File, folder or glob to train on; repeat. Default: the text every Python "
        "installation has.",
    ),
]  # fmt: skip
Resume = Annotated[
    bool, typer.Option("--resume", help="Resume the run in --out, with its settings.")
]
Init = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Begin from these weights: a run, a checkpoint, a folder in Hugging Face's layout or "
        "org/model. The model's settings and tokenizer come from them.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


def train(
    config: ConfigPath = None,
    out: OutPath = None,
    assignments: Assignments = None,
    source: Sources = None,
    init: Init = None,
    resume: Resume = False,
    as_json: AsJson = False,
    accept_field: AcceptField = None,
) -> None:
    """Train a language model on text, as a mixture of experts or dense.

    Progress goes to stderr, the result to stdout. Ctrl-C finishes the step and saves; --resume
    continues from there. Under torchrun the batch is shared by all processes, and the model as
    parallel says; what torchrun starts again resumes.
    """
    from moestro.checkpoints.hub import find_checkpoint
    from moestro.errors import ConfigError
    from moestro.train.distributed import joined, pick_device, ranks_from
    from moestro.train.memory import keep_freed_memory
    from moestro.train.preflight import check_run
    from moestro.train.restarts import goes_on, meeting_settings

    keep_freed_memory()
    folder, stated = prepare_options(out, assignments, source)
    if resume and out is None:
        raise ConfigError("--resume needs --out FOLDER, the folder of the run to go on with")
    if resume and init is not None:
        raise ConfigError("--resume goes on from the run's own weights; leave --init out")
    if accept_field and init is None:
        raise ConfigError("--accept-field is about the weights of --init; leave it out")
    accepted = accept_field or ()
    device, timeout_s = meeting_settings(folder, DEMO, config, stated)
    with joined(pick_device(device, ranks_from(os.environ)), timeout_s=timeout_s) as ranks:
        again = not resume and goes_on(folder, ranks, os.environ, {"--init": init})
        begin = None if init is None or again else find_checkpoint(init)
        cfg = _settings(folder, begin, config, stated, resume or again, accepted)
        check_run(cfg, ranks)
        if begin is not None:
            _begin(cfg, folder, begin, ranks, accepted, init)
        cfg, result = run_shown(cfg, folder, resume or again or begin is not None, ranks)
    if ranks.writes:
        print_outcome(folder, cfg, result, as_json)
    exit_if_stopped(result, f"train --resume --out {shlex.quote(str(folder))}", ranks.writes)


def _settings(
    folder: Path, begin: Path | None, config: Path | None, stated: list[str], resume: bool,
    accepted: Sequence[str],
) -> RunConfig:  # fmt: skip
    """Those of a new run, of one that begins from weights, or of the one in the folder."""
    from moestro.checkpoints.folders import step_folders
    from moestro.config import RunConfig
    from moestro.settings import load_settings
    from moestro.train.initial import initial_settings
    from moestro.train.restarts import settings_again
    from moestro.train.state import ORIGIN, SETTINGS_NAME

    if begin is not None:
        return initial_settings(begin, folder, DEMO, config, stated, accepted)
    if resume and (folder / ORIGIN).is_dir() and step_folders(folder):
        return settings_again(folder, config, stated)
    if config is None and resume and (folder / SETTINGS_NAME).exists():
        config = folder / SETTINGS_NAME
    return load_settings(RunConfig, config or DEMO, stated)


def prepare_options(
    out: Path | None, assignments: list[str] | None, sources: list[str] | None
) -> tuple[Path, list[str]]:
    """The folder of a run, and what --set and --source say as assignments."""
    from moestro.errors import ConfigError, DataError
    from moestro.text import utf8
    from moestro.train.distributed import ranks_from

    if out == Path() or "" in (sources or []):  # an empty one would mean the current folder
        raise ConfigError("--out and --source need a name; an empty one was given")
    if out is None and ranks_from(os.environ).world > 1:
        raise ConfigError("several processes need --out FOLDER, which they all can reach")
    for source in sources or []:
        try:
            utf8(source)
        except DataError:
            raise ConfigError(
                f"the path {source!r} is not text in UTF-8, as saved settings are; rename it, or "
                "give a folder above it"
            ) from None
    stated = [f"data.sources={json.dumps(sources)}"] if sources else []
    return out or Path("runs") / time.strftime("%Y%m%d-%H%M%S"), [*(assignments or []), *stated]


def fit_vocabulary(cfg: RunConfig, corpus: Corpus | ChatCorpus) -> RunConfig:
    """The settings with a vocabulary that holds the tokenizer's."""
    from moestro.train.task import vocabulary

    needed = vocabulary(cfg.model, corpus.tokenizer, cfg.data.seq_len)
    if cfg.model.vocab_size >= needed:
        return cfg
    model = cfg.model.model_copy(update={"vocab_size": needed})
    return cfg.model_copy(update={"model": model})


def exit_if_stopped(result: Result, resume: str, speaks: bool = True) -> None:
    """End as a signal that stopped a run asks for; `resume` is the command that goes on."""
    if not result.stopped_by:
        return
    name = signal.Signals(result.stopped_by).name
    _say(f"stopped by {name} after step {result.step}; go on with: moestro {resume}", speaks)
    raise typer.Exit(128 + result.stopped_by)


def _begin(
    cfg: RunConfig,
    folder: Path,
    begin: Path,
    ranks: Ranks,
    accept_fields: Sequence[str],
    init: str | None,
) -> None:
    """Save the weights to begin from as the run's step 0; one process does, the others wait."""
    from moestro.cli.opening import open_shown
    from moestro.train.initial import claimed, keep_origin, save_step_zero
    from moestro.train.restarts import note_job
    from moestro.train.state import corpus_of

    if ranks.writes:
        with claimed(folder):
            note_job(folder, os.environ, {"--init": init})
            keep_origin(begin, folder)
            corpus = corpus_of(folder / "data", cfg.data, None)
            model = open_shown(begin, dtype="fp32", accept_fields=accept_fields).model
            save_step_zero(folder, cfg, model, corpus)
    ranks.wait()


def run_shown(cfg: RunConfig, folder: Path, resume: bool, ranks: Ranks) -> tuple[RunConfig, Result]:
    """Train with a display; the settings with the vocabulary that the tokenizer needs."""
    from moestro.train.loop import Trainer
    from moestro.train.progress import ProgressDisplay

    corpus = _corpus(cfg, folder, resume, ranks)
    given, cfg = cfg, fit_vocabulary(cfg, corpus)
    if cfg is not given:
        size, name = cfg.model.vocab_size, corpus.tokenizer.name
        _say(f"model.vocab_size = {size}, as the tokenizer {name} needs", ranks.writes)
    for text in (_describe(cfg, corpus), *corpus.notes):
        _say(text, ranks.writes)
    with ProgressDisplay(str(folder)) if ranks.writes else nullcontext() as progress:
        return cfg, Trainer(cfg, folder, corpus, progress, ranks).train(resume)


def _corpus(cfg: RunConfig, folder: Path, resume: bool, ranks: Ranks) -> Corpus | ChatCorpus:
    """Prepare the text in the run's folder: one process writes it, the others read it then."""
    from moestro.train.initial import claimed
    from moestro.train.restarts import note_job
    from moestro.train.sharded_state import newest_together
    from moestro.train.state import claim_folder, corpus_of

    begins = ranks.writes and not resume
    with claimed(folder) if begins else nullcontext():
        if begins:
            note_job(folder, os.environ, {"--init": None})
        elif ranks.writes:
            claim_folder(folder, resume)
        checkpoint = newest_together(folder, ranks) if resume else None
        if not ranks.writes:
            ranks.wait()
        corpus = corpus_of(folder / "data", cfg.data, checkpoint)
    if ranks.writes:
        ranks.wait()
    return corpus


def _describe(cfg: RunConfig, corpus: Corpus | ChatCorpus) -> str:
    """Two lines that describe the run."""
    from moestro.models.count import count

    parameters = count(cfg.model)
    moe = cfg.model.moe
    kind = f"{moe.num_experts} experts, {moe.top_k} per token" if moe else "dense"
    tokens = cfg.train.steps * cfg.train.batch_size * cfg.data.seq_len
    domains = ", ".join(f"{printable(name)} {n:,}" for name, n in corpus.domain_tokens.items())
    return (
        f"model: {kind}; {parameters.total:,} parameters, {parameters.active:,} active per token\n"
        f"text: {corpus.num_train_tokens:,} tokens ({domains}); training on {tokens:,}"
    )


def _say(text: str, speaks: bool) -> None:
    if speaks:
        typer.echo(text, err=True)


def print_outcome(folder: Path, cfg: RunConfig, result: Result, as_json: bool) -> None:
    """What a run reached, for a person or as one JSON object."""
    if not as_json:
        return _print_result(folder, cfg, result)
    signal_name = signal.Signals(result.stopped_by).name if result.stopped_by else None
    last = result.history[-1]._asdict() if result.history else None
    facts = {
        "run": str(folder), "checkpoint": str(result.checkpoint), "step": result.step,
        "stopped_by": signal_name, "evaluation": last,
    }  # fmt: skip
    typer.echo(json.dumps(facts))
    return None


def _print_result(folder: Path, cfg: RunConfig, result: Result) -> None:
    from moestro.data.domains import ALL
    from moestro.train.progress import duration

    typer.echo(f"trained {result.step} of {cfg.train.steps} steps")
    if result.history:
        last = result.history[-1]
        typer.echo(
            f"held-out bits per byte after step {last.step} ({last.tokens:,} tokens, "
            f"{duration(last.seconds)}, {last.train_flops:.3g} FLOPs): "
            f"{last.bits_per_byte[ALL]:.4f}"
        )
        for domain, value in last.bits_per_byte.items():
            if domain != ALL:
                typer.echo(f"  {printable(domain):<20} {value:.4f}")
    typer.echo(f"checkpoint: {result.checkpoint}")
    if not result.stopped_by:
        run = shlex.quote(str(folder))
        typer.echo(f'next:\n  moestro generate {run} "The "\n  moestro probe {run}')
