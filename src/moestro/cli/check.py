"""`moestro check`: anybody's mixture against a float64 definition; what is wrong, and where."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moestro.cli.options import AsJson

if TYPE_CHECKING:
    from rich.table import Table

    from moestro.check.report import Report
    from moestro.check.subject import Subject

HANGS_S = 20  # what a rank waits for another

Targets = Annotated[
    list[str] | None,
    typer.Argument(
        help="A folder of a model or run, a config.json, a GGUF file, org/model on the Hugging "
        "Face hub, or module:factory, a function that returns (module, Description)."
    ),
]
Only = Annotated[list[str] | None, typer.Option(help="A check to do, no other; may be repeated.")]
Skip = Annotated[list[str] | None, typer.Option(help="A check to leave out; may be repeated.")]
Implementation = Annotated[
    str,
    typer.Option(
        help="experts_implementation of models of transformers (default: eager); of "
        "module:NAME the module, which registers it, is imported first. Without a target, "
        "families with all layouts of experts are checked."
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of inputs and random weights.")]
Junit = Annotated[Path | None, typer.Option(help="Write JUnit XML to this file.")]


def check(
    targets: Targets = None,
    only: Only = None,
    skip: Skip = None,
    implementation: Implementation = "",
    seed: Seed = 0,
    slow: Annotated[bool, typer.Option("--slow", help="torch.compile too.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="Explain every check.")] = False,
    as_json: AsJson = False,
    junit: Junit = None,
) -> None:
    """Check mixtures against a float64 per-token definition, forward and backward.

    Each check says what should hold, how far off the layer is, where, and which published defects
    look like that. Models of transformers are built tiny, with random weights, from their
    settings. Under torchrun, data and sharded parallelism are compared with one process.

    Exit code: 0 all right, 1 something is wrong, 2 nothing could be made of the arguments,
    3 something could not be checked.
    """
    from moestro.check.checks.table import CHECKS, chosen
    from moestro.check.running import all_found
    from moestro.errors import ConfigError

    if listing:
        for each in CHECKS.values():
            typer.echo(f"{each.name}: {each.meaning} Broken by: {each.looks_like}.")
        return
    if not (targets or implementation):
        raise ConfigError("give what to check: a model, a config.json or module:factory")
    checks = chosen(only or (), skip or (), slow)
    if junit is not None:
        _check_place(junit)
    if "" not in sys.path:
        sys.path.insert(0, "")  # factories of the working directory, as `python -m` finds them
    with _ranks():
        subjects = [
            subject
            for target in targets or ()
            for subject in _subjects(target, implementation, seed)
        ] or _layouts(implementation, seed)
        reports = all_found(subjects, checks, seed)
    if int(os.environ.get("RANK", "0")) > 0:
        return  # the first reports for all; torchrun would end it if another failed before
    _show(reports, as_json, junit)
    raise typer.Exit(max((each.exit_code for each in reports), key=(0, 3, 1).index))


@contextmanager
def _ranks() -> Iterator[None]:
    """The process group of what torchrun started; a collective that hangs fails in time."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("gloo", timeout=timedelta(seconds=HANGS_S))
    try:
        yield
    finally:
        gc.collect()  # a wrapper that outlives the group has threads that end the process
        if dist.is_initialized():  # a check in which a rank was lost has ended it
            dist.destroy_process_group()


def _subjects(target: str, implementation: str, seed: int) -> list[Subject]:
    """What a name on the command line stands for; a model can have several kinds of mixtures."""
    import torch

    from moestro.check.targets import of_anything

    torch.manual_seed(seed)
    return of_anything(target, implementation=implementation)


def _layouts(implementation: str, seed: int) -> list[Subject]:
    import torch

    from moestro.check.foreign_settings import of_layouts

    torch.manual_seed(seed)
    return of_layouts(implementation)


def _check_place(file: Path) -> None:
    """Refuse a file that cannot be written, before any check is done."""
    from moestro.errors import ConfigError

    place = file if file.exists() else file.parent
    if file.is_dir() or not place.exists() or not os.access(place, os.W_OK):
        raise ConfigError(
            f"cannot write --junit {file}; name a file in a folder that is there and can be written"
        )


def _show(reports: list[Report], as_json: bool, file: Path | None) -> None:
    from moestro.check.report import junit

    if file is not None:
        file.write_text(junit(reports), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps([each.as_json() for each in reports], indent=2))
        return
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    for report in reports:
        console.print(_table(report))
        for reason, names in report.reasons().items():
            console.print(f"[dim]–[/]  {escape(', '.join(names))}: {escape(reason)}")
        console.print(f"{report.summary()}\n")


def _table(report: Report) -> Table:
    from rich.markup import escape
    from rich.table import Table

    marks = {"ok": "[green]✓[/]", "wrong": "[red]✗[/]", "unchecked": "[yellow]?[/]"}
    table = Table(title=escape(report.title), title_justify="left", box=None, pad_edge=False)
    for name in ("", "check", "difference", "what"):
        table.add_column(name)
    for each in report.found:
        finding = each.finding
        if finding.outcome == "skipped":
            continue  # said below the table, once for each reason
        words = each.sentence() if finding.outcome == "wrong" else finding.words
        off = "" if finding.difference is None else f"{finding.difference:.1e}"
        table.add_row(marks[finding.outcome], each.check, off, escape(words))
    return table
