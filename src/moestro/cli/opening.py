"""Options shared by verbs that open a checkpoint, and a progress bar while it is read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moestro.cli.budget import NONE, within

if TYPE_CHECKING:
    from moestro.checkpoints.opening import Opened
    from moestro.config import CacheKind
    from moestro.models.budget import Budget, Use

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="A run folder, one checkpoint in it, a folder in Hugging Face's layout, a GGUF file, "
        "or the name of a model on Hugging Face's hub as org/model.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Dtype of the weights: fp32, bf16 or fp16; default: the checkpoint's."),
]
Weights = Annotated[
    str,
    typer.Option(
        help="as-is (GGUF: packed so that its numbers are kept), or packed for the CPU kernels: "
        "fp32, bf16, int8 or int4 (groups of 32 inputs share a scale; int8-64 and int4-64: of 64)."
    ),
]
AdapterName = Annotated[
    str | None,
    typer.Option(
        "--adapter", metavar="PATH",
        help="A run of `moestro tune --lora`, or a folder of PEFT's: added to the weights, or "
        "beside packed ones.",
    ),
]  # fmt: skip
AcceptField = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="An unknown field of config.json that does not change what the model computes; "
        "may be repeated.",
    ),
]
CacheName = Annotated[
    Literal["as-is", "int8"],
    typer.Option(
        "--cache",
        help="How keys and values are kept: as-is, in the weights' dtype, or as int8, each head's "
        "with a scale: half of bf16's memory and of what long contexts read.",
    ),
]
PackedFile = Annotated[
    Path | None,
    typer.Option(
        "--packed",
        help="Where the packed form is saved for the next start; default: beside the checkpoint, "
        "or in ~/.cache/moestro where that is the hub's cache or cannot be written.",
    ),
]


def name_of(path: str, folder: Path) -> str:
    """What a model is called, which never says where it lies.

    Args:
        path: as it was given.
        folder: from `find_checkpoint`.
    """
    given = Path(path)
    if given.exists() or given.is_absolute():
        resolved = given.resolve()
        return resolved.stem if resolved.is_file() else resolved.name
    return path.strip("/") or folder.name


def open_shown(
    folder: Path,
    memory: str = NONE,
    use: Use | None = None,
    cache: CacheKind = "as-is",
    told: Callable[[Budget], object] | None = None,
    process: int | None = None,
    **options: Any,
) -> Opened:
    """Open a checkpoint with a bar on stderr.

    Args:
        folder: from `find_checkpoint`.
        memory: what --memory says.
        use: how the model will be used, for that.
        cache: what --cache says.
        told: called with what --memory gives.
        process: see `moestro.checkpoints.streamed.Within.process`.
        options: of `moestro.checkpoints.opening.open_checkpoint`.
    """
    from moestro.checkpoints.opening import open_checkpoint
    from moestro.models.blocks import cache_as
    from moestro.models.budget import Use

    options |= within(memory, folder, (use or Use())._replace(cache=cache), told, process)
    options["accept_fields"] = options.get("accept_fields") or ()
    with bar(f"reading {folder.name}", in_bytes=True) as progress:
        opened = open_checkpoint(folder, progress=progress, verified=True, **options)
    cache_as(opened.model, cache)
    if "within" in options and not options["within"].use.scored:
        options["within"].told.measure(opened.model)
    return opened


@contextmanager
def bar(what: str, *, in_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, if that is a terminal; yields what moves it: (done, in all)."""
    from rich import progress
    from rich.console import Console

    counts: tuple[progress.ProgressColumn, ...] = (progress.MofNCompleteColumn(),)
    if in_bytes:
        counts = (progress.DownloadColumn(), progress.TransferSpeedColumn())
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), *counts)
    console, shown = Console(stderr=True), sys.stderr.isatty()
    with progress.Progress(*columns, console=console, transient=True, disable=not shown) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
