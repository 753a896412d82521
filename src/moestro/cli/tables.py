"""The look of every table on a terminal, and of names that others gave."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table
    from rich.text import Text


# Between two columns, and the narrowest column of numbers.
_GAP, _NARROWEST = 2, 7


def domain_columns(names: Sequence[str], room: int) -> tuple[list[str], str]:
    """The domains whose columns fit into so many characters, and a word on those that do not.

    A single one is all of the text, and has no column.
    """
    if len(names) < 2:
        return [], ""
    shown = that_fit(names, room)
    hidden = len(names) - len(shown)
    return shown, f"{hidden} more domains with --json" if hidden else ""


def that_fit(names: Sequence[str], room: int) -> list[str]:
    """The first columns of these names that fit into so many characters."""
    shown: list[str] = []
    for name in names:
        room -= max(len(name), _NARROWEST) + _GAP
        if room < 0:
            break
        shown.append(name)
    return shown


def printable(text: str, keep: str = "") -> str:
    """Text with its control characters spelled out, but those to keep: names may hold any."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def cell(name: str) -> Text:
    """A name as it is: without rich's markup, which would read "[/b]" as an end tag."""
    from rich.text import Text

    return Text(printable(name))


def new_table(*headings: str) -> Table:
    """An empty table: names to the left in the first column, numbers to the right in the others."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(cell(heading), justify="right" if place else "left")
    return table
