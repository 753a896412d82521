"""Findings of a probe as tables on a terminal, each number beside its noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moestro.probe.ablation.effects import Ablations
    from moestro.probe.measures.measure import Findings
    from moestro.probe.measures.repeat import Repetition
    from moestro.probe.measures.saturation import Saturation
    from moestro.probe.measures.specialise import Specialisation
    from moestro.probe.recording.traces import Floats

SURE = "* beyond chance, all that is looked at considered"


def print_findings(console: Console, findings: Findings, layer: int | None) -> None:
    """All tables of the findings.

    Args:
        console: where to.
        findings: what was measured.
        layer: layer number whose experts are shown by domain; None: the last mixture's.
    """
    print_table(console, _load_table(findings))
    for found in findings.specialisation:
        print_table(console, _specialisation_table(findings, found, console.width))
    print_table(console, _expert_table(findings, layer, console.width))
    if findings.repetition is not None:
        print_table(console, _repetition_table(findings, findings.repetition, console.width))


def print_table(console: Console, table: Table) -> None:
    """A table under its title, which may be wider than the columns."""
    title, table.title = table.title, None
    console.print(f"\n{title}", style="bold", markup=False)
    console.print(table)


def fitting(names: Sequence[str], width: int, used: int, cell: int) -> int:
    """How many columns of these names fit beside what is used; one at least.

    Args:
        names: of all columns.
        width: of the terminal, in characters.
        used: by the columns before them.
        cell: the widest cell below the names.
    """
    count = 0
    for name in names:
        used += max(len(name), cell) + 3  # with the space between columns
        if used > width and count:
            break
        count += 1
    return count


def new_table(title: str, *columns: str) -> Table:
    """An empty table: the first column a name, the others numbers."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(escape(column), justify="right" if index else "left")
    return table


def number(value: float, form: str) -> str:
    """A number as `form` says; a dash where it is not known."""
    return f"{value:{form}}" if value == value else "–"


def interval(low_high: Floats, form: str = ".2f") -> str:
    """An interval in brackets; nothing where there is none."""
    low, high = (float(end) for end in low_high)
    return f" [{low:{form}}, {high:{form}}]" if low == low and high == high else ""


def print_ablations(console: Console, found: Ablations) -> None:
    """One row for each expert that was changed."""
    table = new_table(
        f"Ablation ({found.mode}): rise of the held-out loss, {found.unit}, without one expert; "
        "in brackets the 95 % interval over documents",
        "layer", "expert", "thought to serve", "rise there", "rise elsewhere", "verdict",
    )  # fmt: skip
    for row in found.rows:
        table.add_row(
            str(row.layer),
            str(row.expert),
            escape(row.domain) + (" (control)" if row.control else ""),
            f"{row.own:+.4f}",
            f"{row.elsewhere:+.4f}",
            row.verdict,
        )
    print_table(console, table)


def _load_table(findings: Findings) -> Table:
    load, entropy = findings.load, findings.entropy
    table = new_table(
        "Load, and entropy of the router overall and by token (1 = spread over all experts); in "
        "brackets the 95 % interval over documents",
        "layer", "max / mean", "CV", "dead", "dropped", "overall", "by token",
    )  # fmt: skip
    for index, layer in enumerate(findings.moe_layers):
        row = [
            str(layer),
            f"{load.imbalance_L[index]:.2f}{interval(load.imbalance_interval_L2[index])}",
            f"{load.variation_L[index]:.2f}",
            str(len(load.dead_L[index])),
            f"{load.dropped_L[index]:.1%}",
        ]
        if entropy is not None:
            row += [f"{entropy.balance_L[index]:.3f}", f"{entropy.spread_L[index]:.3f}"]
        table.add_row(*row)
    return table


def _specialisation_table(findings: Findings, found: Specialisation, width: int) -> Table:
    columns = ("layer", "mean", "chance", "beyond tokens", "chance")
    shown = fitting(found.labels, width, 51, 6)
    table = new_table(
        f"Specialisation by {found.grouping}: distance from the average use of experts (0 to 1), "
        "where chance deals whole documents at random; beyond tokens: what token identity does not "
        f"tell ({SURE}){_more(found.labels, shown)}",
        *columns,
        *found.labels[:shown],
    )
    beyond = found.beyond
    for index, layer in enumerate(findings.moe_layers):
        table.add_row(
            str(layer),
            _marked(found.mean_L[index], found.supported_L[index]),
            number(found.mean_chance_L[index], ".3f"),
            _marked(beyond.mean_L[index], beyond.supported_L[index]),
            number(beyond.mean_chance_L[index], ".3f"),
            *(number(distance, ".3f") for distance in found.distance_LM[index, :shown]),
        )
    return table


def _expert_table(findings: Findings, layer: int | None, width: int) -> Table:
    from moestro.probe.report.figures import layer_index

    index = len(findings.moe_layers) - 1 if layer is None else layer_index(findings, layer)
    shown = fitting(findings.domains, width, 9, 6)
    table = new_table(
        f"Layer {findings.moe_layers[index]}: share of each domain's assignments by expert "
        f"(equal share {1 / findings.num_experts:.1%}; {SURE}){_more(findings.domains, shown)}",
        "expert",
        *findings.domains[:shown],
    )
    shares_EM = findings.table_LME[index].T
    marked_EM = findings.table_supported_LME[index].T
    for expert, (shares_M, marked_M) in enumerate(zip(shares_EM, marked_EM, strict=True)):
        cells = zip(shares_M[:shown], marked_M[:shown], strict=True)
        table.add_row(str(expert), *(f"{share:.1%}{'*' if sure else ' '}" for share, sure in cells))
    return table


def _repetition_table(findings: Findings, found: Repetition, width: int) -> Table:
    shown = fitting(findings.domains, width, 8, 13)
    table = new_table(
        "Repetition: the same first choice in neighbouring tokens (in brackets: the same tokens "
        f"shuffled; uniform routing: {found.first_uniform:.1%}){_more(findings.domains, shown)}",
        "layer",
        *findings.domains[:shown],
    )
    rows = zip(findings.moe_layers, found.first_LM, found.first_shuffled_LM, strict=True)
    for layer, rate_M, shuffled_M in rows:
        pairs = list(zip(rate_M, shuffled_M, strict=True))[:shown]
        table.add_row(str(layer), *(f"{rate:.1%} ({null:.1%})" for rate, null in pairs))
    return table


def _marked(value: float, sure: bool) -> str:
    return f"{number(value, '.3f')}{'*' if sure else ' '}"


def _more(names: Sequence[str], shown: int) -> str:
    return "" if shown == len(names) else f"; {len(names) - shown} more are in the files"


def print_saturation(console: Console, found: Saturation) -> None:
    """One row for each checkpoint."""
    names = [f"layer {layer}" for layer in found.moe_layers]
    shown = fitting(names, console.width, 32, 7)
    table = new_table(
        "Saturation: share of the last checkpoint's choices that an earlier one made already "
        f"(at random: {found.random:.1%}); in brackets the 95 % interval over documents"
        f"{_more(names, shown)}",
        "step",
        "all layers",
        *names[:shown],
    )
    for index, step in enumerate(found.steps_J):
        table.add_row(
            str(step),
            f"{found.mean_J[index]:.1%}{interval(found.mean_interval_J2[index], '.3f')}",
            *(f"{share:.1%}" for share in found.share_JL[index, :shown]),
        )
    print_table(console, table)
