"""What `prune`, `merge` and `round` share: text to calibrate and measure on; table; new folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from moestro.cli.convert import writing
from moestro.cli.held_out import open_corpus
from moestro.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from moestro.data.windows import Corpus, HeldOut
    from moestro.surgery.calibration import LayerStatistics
    from moestro.surgery.cost import Cost
    from moestro.surgery.layers import Change, Layers

Target = Annotated[Path, typer.Argument(metavar="OUT", help="The new folder.")]
Text = Annotated[
    list[str] | None,
    typer.Option(
        help="Text to calibrate on: file, folder, glob or 'builtin'; may be repeated. Half of it "
        "is kept for measuring, so best is text that the model was not trained on. Domains are the "
        "sub-folders, or the files' names. Only a run can do without: what it trained on, measured "
        "on what it held out."
    ),
]
Source = Annotated[
    list[str] | None,
    typer.Option(help="Other text to measure on, as in `moestro eval`; may be repeated."),
]
Calibration = Annotated[
    int, typer.Option("--calibration", min=1, help="Tokens to calibrate on, at most.")
]
Family = Annotated[
    str | None,
    typer.Option(
        help="The model_type to write; default the one that the model came from, or the only one "
        "that fits."
    ),
]
Memory = Annotated[
    str,
    typer.Option(
        help="Most memory for hidden states, as in 4GB; beside it are a layer as it is and one "
        "that is changed, the embedding and the head."
    ),
]
# Small enough that upcycling, which draws each layer by a seed of its own, stays within 64 bits.
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of what is drawn at random.")]
CALIBRATION, TOKENS, MEMORY = 65_536, 65_536, "4GB"
DRAWS = 3
_WIDTH = 50  # of the report's table without domains


class Texts(NamedTuple):
    """Text to calibrate on, and other text to measure on.

    Attributes:
        tokens_NS: windows to calibrate on, int64 [N, S + 1].
        held_out: windows to measure on, by domain.
        measured: the sources of those; none: what the run held out.
        what: the same in words, for the report.
        more: what to do for more to calibrate on.
    """

    tokens_NS: Tensor
    held_out: dict[str, HeldOut]
    measured: tuple[str, ...]
    what: str
    more: str


def read_texts(
    layers: Layers,
    text: list[str] | None,
    source: list[str] | None,
    calibration: int,
    tokens: int,
    *,
    least: int = 0,
) -> Texts:
    """The text of the options.

    Args:
        layers: of the model.
        text: to calibrate on; half of it to measure on.
        source: other text to measure on.
        calibration: tokens to calibrate on, at most.
        tokens: tokens to measure on, at most.
        least: tokens to calibrate on that are needed.

    Raises:
        DataError: there is none, too little, or it is of another vocabulary.
    """
    from moestro.data.rows import ChatCorpus
    from moestro.infer.prompts import check_known

    checkpoint, cfg = layers.folder, layers.cfg
    if not text and not (checkpoint / "run.json").exists():
        raise DataError(
            f"{checkpoint} does not say what text it was trained on, so none is at hand that it "
            "was not; give text like what the model is for with --text: half of it calibrates, "
            "half measures"
        )
    home = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
    with ExitStack() as stack:

        def corpus_of(sources: list[str] | None, least: int) -> Corpus:
            context, given = cfg.attention.context, tuple(sources or ())
            found = open_corpus(checkpoint, home / "data", given, context, stack, least)
            if isinstance(found, ChatCorpus):
                raise DataError(
                    f"{checkpoint} learned conversations, and experts are judged on text; give "
                    "some with --text"
                )
            return found

        corpus = corpus_of(text, least)
        tokens_NS, more = _to_calibrate(corpus, calibration)
        measured = corpus_of(source, 0) if source else corpus
        held_out = measured.held_out(tokens)
        for read_NS in (tokens_NS, *(domain.tokens_NS for domain in held_out.values())):
            known = (cfg.vocab_size, corpus.tokenizer, "the text")
            check_known(read_NS.flatten().tolist(), *known)
    sources = tuple(source or text or ())
    what = f"tokens of {', '.join(sources)}" if sources else "tokens that the run held out"
    if sources and not source:
        what += ", held out from calibration"
    return Texts(tokens_NS, held_out, sources, what, more)


def _to_calibrate(corpus: Corpus, most: int) -> tuple[Tensor, str]:
    """Windows to calibrate on, of at most so many tokens, and what to do for more.

    Raises:
        DataError: not one window.
    """
    windows, there = most // corpus.seq_len, corpus.windows_per_epoch
    more = "give more text"
    if windows < there:
        more = f"raise --calibration; the text has {there * corpus.seq_len:,} to calibrate on"
    if min(windows, there) < 1:
        raise DataError(
            f"the tokens to calibrate on are less than one window of {corpus.seq_len:,}; {more}"
        )
    return corpus.batch(0, min(windows, there)), more


def statistics_of(
    layers: Layers, texts: Texts, memory_bytes: int, *, every: bool = False
) -> dict[int, LayerStatistics]:
    """What the experts do on the text; says how many of them saw little of it."""
    from moestro.cli.opening import bar
    from moestro.surgery.calibration import LEAST_TOKENS, collect

    with bar("calibrating, blocks") as progress:
        seen = collect(
            layers, texts.tokens_NS, every=every, more=texts.more, memory_bytes=memory_bytes,
            progress=progress,
        )  # fmt: skip
    few = sum(int((each.counts_E < LEAST_TOKENS).sum()) for each in seen.values())
    if few:
        number = sum(len(each.counts_E) for each in seen.values())
        typer.echo(
            f"moestro: {few} of {number} experts saw fewer than {LEAST_TOKENS} of the "
            f"{texts.tokens_NS[:, 1:].numel():,} tokens, so little is known of them; "
            f"to know more, {texts.more}",
            err=True,
        )
    return seen


def measure(
    layers: Layers,
    held_out: Mapping[str, HeldOut],
    changes: Mapping[str, Change],
    memory_bytes: int,
) -> dict[str, Cost]:
    """Held-out loss of the whole model and after each change, with a bar."""
    from moestro.cli.opening import bar
    from moestro.surgery.cost import costs

    with bar("measuring, blocks") as progress:
        return costs(layers, held_out, changes, memory_bytes, progress)


def conclude(
    layers: Layers,
    target: Path,
    family: str | None,
    method: str,
    changes: Mapping[str, Change],
    texts: Texts,
    facts: dict[str, Any],
    *,
    seed: int,
    memory_bytes: int,
    as_json: bool,
) -> None:
    """Measure the changes beside random ones, write the one of `method`, and report."""
    from moestro.surgery.prune import at_random, pruned

    before, after = layers.cfg.moe, changes[method].cfg.moe
    assert before is not None
    assert after is not None
    number = after.num_experts
    drawn = {
        f"random {draw + 1}": pruned(layers.cfg, at_random(layers.cfg, number, seed + draw))
        for draw in range(DRAWS)
    }
    rows = measure(layers, texts.held_out, {**changes, **drawn}, memory_bytes)
    with writing(target):
        layers.write(changes[method], target, family)
    read = sum(domain.tokens_NS[:, 1:].numel() for domain in texts.held_out.values())
    told = {
        "checkpoint": str(layers.folder), "written": str(target), "method": method,
        "experts": number, "of": before.num_experts, "held_out_tokens": read,
        "measured_on": texts.measured or None,
    }  # fmt: skip
    heading = (
        f"{target}: {number} of {before.num_experts} experts in each mixture; bits per byte of "
        f"{read:,} {texts.what}"
    )
    _report({**told, **facts}, rows, as_json, heading)


def _report(facts: dict[str, Any], rows: Mapping[str, Cost], as_json: bool, heading: str) -> None:
    """The costs as a table for a person, or all facts as JSON."""
    if as_json:
        each = [
            {
                "model": name,
                "bits_per_byte": cost.bits,
                "change": cost.change,
                "standard_error": None if math.isnan(cost.error) else cost.error,
                "relative": cost.relative,
            }
            for name, cost in rows.items()
        ]
        typer.echo(json.dumps({**facts, "rows": each}))
        return
    from rich.console import Console

    from moestro.cli.tables import domain_columns, new_table
    from moestro.data.domains import ALL
    from moestro.surgery.cost import WHOLE

    console = Console(highlight=False)
    console.print(heading, markup=False, soft_wrap=True)
    domains = [name for name in rows[WHOLE].bits if name != ALL]
    shown, others = domain_columns(domains, console.width - _WIDTH)
    table = new_table("model", ALL, "change", "±", "relative", *shown)
    for name, cost in rows.items():
        error = "" if math.isnan(cost.error) else f"{cost.error:.4f}"  # of a single window
        change = [f"{cost.change:+.4f}", error, f"{cost.relative:+.2%}"]
        change = change if name != WHOLE else [""] * 3
        each_domain = [f"{cost.bits[domain]:.4f}" for domain in shown]
        table.add_row(name, f"{cost.bits[ALL]:.4f}", *change, *each_domain)
    console.print(table)
    if others:
        console.print(others)
