"""Tables of a probe on a terminal, as wide as it is."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from moestro.cli.tables import cell, new_table, printable

if TYPE_CHECKING:
    from rich.console import Console

    from moestro.probe.ablation.effects import Ablations
    from moestro.probe.measures.measure import Findings
    from moestro.probe.measures.saturation import Saturation
    from moestro.probe.measures.versus import Comparison, Quantity
    from moestro.probe.report.table import Grid, Table
    from moestro.probe.study import Answers, Study

ORDER = ("layers", "specialisation", "experts_by_domain", "repetition", "ablation", "saturation")
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


def print_study(study: Study, answers: Answers, layer: int | None, files: list[str]) -> None:
    """The tables and the summary of a study, and where its files are."""
    from rich.console import Console

    console, findings = Console(highlight=False), answers.findings
    domains = len(findings.domains)
    console.print(
        f"{findings.model}: {findings.tokens_M.sum():,} tokens of {domains} "
        f"{'domain' if domains == 1 else 'domains'}",
        markup=False,
        soft_wrap=True,
    )
    print_findings(console, findings, layer, answers.ablations, answers.saturation)
    if answers.written is not None:
        generated = study.trace.generated_T.sum()
        on = f"what the model read and the {generated:,} tokens that it wrote"
        print_comparison(console, answers.written, on, "read", "written")
    for sentence in answers.summary:
        console.print(f"• {printable(sentence)}", markup=False)
    for note in findings.notes:
        console.print(f"note: {printable(note)}", markup=False)
    for line in files:
        console.print(line, markup=False, soft_wrap=True)


def print_findings(
    console: Console,
    findings: Findings,
    layer: int | None = None,
    ablations: Ablations | None = None,
    saturation: Saturation | None = None,
) -> None:
    """All tables for a terminal.

    Args:
        console: where to.
        findings: what was measured.
        layer: layer number whose experts are shown by domain; None: the last mixture's.
        ablations: what changing single experts did.
        saturation: how early in training the routing was settled.
    """
    from moestro.probe.report.tables import tables

    found = [each for each in tables(findings, ablations, saturation, layer=layer) if each.terminal]
    for table in sorted(found, key=lambda table: ORDER.index(table.name)):
        print_table(console, table)


def print_table(console: Console, table: Table) -> None:
    """A table under its title, which may be wider than the columns."""
    from moestro.probe.report.table import TERMINAL, grid

    assert table.terminal is not None
    content = grid(table.rows, table.terminal, TERMINAL)
    left = _left_out(content, console.width)
    shown = len(content.headings) - left
    more = f"; {left} more are in the files" if left else ""
    console.print(f"\n{printable(content.title)}{more}", style="bold", markup=False)
    rows = new_table(*content.headings[:shown])
    for cells in content.rows:
        rows.add_row(*map(cell, cells[:shown]))
    console.print(rows)


def _left_out(content: Grid, width: int) -> int:
    """How many of the repeated columns are too many for the width; one stays at least."""
    columns = zip(content.headings, *content.rows, strict=True)
    ends = list(accumulate(max(map(len, column)) + 3 for column in columns))  # space between them
    return min(sum(end > width for end in ends), max(0, content.repeated - 1))


def print_comparison(console: Console, found: Comparison, on: str, first: str, second: str) -> None:
    """One row for each measure.

    Args:
        console: where to.
        found: what was measured.
        on: the text that it is about.
        first: what to call the first trace.
        second: what to call the second.
    """
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
