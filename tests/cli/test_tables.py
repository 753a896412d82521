"""Names that others gave, in tables and lines: as they are, and never steering a terminal."""

from io import StringIO

import pytest
from rich.console import Console

from moestro.cli.probe_tables import print_table
from moestro.cli.tables import cell, new_table, printable
from moestro.cli.train import print_outcome
from moestro.config import RunConfig
from moestro.probe.report.table import Table, View
from moestro.train.loop import Result
from moestro.train.metrics import Point
from moestro.train.progress import ProgressDisplay

NAME, SHOWN = "[/b]a\n\x1b[2J", "[/b]a\\n\\x1b[2J"


@pytest.fixture
def console() -> Console:
    return Console(file=StringIO(), width=200)


def test_printable_spells_control_characters_out():
    assert printable(NAME) == SHOWN
    assert printable("é\n\x1b", keep="\n") == "é\n\\x1b"


def test_headings_and_cells_are_no_markup(console):
    table = new_table("", NAME)
    table.add_row(cell(NAME), "1")
    console.print(table)
    assert console.file.getvalue().count(SHOWN) == 2


def test_a_probes_table_shows_names_as_they_are(console):
    rows = ({"domain": NAME, "value": 1.0},)
    view = View(f"on {NAME}", ": {domain} | value: {value:.1f}")
    print_table(console, Table("shares", rows, terminal=view))
    assert console.file.getvalue().count(SHOWN) == 2


def test_a_runs_result_shows_names_as_they_are(tmp_path, capsys):
    point = Point(step=1, tokens=1, seconds=1.0, train_flops=1.0, bits_per_byte={"all": 1, NAME: 2})
    print_outcome(tmp_path, RunConfig(), Result(1, tmp_path, [point]), as_json=False)
    assert f"\n  {SHOWN}" in capsys.readouterr().out


def test_the_title_of_a_live_display_is_no_markup():
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    with ProgressDisplay("runs/[/b]", console) as progress:
        progress.update({"step": 1, "loss": 1.0}, 2)
    assert "runs/[/b]" in screen.getvalue()
