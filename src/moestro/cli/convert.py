"""`moestro convert`: write a checkpoint in another layout, dtype or shard size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moestro.cli.opening import AcceptField, AdapterName, Dtype, ModelName, bar, open_shown
from moestro.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from moestro.checkpoints.opening import Opened

    Make = Callable[[str], Tensor] | None

Target = Annotated[
    Path, typer.Argument(metavar="TARGET", help="The new folder; with --to gguf the new file.")
]
Layout = Annotated[
    Literal["hf", "moestro", "gguf", "peft"],
    typer.Option(
        "--to",
        help="Layout: Hugging Face's, this project's own, or llama.cpp's; of a run of adapters "
        "PEFT's, else they are added to the weights.",
    ),
]
Family = Annotated[
    str | None,
    typer.Option(
        help="With --to hf or gguf: the model_type to write; default the one that the model came "
        "from, or the only one that fits. With --to peft: that of a base that names none."
    ),
]
Kind = Annotated[
    Literal["f32", "f16", "bf16", "q8_0", "q4_0"] | None,
    typer.Option("--kind", help="With --to gguf: how weights are stored; default bf16."),
]
ShardSize = Annotated[
    str | None,
    typer.Option(help="With --to hf: most bytes in a file, such as 500MB; default 5GB."),
]
Fused = Annotated[
    bool,
    typer.Option(
        "--fused-experts",
        help="With --to hf: all experts of a layer in one tensor, as transformers 5 has them in "
        "memory, and not as the family is published.",
    ),
]


PerExpert = Annotated[
    bool,
    typer.Option(
        "--per-expert", help="With --to peft: matrices for each expert, as other servers read them."
    ),
]


def convert(
    source: ModelName,
    target: Target,
    to: Layout,
    dtype: Dtype = None,
    family: Family = None,
    shard_size: ShardSize = None,
    fused_experts: Fused = False,
    kind: Kind = None,
    adapter: AdapterName = None,
    per_expert: PerExpert = False,
    accept_field: AcceptField = None,
) -> None:
    """Write a checkpoint in another layout, dtype or shard size.

    Tokenizer, chat template and generation settings are copied too. The target
    appears whole or not at all, and nothing is overwritten.
    """
    from moestro.checkpoints.gguf.header import SPLIT
    from moestro.checkpoints.hub import find_checkpoint
    from moestro.checkpoints.opening import in_blocks, pick_dtype
    from moestro.plan.sizes import parse_bytes

    pick_dtype(dtype)  # a wrong one is refused before anything is fetched or read
    shard_bytes = parse_bytes("5GB" if shard_size is None else shard_size)
    _check_layout(
        to, family=family, shard_size=shard_size, fused_experts=fused_experts, kind=kind,
        per_expert=per_expert,
    )  # fmt: skip
    if to == "peft" and (adapter or dtype or accept_field):
        raise ConfigError(
            "--to peft writes a run's adapters as they are; leave out --adapter, "
            "--dtype and --accept-field"
        )
    check_new(target)
    if to == "gguf" and SPLIT.fullmatch(target.name):
        raise ConfigError(
            f"{target.name} names one of several files, and one is written; rename it"
        )
    folder = find_checkpoint(source)
    if to == "peft":
        typer.echo(_write_peft(folder, target, family, per_expert))
        return
    if dtype is None and in_blocks(folder):
        dtype = "bf16"
    with _opened(folder, dtype, adapter, accept_field or ()) as (opened, made), writing(target):
        if to == "gguf":
            notes = _write_gguf(opened, made, target, family, kind or "bf16")
        elif to == "hf":
            notes = _write_hf(opened, made, target, family, shard_bytes, fused_experts)
        else:
            notes = _write_own(opened, made, target)
    for note in notes:
        typer.echo(f"moestro: {note}", err=True)
    typer.echo(_summary(opened, target, to))


def _check_layout(
    to: str, *, family: str | None, shard_size: str | None, fused_experts: bool,
    kind: str | None, per_expert: bool,
) -> None:  # fmt: skip
    """Refuse options that are about another layout than the one to write."""
    if family is not None and to == "moestro":
        raise ConfigError("--family is a name of Hugging Face's layout; add --to hf or --to gguf")
    for name, given in (
        ("--shard-size", shard_size is not None),
        ("--fused-experts", fused_experts),
    ):
        if given and to != "hf":
            raise ConfigError(f"{name} is about Hugging Face's layout; add --to hf")
    if kind is not None and to != "gguf":
        raise ConfigError(f"--kind {kind} is for --to gguf; leave it out")
    if per_expert and to != "peft":
        raise ConfigError("--per-expert is about PEFT's format; add --to peft")


@contextmanager
def _opened(
    folder: Path, dtype: str | None, adapter: str | None, accept_fields: Sequence[str]
) -> Iterator[tuple[Opened, Make]]:
    """A checkpoint, and what reads one of its tensors; None: adapters change all, in memory."""
    from moestro.checkpoints.adapters import own_settings
    from moestro.checkpoints.opening import open_streamed

    if adapter is not None or own_settings(folder) is not None:
        yield open_shown(folder, dtype=dtype, adapter=adapter, accept_fields=accept_fields), None
        return
    with bar(f"reading {folder.name}", in_bytes=True) as progress:
        yield open_streamed(folder, dtype=dtype, progress=progress, accept_fields=accept_fields)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Say what is wrong with a place that cannot be written.

    Raises:
        CheckpointError: it is full or forbidden.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target}: {error.strerror or error}; choose a place that can be "
            "written and has room"
        ) from None


def check_new(target: Path) -> None:
    """Refuse a target that is there, or that cannot be made."""
    if target == Path():
        raise ConfigError("the target needs a name; an empty one was given")
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists already; choose a new name, nothing is overwritten")
    above = next((path for path in target.absolute().parents if path.exists()), None)
    if above is None or not above.is_dir():
        raise ConfigError(f"cannot write to {target}: {above} is not a folder; choose another")


def _write_hf(
    opened: Opened, made: Make, target: Path, family: str | None, shard_bytes: int,
    fused_experts: bool,
) -> list[str]:  # fmt: skip
    """Write Hugging Face's layout; sentences on what a person should know about it."""
    from moestro.checkpoints.writing import write_pretrained
    from moestro.text import HF_FILE

    write_pretrained(
        opened.model,
        target,
        family=family,
        hf_config=opened.hf_config if family in (None, opened.family) else None,
        shard_bytes=shard_bytes,
        sidecar_files=opened.folder,
        fused_experts=fused_experts,
        tensors=made,
    )
    if (target / HF_FILE).is_file():
        return []
    return [
        f"{opened.folder} has no {HF_FILE}, so other programs find no tokenizer in the new folder"
    ]


