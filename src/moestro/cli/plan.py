"""`moestro plan`: what a model costs, before loading anything; alone or compared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moestro.cli.opening import AcceptField, CacheName
from moestro.cli.options import AsJson
from moestro.cli.subjects import open_subjects

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from moestro.models.budget import Budget
    from moestro.models.count import Embeddings
    from moestro.plan.devices import Device
    from moestro.plan.fit import Fit
    from moestro.plan.report import Question, Report
    from moestro.plan.subject import PlannedModel


MOST = 10**9


Model = Annotated[
    str | None,
    typer.Argument(
        help="A preset, a model's folder, a config.json, a .toml of settings, or the name of a "
        "model on the Hugging Face hub as org/model."
    ),
]
Against = Annotated[
    list[str] | None, typer.Option(help="Another model, side by side; may be repeated.")
]
Context = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST,
        help="Tokens of a sequence; default 4096, or the model's context if shorter.",
    ),
]
Batch = Annotated[int, typer.Option(min=1, max=MOST, help="Sequences per batch, on each device.")]
Dtype = Annotated[
    Literal[
        "fp32",
        "bf16",
        "int8",
        "int8-64",
        "int4-experts",
        "int4",
        "int4-64",
        "uint4",
        "mxfp4",
        "iq4_nl",
        "nf4",
    ],
    typer.Option(help="Of the weights in use."),
]
Convention = Annotated[
    Literal["all", "no-input-embedding", "non-embedding"],
    typer.Option(help="Which embeddings count as parameters, total and active."),
]
Memory = Annotated[
    str | None,
    typer.Option(help="Report what fits into this memory, such as 24GiB; default: the device's."),
]
DeviceName = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Device to bound the speed on: h100, rtx4090, …, or 'this' machine, measured.",
    ),
]
Price = Annotated[
    float | None, typer.Option(help="Price of the device in $; gives the cost per million tokens.")
]
Ranks = Annotated[int, typer.Option(min=1, max=MOST, help="Devices that train together.")]
Parallel = Annotated[
    Literal["data", "fsdp", "expert"] | None,
    typer.Option(help="How they share the work; default data."),
]
Ep = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST,
        help="Ranks that the experts are split over; all else is sharded.",
    ),
]
Shard = Annotated[
    int | None,
    typer.Option(
        min=1, max=MOST, help="Ranks to shard over, as parallel.shard; default all."
    ),
]  # fmt: skip
FigurePath = Annotated[Path | None, typer.Option(help="Draw sizes and cost into a .png file.")]

CONVENTIONS: dict[str, Embeddings] = {
    "all": "all", "no-input-embedding": "output", "non-embedding": "none",
}  # fmt: skip


def plan(
    model: Model = None,
    against: Against = None,
    context: Context = None,
    batch: Batch = 1,
    dtype: Dtype = "bf16",
    cache: CacheName = "as-is",
    convention: Convention = "all",
    memory: Memory = None,
    device: DeviceName = None,
    price_per_hour: Price = None,
    ranks: Ranks = 1,
    parallel: Parallel = None,
    ep: Ep = None,
    shard: Shard = None,
    figure: FigurePath = None,
    as_json: AsJson = False,
    list_presets: Annotated[bool, typer.Option("--list", help="List the presets.")] = False,
    accept_field: AcceptField = None,
) -> None:
    """Compute what a model costs, before loading anything.

    Parameters, arithmetic, memory in use and in training, and on request what each rank holds and
    sends, an upper bound on speed, the price, and what fits. A mixture is compared with dense
    models of equal cost per token and of equal size. docs/planning.md has the formulas.
    """
    from moestro.config import ParallelConfig
    from moestro.errors import ConfigError
    from moestro.plan.report import Question, report
    from moestro.plan.report import as_json as to_json
    from moestro.plan.sizes import parse_bytes

    if list_presets:
        _list(as_json, alone=not (model or against or figure))
        return
    if model is None:
        raise ConfigError("name a model to plan for; `moestro plan --list` shows the presets")
    subjects = open_subjects([model, *(against or ())], accept_field or ())
    spreads = (ep or shard) is not None
    kind = "spread" if spreads else parallel or "data"
    _check(subjects, device, price_per_hour, ranks, parallel, spreads, ep or 1)
    question = Question(
        context=context, batch=batch, dtype=dtype, cache=cache, embeddings=CONVENTIONS[convention],
        memory_bytes=None if memory is None else parse_bytes(memory),
        device=None if device is None else _device(device),
        usd_per_hour=price_per_hour, ranks=ranks, parallel=kind,
        spread=ParallelConfig(expert=ep or 1, shard=shard or "auto"),
    )  # fmt: skip
    reports = [report(subject, question) for subject in subjects]
    if figure is not None:
        _draw(reports if against else [*reports, *reports[0].dense], figure)
    if as_json:
        typer.echo(json.dumps(to_json(question, reports)))
        return
    _print(reports, question)
    if figure is not None:
        typer.echo(f"written: {figure}")


def _check(
    subjects: list[PlannedModel],
    device: str | None,
    price_per_hour: float | None,
    ranks: int,
    parallel: str | None,
    spreads: bool,
    ep: int,
) -> None:
    """Refuse options that mean nothing without each other."""
    from moestro.errors import ConfigError

    if price_per_hour is not None and not 0 < price_per_hour < math.inf:
        raise ConfigError(f"--price-per-hour is {price_per_hour}; it must be more than 0")
    if price_per_hour is not None and device is None:
        raise ConfigError("--price-per-hour is the price of a device; name it with --device")
    if spreads and (ranks == 1 or parallel is not None):
        raise ConfigError(
            "--ep and --shard say how several ranks share the model; add --ranks N, and leave "
            "--parallel out"
        )
    if parallel is not None and ranks == 1:
        raise ConfigError(f"--parallel {parallel} needs several ranks; add --ranks N")
    if (parallel == "expert" or ep > 1) and not any(s.count.expert for s in subjects):
        instead = "choose --parallel fsdp" if ep == 1 else "leave --ep out"
        raise ConfigError(f"{subjects[0].name} has no experts to split; {instead}")


def _device(name: str) -> Device:
    """A device of the table, or this machine."""
    from moestro.plan.devices import THIS, device

    if name.lower() != THIS:
        return device(name)
    from moestro.plan.measured import measure

    typer.echo("measuring this machine …", err=True)
    return measure()


def _draw(reports: list[Report], path: Path) -> None:
    from moestro.errors import ConfigError
    from moestro.plan.figure import figure

    if path.suffix != ".png":
        raise ConfigError(f"--figure writes a .png file, not {path.name}")
    try:
        figure(reports, path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from None


def _list(as_json: bool, alone: bool) -> None:
    """All presets: what they count, what layout their weights have, and how they decode."""
    from rich.console import Console

    from moestro.checkpoints.families import FAMILIES
    from moestro.errors import ConfigError
    from moestro.models.passing import lacks
    from moestro.plan.presets import names, preset
    from moestro.plan.sizes import parameters_text

    if not alone:
        raise ConfigError(
            "--list lists the presets and plans for none; leave out MODEL, --against and "
            "--figure, or --list"
        )
    subjects = [preset(name) for name in names()]
    why = [None if s.cfg is None else lacks(s.cfg) for s in subjects]
    ways = [
        None if s.cfg is None else "native" if reason is None else "Python"
        for s, reason in zip(subjects, why, strict=True)
    ]
    loads = [s.family if s.family in FAMILIES else None for s in subjects]
    if as_json:
        facts = [
            {
                "name": s.name, "rumour": s.rumour, "total": s.count.total,
                "active": s.count.active, "source": s.source, "note": s.note,
                "loads_as": layout, "decodes": way, "why": reason, "trains": s.cfg is not None,
            }
            for s, layout, way, reason in zip(subjects, loads, ways, why, strict=True)
        ]  # fmt: skip
        typer.echo(json.dumps({"presets": facts}))
        return
    table = _table("preset", "in all", "active", "loads as", "decodes in")
    for s, layout, way in zip(subjects, loads, ways, strict=True):
        counts = map(parameters_text, (s.count.total, s.count.active))
        table.add_row(s.title, *counts, layout or "", way or "counted only")
    Console().print(table)


def _table(*columns: str) -> Table:
    """A table whose first column stays whole while long names of models break into lines."""
    from moestro.cli.tables import new_table

    table = new_table(*columns)
    table.columns[0].no_wrap = True
    for column in table.columns:
        column.vertical, column.overflow = "bottom", "fold"
    return table


def _print(reports: list[Report], question: Question) -> None:
    """What each model costs, the device, what fits, and the notes."""
    from rich.console import Console

    from moestro.plan.sizes import bytes_text, number_text

    console = Console()
    _print_costs([*reports, *reports[0].dense] if len(reports) == 1 else reports, question, console)
    if (device := question.device) is not None:
        console.print(
            f"{device.name}: {bytes_text(device.memory_bytes)}, "
            f"{number_text(device.bytes_per_s / 1e9)} GB/s, "
            f"{number_text(device.flops_per_s / 1e12)} TFLOP/s ({device.source})",
            highlight=False,
            markup=False,
        )
    # Beside others, and with a device's memory alone, the table's one line says enough.
    for answer in reports if len(reports) == 1 or question.memory_bytes else ():
        if answer.fit is not None:
            _print_fit(answer, answer.fit, question, console)
    for answer in reports:
        if answer.note:
            console.print(
                f"{answer.title}: {answer.note}", style="dim", highlight=False, markup=False
            )


def _print_costs(models: list[Report], question: Question, console: Console) -> None:
    """Tables of as many models as fit side by side."""
    from moestro.plan.rows import rows

    found = rows(models, question)
    label = max(len(row.label) + 2 * bool(row.cells) for row in found)
    cell = max(len(text) for row in found for text in row.cells)
    cell = max(cell, *(len(word) for model in models for word in model.title.split()))
    most = max(1, (console.width - label) // (cell + 2))
    for start in range(0, len(models), most):
        beside = models[start : start + most]
        table = _table("", *(model.title for model in beside))
        for row in rows(beside, question):
            name = f"  {row.label}" if row.cells else f"[bold]{row.label}[/bold]"
            table.add_row(name, *row.cells)
        console.print(table)


def _streamed(budget: Budget) -> str:
    """What --memory of the verbs that run a model would give."""
    from moestro.models.budget import hit_bounds

    low, high = hit_bounds(budget)
    most, least = (max(1.0, budget.read_bytes(hit) / 1e6) for hit in (low, high))
    experts = budget.needs.mixtures[0].experts
    return (
        f"Within it --memory keeps {min(budget.kept)} of {experts} experts of each mixture; "
        f"{low:.0%} to {high:.0%} of those wanted are there, and a token reads {least:,.0f} to "
        f"{most:,.0f} MB: from a disk of 1 GB/s at most {1e3 / most:,.1f} to {1e3 / least:,.1f} "
        "tokens/s."
    )


def _print_fit(answer: Report, fit: Fit, question: Question, console: Console) -> None:
    """What fits into the memory, and what would have to give."""
    from moestro.plan.sizes import bytes_text

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    space = bytes_text(fit.memory_bytes)
    say(f"{answer.title} in {space}:")
    table = _table("weights", "needed", "fits", "longest context", "most sequences")
    for row in fit.rows:
        limits = (row.longest_context, row.largest_batch)
        cells = ("–" if limit is None else f"{limit:,}" for limit in limits)
        name = row.dtype.replace("-", " ")
        table.add_row(name, bytes_text(row.need_bytes), "yes" if row.fits else "no", *cells)
    console.print(table)
    if fit.streamed is not None:
        say(_streamed(fit.streamed))
    elif fit.streamed_least is not None:
        least = fit.streamed_least >> 20
        say(f"With its experts in a file it runs from --memory {least}MiB on.")
    if fit.packing_least is not None and fit.packing_least > fit.memory_bytes:
        say(f"Writing the packed file first takes --memory {fit.packing_least >> 20}MiB.")
    if fit.changes:
        say(f"{question.dtype} does not fit; any one of these makes room:")
        for change in fit.changes:
            say(f"  {change.text}")
    if fit.training:
        say("A training step fits.")
    elif fit.training_checkpointed:
        say("A training step fits with checkpointed activations.")
    elif fit.fsdp_ranks is not None:
        say(
            f"A training step needs {fit.fsdp_ranks:,} such devices, fully sharded and with "
            "checkpointed activations."
        )
    elif fit.training is not None:
        say("A training step does not fit, whatever is sharded: its activations are too many.")
