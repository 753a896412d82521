"""Tables of a probe on a terminal, as wide as it is."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from moestro.cli.tables import new_table

if TYPE_CHECKING:
    from rich.console import Console

    from moestro.probe.ablation.effects import Ablations
    from moestro.probe.measures.measure import Findings
    from moestro.probe.measures.saturation import Saturation
    from moestro.probe.report.table import Grid, Table

ORDER = ("layers", "specialisation", "experts_by_domain", "repetition", "ablation", "saturation")


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
    from rich.markup import escape

    from moestro.probe.report.table import TERMINAL, grid

    assert table.terminal is not None
    content = grid(table.rows, table.terminal, TERMINAL)
    left = _left_out(content, console.width)
    shown = len(content.headings) - left
    more = f"; {left} more are in the files" if left else ""
    console.print(f"\n{content.title}{more}", style="bold", markup=False)
    rows = new_table(*content.headings[:shown])
    for cells in content.rows:
        rows.add_row(*map(escape, cells[:shown]))
    console.print(rows)


def _left_out(content: Grid, width: int) -> int:
    """How many of the repeated columns are too many for the width; one stays at least."""
    columns = zip(content.headings, *content.rows, strict=True)
    ends = list(accumulate(max(map(len, column)) + 3 for column in columns))  # space between them
    return min(sum(end > width for end in ends), max(0, content.repeated - 1))
