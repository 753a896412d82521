"""Opening a checkpoint for a verb: which device, which number type, and a bar while it is read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moestro.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from moestro.models.pretrained import Pretrained

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="A run folder, one checkpoint in it, a folder in Hugging Face's layout, or the name "
        "of a model on its hub as org/model.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Number type of the weights: fp32, bf16 or fp16; default as they are."),
]

DTYPES = {
    "fp32": "float32", "float32": "float32",
    "bf16": "bfloat16", "bfloat16": "bfloat16",
    "fp16": "float16", "float16": "float16",
}  # fmt: skip


def pick_dtype(name: str | None) -> torch.dtype | None:
    """The number type that --dtype names.

    Raises:
        ConfigError: none has this name.
    """
    import torch

    if name is None:
        return None
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name} is no number type here; choose fp32, bf16 or fp16")
    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype


def pick_device(name: str) -> str:
    """The device that --device names, tried out.

    Raises:
        ConfigError: it cannot be used here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        usable = torch.zeros(1, device=name).item() == 0
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise ConfigError(
            f"--device {name} cannot be used here; choose auto, cpu, or cuda on a machine "
            "where `moestro doctor` shows a CUDA device"
        )
    return name


def open_shown(folder: Path, device: str = "cpu", dtype: str | None = None) -> Pretrained:
    """Read a checkpoint of either layout, with a bar on stderr where that is a terminal.

    Args:
        folder: The checkpoint's own, from `moestro.models.hub.find_checkpoint`.
        device: As `pick_device` gives it.
        dtype: As for `pick_dtype`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from moestro.models.pretrained import open_model

    kind = pick_dtype(dtype)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    shown = sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task(f"reading {folder.name}", total=None)
        return open_model(
            folder,
            device=device,
            dtype=kind,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
