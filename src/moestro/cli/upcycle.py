"""`moestro upcycle`: a mixture from a dense model, computing what it did."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from moestro.cli.calibrating import Family, Seed, Target
from moestro.cli.convert import check_new, writing
from moestro.cli.opening import AcceptField, ModelName
from moestro.cli.options import AsJson
from moestro.errors import ConfigError

Experts = Annotated[int, typer.Option(min=2, help="Experts in each layer, slices counted.")]
TopK = Annotated[int, typer.Option(min=1, help="Experts that each token goes to.")]
Granularity = Annotated[
    int, typer.Option(min=1, help="Slices of the network, each an expert of its own.")
]
Method = Annotated[
    Literal["copy", "noise", "drop"],
    typer.Option(
        help="Exact copies, copies with noise, or with a share of their hidden units drawn again."
    ),
]
Share = Annotated[
    float | None,
    typer.Option(help="Of the weights or units that noise and drop change; default 0.5."),
]
Shared = Annotated[bool, typer.Option("--shared", help="Add a shared expert, a copy too.")]


def upcycle(
    path: ModelName,
    target: Target,
    experts: Experts = 8,
    top_k: TopK = 2,
    granularity: Granularity = 1,
    method: Method = "copy",
    share: Share = None,
    shared: Shared = False,
    family: Family = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    accept_field: AcceptField = None,
) -> None:
    """Make a dense model a mixture, for training to go on from.

    Copies compute what the dense model did: exactly, unless weights of 16 bits are multiplied by a
    number of slices that is no power of two. Writes Hugging Face's layout; `moestro train
    --init OUT` goes on from there.
    """
    from moestro.checkpoints.hub import find_checkpoint
    from moestro.models.count import count
    from moestro.surgery.layers import Layers
    from moestro.surgery.upcycle import Recipe, rounds_to, upcycled

    if method == "copy" and share is not None:
        raise ConfigError(
            "--share is what --method noise and drop change, and copies are exact; leave it out, "
            "or choose one of the two"
        )
    changed = 0.5 if share is None else share
    check_new(target)
    layers = Layers(find_checkpoint(path), accept_field or ())
    recipe = Recipe(experts, top_k, granularity, method, changed, shared, seed)
    change, name = upcycled(layers, recipe, family)
    with writing(target):
        layers.write(change, target, name)
    rounded = rounds_to(layers, recipe)
    before, after = count(layers.cfg), count(change.cfg)
    facts = {
        "checkpoint": str(layers.folder), "written": str(target), "model_type": name,
        **recipe._asdict(), "exact": method == "copy" and rounded is None,
        "parameters": after.total, "active": after.active, "dense": before.total,
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(facts))
        return
    same = "the dense model's outputs" if method == "copy" else f"{method} on {100 * changed:.3g}%"
    if method == "copy" and rounded is not None:
        same += f" up to rounding to {str(rounded).removeprefix('torch.')}"
    typer.echo(
        f"{target}: {name}, {experts} experts, {top_k} per token, {same}; {after.total:,} "
        f"parameters, {after.active:,} active, from {before.total:,} dense"
    )
