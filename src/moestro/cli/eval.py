"""`moestro eval`: bits per byte of held-out text, for each weight format of one model."""

from __future__ import annotations

import gc
import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from moestro.cli.budget import NONE, Memory, amount_of
from moestro.cli.held_out import open_chats, open_corpus
from moestro.cli.opening import AcceptField, CacheName, ModelName, open_shown
from moestro.cli.options import AsJson, HeldOutSource, HeldOutTokens
from moestro.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moestro.checkpoints.families.table import Config
    from moestro.config import CacheKind
    from moestro.data.rows import ChatCorpus
    from moestro.data.windows import Corpus, HeldOut
    from moestro.models.budget import Use
    from moestro.train.task import Task

Chats = Annotated[
    list[str] | None,
    typer.Option(
        help="Other conversations than the run's, .jsonl as for `moestro tune`; half of them are "
        "read, and only what the assistant says is predicted; may be repeated."
    ),
]
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
_WIDTH = 34  # of the table without domains


class Score(NamedTuple):
    """Bits per byte by domain, `all` first."""

    weights: str
    bits: dict[str, float]


def eval(
    path: ModelName,
    source: HeldOutSource = None,
    chats: Chats = None,
    weights: Kinds = None,
    cache: CacheName = "as-is",
    tokens: HeldOutTokens = 65_536,
    as_json: AsJson = False,
    memory: Memory = NONE,
    accept_field: AcceptField = None,
) -> None:
    """Measure a model's bits per byte of held-out text.

    Once for each weight format, of the same model on the same text: the quality cost of packing.
    The text is what the run held out, or other text with --source; of a run of `moestro tune`, what
    the assistant says in the conversations that it held out, or in others with --chats. With
    --cache int8 each format has a second line, whose tokens look at keys and values as that cache
    keeps them.
    """
    from moestro.checkpoints.hub import find_checkpoint
    from moestro.checkpoints.quantize import format_of
    from moestro.checkpoints.reading import read_settings

    if source and chats:
        raise ConfigError("give --source, text, or --chats, conversations")
    kinds = list(dict.fromkeys(weights or DEFAULT))
    for kind in kinds:
        format_of(kind)
    checkpoint = find_checkpoint(path)
    with ExitStack() as stack:
        cfg = read_settings(checkpoint, accept_field or ()).cfg
        text = _text(checkpoint, cfg, source or (), chats or (), tokens, stack)
    held_out, seq_len, task = text
    read = sum(task.predicted(each.tokens_NS) for each in held_out.values())
    options: Any = {"memory": memory, "accept_fields": accept_field}
    pairs: list[tuple[str, CacheKind]] = [(kind, "as-is") for kind in kinds]
    if cache != "as-is":
        pairs = [pair for kind, own in pairs for pair in ((kind, own), (kind, cache))]
    options |= _checked(checkpoint, pairs, memory, _use(seq_len), accept_field or ())
    rows = [
        Score(_named(kind, own), measure(checkpoint, kind, held_out, task, own, **options))
        for kind, own in pairs
    ]
    if as_json:
        typer.echo(json.dumps(facts_of(checkpoint, read, rows)))
    else:
        show(checkpoint, read, rows)


def _text(
    checkpoint: Path,
    cfg: Config,
    sources: Sequence[str],
    chats: Sequence[str],
    tokens: int,
    stack: ExitStack,
) -> tuple[dict[str, HeldOut], int, Task]:
    """Held-out windows by domain, their length, and what is predicted of them."""
    from moestro.config import ModelConfig
    from moestro.data.rows import ChatCorpus
    from moestro.infer.prompts import check_known
    from moestro.train.task import task_of

    if not isinstance(cfg, ModelConfig):
        raise ConfigError(f"{checkpoint} is an encoder-decoder; eval reads decoders only")
    home = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
    corpus: Corpus | ChatCorpus
    if chats:
        corpus = open_chats(checkpoint, tuple(chats), cfg, stack)
    else:
        data, context = home / "data", cfg.attention.context
        corpus = open_corpus(checkpoint, data, tuple(sources), context, stack)
    conversations = isinstance(corpus, ChatCorpus)
    held_out = corpus.held_out(tokens)
    for domain, (tokens_NS, _) in held_out.items():
        read = tokens_NS[:, 0] if conversations else tokens_NS
        what = f"the text of {domain}"
        check_known(read.flatten().tolist(), cfg.vocab_size, corpus.tokenizer, what)
    return held_out, corpus.seq_len, task_of(cfg, corpus.tokenizer.end_of_text, conversations)


