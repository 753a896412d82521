"""`moestro tune`: fine-tune a checkpoint on conversations, all of it or by adapters."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import moestro
from moestro.cli.opening import AcceptField
from moestro.cli.train import (
    AsJson,
    Assignments,
    ConfigPath,
    OutPath,
    exit_if_stopped,
    prepare_options,
    print_outcome,
    run_shown,
)
from moestro.errors import ConfigError

if TYPE_CHECKING:
    from moestro.config import RunConfig
    from moestro.models.build import Model
    from moestro.text import Tokenizer
    from moestro.train.distributed import Ranks

SETTINGS = Path(moestro.__file__).with_name("tune.toml")

Base = Annotated[
    str,
    typer.Argument(
        metavar="[PATH]",
        help="The checkpoint to tune: a run, a folder in Hugging Face's layout, a GGUF file or "
        "org/model; not with --resume.",
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data", metavar="FILE",
        help=".jsonl of conversations: messages (with tools), prompt and completion, ShareGPT's "
        "conversations, or text; repeat.",
    ),
]  # fmt: skip
Epochs = Annotated[
    float | None,
    typer.Option(help="Passes over the conversations; default 1, where train.steps is not given."),
]
Steps = Annotated[int | None, typer.Option(help="Steps, instead of --epochs.")]
Lora = Annotated[
    int | None,
    typer.Option(
        metavar="RANK", help="Train adapters of this rank, and leave the weights as they are."
    ),
]
Qlora = Annotated[
    str | None, typer.Option(metavar="int8|int4", help="With --lora: the weights packed.")
]
Freeze = Annotated[str | None, typer.Option(metavar="router", help="What is not trained: router.")]
Show = Annotated[
    int | None,
    typer.Option(
        min=1, help="Print so many conversations, what is learned marked, and do nothing else."
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]


def tune(
    path: Base = "",
    data: Data = None,
    out: OutPath = None,
    config: ConfigPath = None,
    assignments: Assignments = None,
    epochs: Epochs = None,
    steps: Steps = None,
    lora: Lora = None,
    qlora: Qlora = None,
    freeze: Freeze = None,
    show: Show = None,
    resume: Resume = False,
    as_json: AsJson = False,
    accept_field: AcceptField = None,
) -> None:
    """Fine-tune a checkpoint on conversations; only what the assistant says is learned.

    All weights, or adapters with --lora. Progress goes to stderr, the result to stdout. Ctrl-C
    finishes the step and saves; --resume continues from there.
    """
    from moestro.checkpoints.folders import newest_checkpoint
    from moestro.settings import read_values
    from moestro.train.distributed import joined, pick_device, ranks_from
    from moestro.train.memory import keep_freed_memory
    from moestro.train.restarts import goes_on, meeting_settings, settings_again
    from moestro.train.state import claim_folder, dotted, read_run_settings
    from moestro.train.tuning import without_frozen

    keep_freed_memory()
    begins = {
        "PATH": path, "--data": data, "--config": config, "--epochs": epochs, "--show": show,
        "--accept-field": accept_field,
    }  # fmt: skip
    _check_options(begins, out, resume, as_json)
    folder, stated = prepare_options(out, assignments, data)
    stated += _assignments(steps, lora, qlora, freeze, config, stated)
    own_steps = "train.steps" in dotted(read_values(config, stated))
    _check_epochs(epochs, "train.steps" in dotted(read_values(None, stated)))
    if show is not None:
        return _show(path, folder, config, stated, show, accept_field or ())
    if resume:
        claim_folder(folder, resume)
    passes = None if own_steps and epochs is None else epochs or 1.0
    begun = {"PATH": path, "--epochs": passes}
    device, timeout_s = meeting_settings(folder, SETTINGS, config, stated)
    with joined(pick_device(device, ranks_from(os.environ)), timeout_s=timeout_s) as ranks:
        if resume or goes_on(folder, ranks, os.environ, begun):
            found = () if resume or passes is None else ("train.steps",)
            cfg = without_frozen(settings_again(folder, config, stated, found))
        else:
            if ranks.writes:
                _begin(folder, config, stated, begun, accept_field or (), ranks)
            ranks.wait()
            cfg = read_run_settings(newest_checkpoint(folder))
        cfg, result = run_shown(cfg, folder, True, ranks)
    if ranks.writes:
        print_outcome(folder, cfg, result, as_json)
    exit_if_stopped(result, f"tune --resume --out {shlex.quote(str(folder))}", ranks.writes)


def _check_options(
    begins: Mapping[str, Any], out: Path | None, resume: bool, as_json: bool
) -> None:
    """Refuse options that do not go together; `begins` are those of a run that is to begin."""
    given = [name for name, value in begins.items() if value not in (None, "", [])]
    if resume and out is None:
        raise ConfigError("--resume needs --out FOLDER, the folder of the run to go on with")
    if resume and given:
        raise ConfigError(
            f"--resume goes on with the run in --out, as it was begun; leave {', '.join(given)} out"
        )
    if not resume and not {"PATH", "--data"} <= set(given):
        raise ConfigError("give the checkpoint to tune and --data FILE, its conversations")
    if as_json and "--show" in given:
        raise ConfigError(
            "--show prints conversations, which have no --json; leave one of them out"
        )


def _check_epochs(epochs: float | None, steps: bool) -> None:
    """Refuse passes that are none, or that come with a number of steps."""
    if epochs is not None and (steps or not 0 < epochs < 1e6):
        raise ConfigError("give --epochs, more than 0, or --steps (train.steps)")


def _assignments(
    steps: int | None, lora: int | None, qlora: str | None, freeze: str | None,
    config: Path | None, assignments: list[str],
) -> list[str]:  # fmt: skip
    """What the options say as settings; refused if they do not fit those that are given."""
    from moestro.settings import read_values
    from moestro.train.state import dotted

    adapted = lora is not None or read_values(config, assignments).get("lora") is not None
    if qlora is not None and not (adapted and qlora in ("int8", "int4")):
        raise ConfigError("--qlora is int8 or int4, and needs --lora RANK (lora.rank)")
    stated = dotted(read_values(None, assignments))
    given = {
        "train.steps": steps, "lora.rank": lora, "lora.weights": qlora,
        "optim.freeze": None if freeze is None else [freeze],
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name in stated and stated[name] != value:
            raise ConfigError(
                f"--set {name}={stated[name]} and an option that makes it {value}; give one of them"
            )
    return [f"{name}={json.dumps(value)}" for name, value in given.items()]


def _settings(
    base: Path, folder: Path, config: Path | None, stated: list[str], accepted: Sequence[str]
) -> RunConfig:
    from moestro.checkpoints.fingerprints import digest
    from moestro.checkpoints.gguf.folder import given_path
    from moestro.settings import read_values
    from moestro.train.tuning import tuning_settings

    if read_values(config, stated).get("lora") is not None:
        given = given_path(base).absolute()  # what is beside a GGUF file is made of it
        stated = [
            *stated, f"lora.base={json.dumps(str(given))}",
            f"lora.base_digest={json.dumps(digest(base))}",
            f"lora.accept_fields={json.dumps(list(accepted))}",
        ]  # fmt: skip
    return tuning_settings(base, folder, SETTINGS, config, stated, accepted)


def _begin(
    folder: Path,
    config: Path | None,
    stated: list[str],
    begun: Mapping[str, Any],
    accepted: Sequence[str],
    ranks: Ranks,
) -> None:
    """Save step 0 of the run; one process does."""
    from moestro.checkpoints.hub import find_checkpoint
    from moestro.cli.opening import open_shown
    from moestro.train.preflight import check_run
    from moestro.train.restarts import note_job
    from moestro.train.tuning import begin, new_adapters

    base = find_checkpoint(begun["PATH"])
    cfg = _settings(base, folder, config, stated, accepted)
    check_run(cfg, ranks)

    def opened() -> Model:
        note_job(folder, os.environ, begun)
        if cfg.lora is None:
            return open_shown(base, dtype="fp32", accept_fields=accepted).model
        return new_adapters(base, cfg)

    begin(cfg, base, folder, opened, begun["--epochs"])


def _show(
    path: str,
    folder: Path,
    config: Path | None,
    stated: list[str],
    number: int,
    accepted: Sequence[str],
) -> None:
    """Print the first conversations: what is learned in colour, or between « and » without."""
    from itertools import islice

    from rich.console import Console

    from moestro.chat import load_chat
    from moestro.checkpoints.hub import find_checkpoint
    from moestro.data.chats import read_chats
    from moestro.data.masks import label
    from moestro.errors import DataError
    from moestro.text import load_tokenizer

    base = find_checkpoint(path)
    cfg = _settings(base, folder, config, stated, accepted).data
    assert cfg.chat is not None
    tokenizer = load_tokenizer(base)
    try:
        template = load_chat(base)
    except DataError:
        template = None
    console = Console(highlight=False, soft_wrap=True)
    coloured = console.color_system is not None and not console.no_color
    for chat in islice(read_chats(cfg), number):
        for document in label(chat, tokenizer, template, cfg.chat):
            console.rule(
                f"{chat.where}: {len(document.tokens)} tokens, {sum(document.labels)} labels"
            )
            for text, learned in _passages(tokenizer, document.tokens, document.labels):
                marked = text if coloured or not learned else f"«{text}»"
                style = "black on green" if learned and coloured else ""
                console.print(marked, style=style, end="", markup=False, emoji=False)
            console.print()
            if len(document.tokens) > cfg.seq_len:
                console.print(f"only its first {cfg.seq_len} tokens are kept (data.seq_len)")


def _passages(
    tokenizer: Tokenizer, tokens: Sequence[int], labels: Sequence[bool]
) -> list[tuple[str, bool]]:
    """The text of neighbours that are labels or not, special tokens spelled out."""
    from itertools import groupby

    found = []
    for learned, pairs in groupby(zip(tokens, labels, strict=True), key=lambda pair: pair[1]):
        ids, text = [token for token, _ in pairs], ""
        for special, run in groupby(ids, key=tokenizer.specials.get):
            part = list(run)
            text += special * len(part) if special is not None else tokenizer.decode(part)
        found.append((text, learned))
    return found
