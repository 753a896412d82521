"""Opening a checkpoint for a verb: which device, which number type, and a bar while it is read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moestro.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from moestro.checkpoints.pretrained import Pretrained
    from moestro.kernels.packing import Format
    from moestro.models.build import Model

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
Weights = Annotated[
    str,
    typer.Option(
        help="as-is, or packed for the CPU kernels: fp32, bf16, int8 or int4 (groups of 32 inputs "
        "share a scale; int8-64 and int4-64: of 64)."
    ),
]
AcceptField = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="A field of config.json that is not known here and changes nothing of what the model "
        "computes; may be repeated.",
    ),
]
PackedFile = Annotated[
    Path | None,
    typer.Option(
        "--packed",
        help="Where the packed form is kept for the next start; default: beside the checkpoint, "
        "or in ~/.cache/moestro where that is the hub's cache or cannot be written.",
    ),
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
        usable = torch.zeros(1, dtype=torch.float32, device=name).item() == 0
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise ConfigError(
            f"--device {name} cannot be used here; choose auto, cpu, or cuda on a machine "
            "where `moestro doctor` shows a CUDA device"
        )
    return name


def open_shown(
    folder: Path,
    device: str = "cpu",
    dtype: str | None = None,
    accept_fields: Collection[str] | None = None,
) -> Pretrained:
    """Read a checkpoint of either layout, with a bar on stderr where that is a terminal.

    Args:
        folder: The checkpoint's own, from `moestro.checkpoints.hub.find_checkpoint`.
        device: As `pick_device` gives it.
        dtype: As for `pick_dtype`.
        accept_fields: As --accept-field takes them.
    """
    from moestro.checkpoints.pretrained import open_model

    kind, accepted = pick_dtype(dtype), accept_fields or ()
    with _reading(folder.name) as progress:
        return open_model(
            folder, device=device, dtype=kind, progress=progress, accept_fields=accepted
        )


def find_weighted(name: str | Path, weights: str = "as-is", packed: Path | None = None) -> Path:
    """The checkpoint's folder that a name means, to be given to `open_weighted`.

    One whose packed form is kept is not read through: what is mapped was made from good files.

    Raises:
        CheckpointError: see `moestro.checkpoints.hub.find_checkpoint`.
        ConfigError: --weights has no such value.
    """
    from moestro.checkpoints import packed_files
    from moestro.checkpoints.hub import find_checkpoint
    from moestro.checkpoints.quantize import format_of

    format = format_of(weights)
    if format is None:
        return find_checkpoint(name)
    return find_checkpoint(
        name,
        lambda folder: packed_files.is_of(
            packed or packed_files.default_path(folder, format), folder
        ),
    )


def open_weighted(
    folder: Path,
    device: str = "auto",
    dtype: str | None = None,
    weights: str = "as-is",
    packed: Path | None = None,
    accept_fields: Collection[str] | None = None,
) -> Model:
    """Open a checkpoint for inference, its weights packed where that is asked for.

    A packed form that is kept from an earlier start is mapped; a new one is kept for the next.

    Args:
        folder: The checkpoint's own, from `find_weighted`.
        device: auto, cpu, cuda or cuda:N.
        dtype: As for `pick_dtype`.
        weights: As --weights takes it.
        packed: The file of the packed form; None: see `packed_files.default_path`.
        accept_fields: As --accept-field takes them.

    Raises:
        ConfigError: options do not go together.
        CheckpointError: the checkpoint or the kept packed form cannot be used; says why.
    """
    from moestro.checkpoints.quantize import format_of

    format = format_of(weights)
    if format is None:
        if packed is not None:
            raise ConfigError("--packed says where packed weights are kept; add --weights")
        return open_shown(folder, pick_device(device), dtype, accept_fields).model
    if dtype is not None:
        raise ConfigError(f"--weights {weights} and --dtype {dtype} both choose; leave one out")
    if device not in ("auto", "cpu"):
        raise ConfigError(f"packed weights compute on the CPU; leave out --device {device}")
    return _open_packed(folder, format, packed, accept_fields)


def _open_packed(
    folder: Path, format: Format, packed: Path | None, accept_fields: Collection[str] | None
) -> Model:
    """Map the packed form, or make it and keep it."""
    from moestro.checkpoints import packed_files
    from moestro.errors import CheckpointError

    path = packed or packed_files.default_path(folder, format)
    source = packed_files.fingerprint(folder)
    if path.exists():
        model = packed_files.load(path, source)
        if packed_files.stored_format(path) != format:
            raise CheckpointError(
                f"{path} holds other packed weights than {format.kind} in groups of "
                f"{format.group}; give another --packed, or remove the file"
            )
        return model
    model = read_packed_shown(folder, format, accept_fields)
    try:
        packed_files.save(model, path, format, source)
    except OSError as error:
        reason = error.strerror or error
        typer.echo(f"moestro: the packed form is not kept: {path}: {reason}", err=True)
    return model


def read_packed_shown(
    folder: Path, format: Format, accept_fields: Collection[str] | None = None
) -> Model:
    """Read a checkpoint straight into packed form, with a bar as `open_shown` has."""
    from moestro.checkpoints.quantize import read_packed

    with _reading(folder.name) as progress:
        return read_packed(folder, format, progress, accept_fields or ())


@contextmanager
def _reading(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, where that is a terminal; yields what moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    shown = sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task(f"reading {name}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