def _use(seq_len: int) -> Use:
    """What a batch takes: its logits, and a cache for each text."""
    from moestro.models.budget import Use

    return Use(seq_len, texts=BATCH, tokens=BATCH * seq_len, scored=True)


def _checked(
    checkpoint: Path,
    pairs: Sequence[tuple[str, CacheKind]],
    memory: str,
    use: Use,
    accept_fields: Sequence[str],
) -> dict[str, Any]:
    """What `measure` takes for a budget, which is refused if it is too small for one of the rows.

    What the first model leaves in the process serves the others, so it is counted once.
    """
    from moestro.checkpoints.opening import check_budgets
    from moestro.checkpoints.streamed import Within
    from moestro.machine import resident_bytes, return_freed

    amount = amount_of(memory)
    if amount is None:
        return {}
    return_freed()
    process = resident_bytes()
    ways = [(kind, Within(amount, use._replace(cache=own), None, process)) for kind, own in pairs]
    check_budgets(checkpoint, ways, accept_fields)
    return {"memory": f"{amount}B", "use": use, "process": process}


def _named(kind: str, cache: CacheKind) -> str:
    return kind if cache == "as-is" else f"{kind}, {cache} cache"


def measure(
    checkpoint: Path,
    kind: str,
    held_out: dict[str, HeldOut],
    task: Task | None = None,
    cache: CacheKind = "as-is",
    **options: Any,
) -> dict[str, float]:
    """Bits per byte in one weight format and kind of cache; the model is gone afterwards.

    Text is read as `moestro generate` reads it, natively where it can; packed conversations, and
    what the native step does not have, by the model's own forward.
    """
    from moestro.infer.native_decoder import AsDecoded, supports
    from moestro.models.decoder import Cached
    from moestro.train.evaluate import evaluate
    from moestro.train.task import NEXT_TOKEN

    options |= {"weights": kind, "cache": cache}
    model: Any = open_shown(checkpoint, keep=False, **options).model
    read, task = model, task or NEXT_TOKEN
    if task is NEXT_TOKEN and supports(model) is None:
        read = AsDecoded(model)
    elif cache != "as-is":
        read = Cached(model)
    bits = evaluate(read, held_out, BATCH, task=task)
    del model, read
    gc.collect()
    return bits


def _over(row: Score, first: Score) -> float:
    """Relative increase in bits over the first format."""
    from moestro.data.domains import ALL

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


def show(checkpoint: Path, tokens: int, rows: list[Score], what: str = "held-out tokens") -> None:
    """The table, for a person."""
    from rich.console import Console

    from moestro.cli.tables import domain_columns, new_table
    from moestro.data.domains import ALL

    console = Console(highlight=False)
    console.print(f"{checkpoint}: bits per byte of {tokens:,} {what}", markup=False, soft_wrap=True)
    domains = [name for name in rows[0].bits if name != ALL]
    shown, others = domain_columns(domains, console.width - _WIDTH)
    table = new_table("weights", ALL, "change", *shown)
    for row in rows:
        each = [f"{row.bits[name]:.4f}" for name in shown]
        change = "" if row is rows[0] else f"{_over(row, rows[0]):+.2%}"
        table.add_row(row.weights, f"{row.bits[ALL]:.4f}", change, *each)
    console.print(table)
    if others:
        console.print(others)
