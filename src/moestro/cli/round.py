"""`moestro round`: a checkpoint that int4 packs exactly, rounded so that a text loses least."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from moestro.cli.calibrating import (
    CALIBRATION,
    TOKENS,
    Calibration,
    Family,
    Source,
    Target,
    Text,
    read_texts,
)
from moestro.cli.convert import check_new, writing
from moestro.cli.opening import AcceptField, ModelName, bar
from moestro.cli.options import AsJson, HeldOutTokens

Kind = Annotated[Literal["int4", "int4-64"], typer.Option("--weights", help="Whose grid.")]
Clip = Annotated[
    bool, typer.Option("--clip/--no-clip", help="Let scales clip the largest weight of a group.")
]
Importance = Annotated[
    bool,
    typer.Option(
        "--importance/--no-importance", help="Choose scales by what the text's inputs weigh."
    ),
]
Feedback = Annotated[
    bool,
    typer.Option(
        "--feedback/--no-feedback", help="Make up for an error by the inputs that are to come."
    ),
]
Head = Annotated[
    bool,
    typer.Option(
        "--head/--no-head",
        help="Round the head too; one that is tied to the embedding becomes a matrix of its own.",
    ),
]


@contextmanager
def _layers_of(target: Path) -> Iterator[Path]:
    """A folder for rounded layers near the target, as large as it; gone after the block.

    What a kill left of one is removed first.
    """
    from moestro.checkpoints.folders import unfinished

    near = next(each for each in target.absolute().parents if each.is_dir())
    folder = unfinished(near / f"{target.name}-layers")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def round(
    path: ModelName,
    target: Target,
    text: Text = None,
    weights: Kind = "int4",
    clip: Clip = True,
    importance: Importance = True,
    feedback: Feedback = True,
    head: Head = True,
    source: Source = None,
    calibration: Calibration = CALIBRATION,
    tokens: HeldOutTokens = TOKENS,
    family: Family = None,
    as_json: AsJson = False,
    accept_field: AcceptField = None,
) -> None:
    """Round weights to int4's grid so that a text's outputs change least, and say what it costs.

    Writes a plain checkpoint in Hugging Face's layout. `--weights int4` packs it exactly, as fast
    and as small as any; other programs read it as it is.
    """
    from moestro.checkpoints.hub import find_checkpoint
    from moestro.checkpoints.quantize import format_of
    from moestro.cli.eval import Score, facts_of, measure, show
    from moestro.surgery.layers import Layers
    from moestro.surgery.rounding import Care, rounded, settings

    check_new(target)
    layers = Layers(find_checkpoint(path), accept_field or ())
    care = Care(clip, importance, feedback, head)
    layers.fields(settings(layers.cfg, care), family)
    texts, format = read_texts(layers, text, source, calibration, tokens), format_of(weights)
    assert format is not None
    with writing(target), _layers_of(target) as folder:
        with bar("rounding, blocks") as progress:
            made = rounded(layers, texts.tokens_NS, format.group, folder, progress, care)
        layers.write(made.change, target, family)
    if made.alone:
        typer.echo(
            f"moestro: {made.alone} of {made.matrices} matrices saw too few of the tokens, so "
            f"their weights were rounded each for itself; for better ones, {texts.more}",
            err=True,
        )
    kinds = (("bf16", layers.folder), (weights, layers.folder), (weights, target))
    bits = [
        measure(where, kind, texts.held_out, accept_fields=accept_field) for kind, where in kinds
    ]
    names = ("bf16", weights, f"{weights}, rounded")
    rows = [Score(name, each) for name, each in zip(names, bits, strict=True)]
    read = sum(domain.tokens_NS[:, 1:].numel() for domain in texts.held_out.values())
    if as_json:
        alone = {"alone": made.alone, "matrices": made.matrices, **care._asdict()}
        told = {"measured_on": texts.measured or None, **alone}
        typer.echo(json.dumps({**facts_of(target, read, rows), **told}))
    else:
        show(target, read, rows, texts.what)
