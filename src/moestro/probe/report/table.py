"""A table described once, and its forms: a CSV file, and cells of text for a page or a terminal.

The file holds every value of every row. A page or a terminal shows the cells of a view: templates
over a row's values, as in "{share:.1%}{~:.1%}", which is a share and its 95 % interval.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, product
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

import numpy as np

from moestro.errors import MoestroError
from moestro.files import write_whole
from moestro.probe.report.token_text import visible

Row = dict[str, Any]
"""Values by column; a name that begins with _ is for views alone and in no file."""

_FIELD = re.compile(r"(?:(?P<name>\w+)=)?(?P<field>(?P<stem>\w+?)(?:_(?P<axes>[A-Z]*2?))?)")


class View(NamedTuple):
    """What a page or a terminal shows of a table.

    Cells are "heading: template | heading: template"; `{x:.2f}` is a number, `{x_~:.2f}` its
    interval, `{x:*}` a star where x is true, `{x:name}` a name without invisible signs.
    """

    title: str
    cells: str
    by: str = ""  # rows of one value are one row; a heading with a template has a cell for each
    where: Callable[[Row], bool] = lambda _: True
    most: int | None = None  # rows shown


class Table(NamedTuple):
    """A table of findings."""

    name: str  # of its CSV file; tables of one name are parts of one file
    rows: Iterable[Row]  # to be read once
    page: View | None = None
    terminal: View | None = None
    is_file: bool = True  # whether there is a CSV file


class Style(Formatter):
    """How cells are written: what is unknown, an interval, and that there is none."""

    def __init__(self, unknown: str, interval: str, no_interval: str) -> None:
        """Take the texts."""
        self._unknown, self._interval, self._no_interval = unknown, interval, no_interval

    def get_value(self, key: Any, args: Any, row: Mapping[str, Any]) -> Any:
        """A row's value; of `x_~` both ends of the interval."""
        if key.endswith("~"):
            return row[f"{key[:-1]}low"], row[f"{key[:-1]}high"]
        return row[key]

    def format_field(self, value: Any, form: str) -> str:
        """A value as its form says."""
        if isinstance(value, tuple):
            if any(end != end for end in value):
                return self._no_interval
            return self._interval.format(*(f"{end:{form}}" for end in value))
        if form == "*":
            return "*" if value else " "
        if form == "name":
            return visible(value)
        return f"{value:{form}}" if value == value else self._unknown


PAGE = Style("?", " ({} to {})", " (no interval)")
TERMINAL = Style("–", " [{}, {}]", "")


class Grid(NamedTuple):
    """A view as text; its last `repeated` columns are one for each value of a column."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    repeated: int


def grid(rows: Iterable[Row], view: View, style: Style) -> Grid:
    """What a view shows of the rows."""
    shown = filter(view.where, rows)
    every = _groups(shown, view.by) if view.by else ([row] for row in shown)
    groups = list(islice(every, view.most))
    cells = [cell.split(": ", 1) for cell in view.cells.split(" | ")]

    def texts(group: list[Row], place: int) -> list[str]:
        return [
            style.vformat(cell[place], (), row)
            for cell in cells
            for row in (group if "{" in cell[0] else group[:1])
        ]

    headings = texts(groups[0], 0) if groups else [heading for heading, _ in cells]
    repeated = len(headings) - len(cells) + 1 if "{" in cells[-1][0] else 0
    return Grid(view.title, headings, [texts(group, 1) for group in groups], repeated)


def _groups(rows: Iterable[Row], column: str) -> Iterable[list[Row]]:
    """The rows with each value of a column, in order of their first."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[column], []).append(row)
    return groups.values()


def save_csv(tables: Iterable[Table], folder: Path) -> list[Path]:
    """Write the tables that have rows to the folder, and return the paths.

    Raises:
        MoestroError: a file cannot be written.
    """
    parts: dict[str, list[Iterable[Row]]] = {}
    for table in tables:
        if table.is_file:
            parts.setdefault(table.name, []).append(table.rows)
    paths = []
    for name, of_file in parts.items():
        text, path = _csv(chain.from_iterable(of_file)), folder / f"{name}.csv"
        if text:
            save_text(path, text, f"the table {path}")
            paths.append(path)
    return paths


def save_text(path: Path, text: str, what: str) -> None:
    """Write a file whole or not at all, in UTF-8; an error calls it `what`.

    Raises:
        MoestroError: it cannot be written.
    """
    try:
        write_whole(path, text)
    except OSError as error:
        reason = error.strerror or error
        raise MoestroError(f"cannot write {what}: {reason}; choose another place") from None


def _csv(rows: Iterable[Row]) -> str:
    """All rows under the names of the first; empty without any.

    A number that there is not stays empty. Text that a spreadsheet would take for a formula gets an
    apostrophe in front.
    """
    buffer, writer = io.StringIO(), None
    for row in rows:
        if writer is None:
            names = [name for name in row if not name.startswith("_")]
            writer = csv.DictWriter(buffer, names, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    """A value that means the same to every reader."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return f"{value:.6g}" if np.isfinite(value) else ""
    if isinstance(value, str):
        return "'" + value if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
    return "" if value is None else value


def rows(axes: Mapping[str, Sequence[Any]], **columns: Any) -> Iterator[Row]:
    """A row for every combination of the axes' labels; the columns' values broadcast over them."""
    shape = tuple(map(len, axes.values()))
    # One index of the first axis at a time: the lists of a large model's pairs would not fit.
    parts = [
        chain.from_iterable(part.ravel().tolist() for part in np.broadcast_to(values, shape))
        for values in columns.values()
    ]
    for labels, values in zip(product(*axes.values()), zip(*parts, strict=True), strict=True):
        yield dict(zip((*axes, *columns), (*labels, *values), strict=True))


def fields(axes: str, found: Any, names: str) -> Row:
    """Fields of the findings by the name of their column, to broadcast over the axes.

    Args:
        axes: letters of all axes.
        found: what holds the fields.
        names: of fields, whose columns have their names without the axes, or "column=field". An
            interval, as in "x_interval_L2", becomes x_low and x_high.
    """
    columns: Row = {}
    for match in map(_FIELD.fullmatch, names.split()):
        assert match is not None
        values = np.asarray(getattr(found, match["field"]))
        name, own = match["name"] or match["stem"], match["axes"] or ""
        at = tuple(slice(None) if letter in own else None for letter in axes)
        if own.endswith("2"):
            prefix = name.removesuffix("interval")
            columns |= {f"{prefix}low": values[..., 0][at], f"{prefix}high": values[..., 1][at]}
        else:
            columns[name] = values[at]
    return columns
