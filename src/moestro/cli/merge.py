"""`moestro merge`: the model with alike experts merged, and what it costs on held-out text."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from moestro.cli.calibrating import (
    CALIBRATION,
    MEMORY,
    TOKENS,
    Calibration,
    Family,
    Memory,
    Seed,
    Source,
    Target,
    Text,
    conclude,
    read_texts,
    statistics_of,
)
from moestro.cli.convert import check_new
from moestro.cli.opening import AcceptField, ModelName
from moestro.cli.options import AsJson, HeldOutTokens

Number = Annotated[int, typer.Option("--groups", min=1, help="Experts to be left in each layer.")]
Method = Annotated[
    Literal["hc-smoe", "m-smoe"],
    typer.Option(help="What makes experts alike: their outputs, or the router's logits."),
]
Align = Annotated[
    bool, typer.Option("--align", help="Bring hidden units into one order before they are mixed.")
]


def merge(
    path: ModelName,
    target: Target,
    groups: Number,
    text: Text = None,
    method: Method = "hc-smoe",
    align: Align = False,
    source: Source = None,
    calibration: Calibration = CALIBRATION,
    tokens: HeldOutTokens = TOKENS,
    family: Family = None,
    memory: Memory = MEMORY,
    seed: Seed = 0,
    as_json: AsJson = False,
    accept_field: AcceptField = None,
) -> None:
    """Merge experts that are alike on a text, and say what it costs.

    Writes Hugging Face's layout. Held-out loss is reported before and after, beside models with as
    many experts left after removing some: by REAP, and at random.
    """
    from moestro.checkpoints.hub import find_checkpoint
    from moestro.plan.sizes import parse_bytes
    from moestro.surgery.calibration import tokens_needed
    from moestro.surgery.layers import Layers
    from moestro.surgery.merge import groups_of, merged
    from moestro.surgery.prune import chosen, fewer, pruned

    memory_bytes = parse_bytes(memory)
    check_new(target)
    layers = Layers(find_checkpoint(path), accept_field or ())
    layers.fields(fewer(layers.cfg, groups), family)  # refused before anything is read
    assert layers.cfg.moe is not None
    least = tokens_needed(layers.cfg.moe)
    texts = read_texts(layers, text, source, calibration, tokens, least=least)
    seen = statistics_of(layers, texts, memory_bytes, every=method == "hc-smoe")
    found = {layer: groups_of(layers.cfg, each, method, groups) for layer, each in seen.items()}
    changes = {
        method: merged(layers.cfg, found, seen, align),
        "reap": pruned(layers.cfg, chosen(layers.cfg, seen, "reap", groups)),
    }
    facts: dict[str, Any] = {
        "groups": found, "aligned": align, "calibration_tokens": texts.tokens_NS[:, 1:].numel(),
    }  # fmt: skip
    conclude(
        layers, target, family, method, changes, texts, facts,
        seed=seed, memory_bytes=memory_bytes, as_json=as_json,
    )  # fmt: skip
