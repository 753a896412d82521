"""`moestro eval`: bits per byte of held-out text, for each weight format of one model."""

from __future__ import annotations

import gc
import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from moestro.cli.budget import NONE, Memory
from moestro.cli.held_out import open_corpus
from moestro.cli.opening import AcceptField, ModelName, open_shown
from moestro.cli.options import AsJson, HeldOutSource, HeldOutTokens
from moestro.errors import ConfigError

if TYPE_CHECKING:
    from moestro.checkpoints.families.table import Config
    from moestro.data.windows import HeldOut

Kinds = Annotated[
    list[str] | None,
    typer.Option(
        "--weights",
        help="as-is, fp32, bf16, int8, int8-64, int4 or int4-64; may be repeated; default bf16, "
        "int8 and int4. Others are compared with the first.",
    ),
]
DEFAULT = ("bf16", "int8", "int4")
BATCH = 8


class Score(NamedTuple):
    """Bits per byte by domain, `all` first."""

    weights: str
    bits: dict[str, float]


def eval(
    path: ModelName,
    source: HeldOutSource = None,
    weights: Kinds = None,
    tokens: HeldOutTokens = 65_536,
    as_json: AsJson = False,
    memory: Memory = NONE,
    accept_field: AcceptField = None,
) -> None:
    """Measure a model's bits per byte of held-out text.

    Once for each weight format, of the same model on the same text: the quality cost of packing.
    The text is what the run held out, or other text with --source.
    """
    from moestro.checkpoints.hub import find_checkpoint
    from moestro.checkpoints.quantize import format_of
    from moestro.checkpoints.reading import read_settings
    from moestro.models.budget import Use

    kinds = list(dict.fromkeys(weights or DEFAULT))
    for kind in kinds:
        format_of(kind)
    checkpoint = find_checkpoint(path)
    with ExitStack() as stack:
        cfg = read_settings(checkpoint, accept_field or ()).cfg
        held_out, seq_len = _text(checkpoint, cfg, tuple(source or ()), tokens, stack)
    read = sum(each.tokens_NS.shape[0] * seq_len for each in held_out.values())
    use = Use(seq_len, texts=0, tokens=BATCH * seq_len, scored=True)
    options = {"memory": memory, "use": use, "accept_fields": accept_field}
    rows = [Score(kind, measure(checkpoint, kind, held_out, **options)) for kind in kinds]
    if as_json:
        typer.echo(json.dumps(facts_of(checkpoint, read, rows)))
    else:
        show(checkpoint, read, rows)


def _text(
    checkpoint: Path, cfg: Config, sources: tuple[str, ...], tokens: int, stack: ExitStack
) -> tuple[dict[str, HeldOut], int]:
    """Held-out windows by domain, and their length."""
    from moestro.infer.prompts import check_known

    if cfg.has_encoder:
        raise ConfigError(f"{checkpoint} is an encoder-decoder; eval reads decoders only")
    home = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
    corpus = open_corpus(checkpoint, home / "data", sources, cfg.attention.context, stack)
    held_out = corpus.held_out(tokens)
    for domain, (tokens_NS, _) in held_out.items():
        what = f"the text of {domain}"
        check_known(tokens_NS.flatten().tolist(), cfg.vocab_size, corpus.tokenizer, what)
    return held_out, corpus.seq_len


def measure(
    checkpoint: Path, kind: str, held_out: dict[str, HeldOut], **options: Any
) -> dict[str, float]:
    """Bits per byte in one weight format; the model is gone afterwards."""
    from moestro.train.evaluate import evaluate

    model = open_shown(checkpoint, weights=kind, keep=False, **options).model
    bits = evaluate(model, held_out, BATCH)
    del model
    gc.collect()
    return bits


def _over(row: Score, first: Score) -> float:
    """Relative increase in bits over the first format."""
    from moestro.train.evaluate import ALL

    return row.bits[ALL] / first.bits[ALL] - 1


def facts_of(checkpoint: Path, tokens: int, rows: list[Score]) -> dict[str, Any]:
    """The scores as JSON has them."""
    return {
        "checkpoint": str(checkpoint),
        "tokens": tokens,
        "rows": [
            {"weights": row.weights, "bits_per_byte": row.bits, "over_first": _over(row, rows[0])}
            for row in rows
        ],
    }


def show(checkpoint: Path, tokens: int, rows: list[Score]) -> None:
    """The table, for a person."""
    from rich.console import Console

    from moestro.cli.tables import new_table
    from moestro.train.evaluate import ALL

    console = Console(highlight=False)
    console.print(
        f"{checkpoint}: bits per byte of {tokens:,} held-out tokens", markup=False, soft_wrap=True
    )
    domains = [name for name in rows[0].bits if name != ALL]
    if len(domains) == 1:
        domains = []
    table = new_table("weights", ALL, "change", *domains)
    for row in rows:
        each = [f"{row.bits[name]:.4f}" for name in domains]
        change = "" if row is rows[0] else f"{_over(row, rows[0]):+.2%}"
        table.add_row(row.weights, f"{row.bits[ALL]:.4f}", change, *each)
    console.print(table)