def _write_peft(folder: Path, target: Path, family: str | None, per_expert: bool) -> str:
    """Write a run's adapters as PEFT does; what was written, in one sentence."""
    from moestro.checkpoints.adapters import load_own, own_settings
    from moestro.checkpoints.families import family_of
    from moestro.checkpoints.hub import find_checkpoint, given_name
    from moestro.checkpoints.peft import write_peft
    from moestro.checkpoints.reading import open_unread, read_settings
    from moestro.checkpoints.writing import only_family

    settings = own_settings(folder)
    if settings is None:
        raise ConfigError(f"{folder} holds a whole model; --to peft is for a run of adapters")
    base = find_checkpoint(settings.base)
    described = read_settings(base, settings.accept_fields)
    model = open_unread(base, accept_fields=settings.accept_fields).model
    load_own(model, settings, folder, base)
    given, own = given_name(base), described.fields.get("model_type")
    if family is not None and own not in (None, family):
        raise ConfigError(
            f"--family is {family}, but the adapters belong to {given}, a {own}, whose names PEFT "
            "looks for; leave --family out"
        )
    name = family or own or only_family(model.cfg)
    with writing(target):
        write_peft(model, family_of(name, "--family"), target, given, per_expert)
    return f"{target}: adapters of rank {settings.rank} in PEFT's format, of {given}"


def _write_gguf(
    opened: Opened, made: Make, target: Path, family: str | None, kind: str
) -> list[str]:
    """Write llama.cpp's format; sentences on what a person should know about it."""
    from moestro.checkpoints.gguf.sources import INSTALL
    from moestro.checkpoints.writing import only_family
    from moestro.text import HF_FILE

    try:
        from moestro.checkpoints.gguf.writing import write_gguf
    except ImportError:
        raise ConfigError(f"--to gguf needs the gguf package: {INSTALL}") from None
    name = family or opened.family or only_family(opened.model.cfg)
    write_gguf(opened.model, target, family=name, kind=kind, tokenizer=opened.folder, made=made)
    if (opened.folder / HF_FILE).is_file():
        return []
    return [f"{opened.folder} has no {HF_FILE}, so the new file has no tokenizer"]


def _write_own(opened: Opened, made: Make, target: Path) -> list[str]:
    """Write this project's layout; sentences on what a person should know about it."""
    from moestro.checkpoints.folders import atomic_folder
    from moestro.checkpoints.sidecar_files import TEMPLATES, keep_sidecar_files
    from moestro.checkpoints.writing import save_model
    from moestro.text import NOTE_FILE

    source = opened.folder
    with atomic_folder(target) as inner:
        save_model(opened.model, inner, made)
        keep_sidecar_files(source, inner)
    notes = []
    if not (target / NOTE_FILE).is_file():
        notes.append(f"{source} has no tokenizer, so `moestro generate` needs one put there")
    if (source / TEMPLATES).is_dir():
        notes.append(f"{source / TEMPLATES} stays behind: one chat template is kept, the default")
    return notes


def _summary(opened: Opened, target: Path, to: str) -> str:
    """What was written, in one sentence."""
    parameters = sum(parameter.numel() for parameter in opened.model.parameters())
    stored = f"in {str(next(opened.model.parameters()).dtype).removeprefix('torch.')}"
    if to == "gguf":
        from moestro.checkpoints.gguf.header import kinds_of

        stored = kinds_of(target)
    files = [target] if target.is_file() else [*target.rglob("*")]
    size = sum(path.stat().st_size for path in files if path.is_file())
    layout = {"hf": "Hugging Face's layout", "gguf": "GGUF"}.get(to, "this project's layout")
    return (
        f"{target}: {parameters:,} parameters {stored}, {size / 1e6:,.1f} MB, {layout}, "
        f"from {opened.folder}"
    )
