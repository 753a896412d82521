"""`moestro probe --compare`: two models, or traces, side by side on the same text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from moestro.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from moestro.cli.probe import Looked, Wanted
    from moestro.probe.measures.versus import Comparison, Quantity
    from moestro.text import Tokenizer

MEANING = {
    "imbalance": "largest / mean load",
    "variation": "spread of loads (CV)",
    "dead": "dead experts",
    "dropped": "dropped",
    "balance": "entropy, overall",
    "spread": "entropy, by token",
    "margin": "lead of last choice",
    "specialisation": "domains apart",
}


def run_compare(
    path: str | Path, other: str | Path, wanted: Wanted, out: Path | None, as_json: bool
) -> None:
    """Compare two models or traces; print the table, and write compare.json with --out.

    Raises:
        MoestroError: one cannot be read, or their text differs.
    """
    from moestro.cli.probe import make_folder, write
    from moestro.probe.measures.measure import to_json
    from moestro.probe.measures.versus import compare

    first, second = _both(path, other, wanted)
    found = compare(first.read, second.read, seed=wanted.seed)
    text = json.dumps({"paths": [str(path), str(other)], **to_json(found)}, indent=1)
    if out is not None:
        write(make_folder(out) / "compare.json", text + "\n")
    if as_json:
        typer.echo(text)
    else:
        _print(found, (str(path), str(other)), out)


def _both(path: str | Path, other: str | Path, wanted: Wanted) -> tuple[Looked, Looked]:
    """The traces of both: of documents of the same sources, or of the first one's passages."""
    from moestro.cli.probe import is_trace, look

    files = [is_trace(each) for each in (path, other)]
    read = wanted._replace(sources=(), generate=0)  # of a trace nothing is run
    first = look(path, read if files[0] else wanted)
    if wanted.sources or any(files):
        return first, look(other, read if files[1] else wanted)
    second = look(other, wanted, first.passages)
    assert first.probed is not None
    assert second.probed is not None
    if not _alike(first.probed.tokenizer, second.probed.tokenizer):
        raise ConfigError(
            f"{path} and {other} have different tokenizers, so the tokens that one held out mean "
            "nothing to the other; give text for both with --source"
        )
    return first, second


def _alike(here: Tokenizer, there: Tokenizer) -> bool:
    """Whether both give every id the same text."""
    size = here.vocab_size
    if size != there.vocab_size:
        return False
    return all(here.decode([token]) == there.decode([token]) for token in range(size))


def _print(found: Comparison, paths: tuple[str, str], out: Path | None) -> None:
    """The table, for a person."""
    from rich.console import Console

    console = Console(highlight=False)
    for letter, path in zip("AB", paths, strict=True):
        console.print(f"{letter}: {path}", markup=False, soft_wrap=True)
    print_comparison(console, found, f"the {found.documents} documents that both read", "A", "B")
    for name, left in zip(paths, found.left_out, strict=True):
        if left:
            console.print(f"{left} documents that only {name} has are left out.", markup=False)
    if out is not None:
        console.print(f"written to {out / 'compare.json'}", markup=False, soft_wrap=True)


def print_comparison(console: Console, found: Comparison, on: str, first: str, second: str) -> None:
    """One row for each measure.

    Args:
        console: where to.
        found: what was measured.
        on: the text that it is about.
        first: what to call the first trace.
        second: what to call the second.
    """
    from moestro.cli.probe_tables import print_table
    from moestro.probe.report.table import Table, View, fields

    rows = (
        {
            **fields("", each, "first second difference interval_2"),
            "name": MEANING[each.name],
            "beyond": _beyond(each),
        }
        for each in found.quantities
    )
    view = View(
        f"Mean over mixture layers, on {on}; in brackets the 95 % interval of the difference over "
        "documents",
        f": {{name}} | {first}: {{first:.3f}} | {second}: {{second:.3f}} | "
        f"{second} − {first}: {{difference:+.3f}}{{~:+.3f}} | beyond noise: {{beyond}}",
    )
    print_table(console, Table("comparison", rows, terminal=view))


def _beyond(quantity: Quantity) -> str:
    """Whether the difference is beyond noise; a dash where no noise is known to hold it against."""
    low, high = (float(end) for end in quantity.interval_2)
    return "–" if low != low or high != high else "yes" if quantity.supported else "no"
