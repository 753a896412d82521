"""`moestro prune`: the model with fewer experts, and what they were worth on held-out text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    Texts,
    conclude,
    measure,
    read_texts,
    statistics_of,
)
from moestro.cli.convert import check_new
from moestro.cli.opening import AcceptField, ModelName
from moestro.cli.options import AsJson, HeldOutTokens
from moestro.errors import ConfigError

if TYPE_CHECKING:
    from moestro.data.windows import HeldOut
    from moestro.surgery.calibration import LayerStatistics
    from moestro.surgery.layers import Change, Layers

Keep = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Share of the experts to keep, as 0.75.")
]
Number = Annotated[
    int | None, typer.Option("--experts", min=1, help="Experts to keep in each layer.")
]
Until = Annotated[
    str | None,
    typer.Option(
        metavar="LOSS",
        help="Remove as many as held-out loss allows, as '+1%': found on every second held-out "
        "window, reported on the others.",
    ),
]
Method = Annotated[
    Literal["reap", "frequency", "ean", "weighted"],
    typer.Option(help="What an expert is judged by; see docs/surgery.md."),
]


def prune(
    path: ModelName,
    target: Target,
    text: Text = None,
    keep: Keep = None,
    experts: Number = None,
    until: Until = None,
    method: Method = "reap",
    source: Source = None,
    calibration: Calibration = CALIBRATION,
    tokens: HeldOutTokens = TOKENS,
    family: Family = None,
    memory: Memory = MEMORY,
    seed: Seed = 0,
    as_json: AsJson = False,
    accept_field: AcceptField = None,
) -> None:
    """Remove the experts that a text needs least, and say what it costs.

    Writes Hugging Face's layout. Held-out loss is reported before and after, beside three models
    with as many experts removed at random.
    """
    from moestro.checkpoints.hub import find_checkpoint
    from moestro.plan.sizes import parse_bytes
    from moestro.surgery.calibration import tokens_needed
    from moestro.surgery.layers import Layers
    from moestro.surgery.prune import chosen, fewer, possible, pruned

    given = [one for one in (keep, experts, until) if one is not None]
    if len(given) != 1:
        raise ConfigError("give one of --keep, --experts and --until: how many experts remain")
    limit = None if until is None else _share(until)
    memory_bytes = parse_bytes(memory)
    check_new(target)
    layers = Layers(find_checkpoint(path), accept_field or ())
    numbers, moe = possible(layers.cfg), layers.cfg.moe
    assert moe is not None
    number = experts or round((keep or 0) * moe.num_experts)
    if limit is not None:
        number = numbers[0]
    layers.fields(fewer(layers.cfg, number), family)  # refused before anything is read
    texts = read_texts(layers, text, source, calibration, tokens, least=tokens_needed(moe))
    seen = statistics_of(layers, texts, memory_bytes)
    if limit is not None:
        number, held_out = _search(layers, seen, method, texts, limit, memory_bytes, numbers)
        texts = texts._replace(held_out=held_out)
    kept = chosen(layers.cfg, seen, method, number)
    facts: dict[str, Any] = {
        "kept": {layer: each.tolist() for layer, each in kept.items()},
        "calibration_tokens": texts.tokens_NS[:, 1:].numel(),
    }
    changes: dict[str, Change] = {method: pruned(layers.cfg, kept)}
    conclude(
        layers, target, family, method, changes, texts, facts,
        seed=seed, memory_bytes=memory_bytes, as_json=as_json,
    )  # fmt: skip


def _share(until: str) -> float:
    """A limit of the loss, as in +1%, as a share."""
    try:
        share = float(until.strip().removeprefix("+").removesuffix("%")) / 100
    except ValueError:
        share = 0.0
    if not (until.strip().endswith("%") and 0 < share < 10):
        raise ConfigError(f"--until is {until!r}; write it as '+1%', more than 0 and below 1000 %")
    return share


def _search(
    layers: Layers,
    seen: dict[int, LayerStatistics],
    method: str,
    texts: Texts,
    limit: float,
    memory_bytes: int,
    numbers: list[int],
) -> tuple[int, dict[str, HeldOut]]:
    """The fewest experts within a limit of the loss, and the windows that did not choose them.

    Raises:
        ConfigError: not one can go.
    """
    from moestro.surgery.cost import fewest
    from moestro.surgery.prune import chosen, pruned

    def half(first: int) -> dict[str, HeldOut]:
        return {
            name: domain._replace(tokens_NS=domain.tokens_NS[first::2])
            for name, domain in texts.held_out.items()
            if len(domain.tokens_NS) > 1
        }

    if not half(0):
        raise ConfigError(
            "--until needs two held-out windows of a domain; raise --tokens, or give more text"
        )

    def fits(number: int) -> bool:
        change = pruned(layers.cfg, chosen(layers.cfg, seen, method, number))
        return measure(layers, half(0), {method: change}, memory_bytes)[method].relative <= limit

    number = fewest(numbers, fits)
    if number is None:
        raise ConfigError(
            f"removing even the fewest experts, to {numbers[-1]} a layer, costs more than "
            f"{limit:.2%}; allow more, or keep the model as it is"
        )
    return number, half(1)
