"""docs/checking.md lists the checks there are."""

from pathlib import Path

from moestro.check.checks.table import CHECKS

PAGE = Path(__file__).parents[2] / "docs" / "checking.md"


def test_the_table_of_checks_is_what_list_prints():
    table = PAGE.read_text(encoding="utf-8").split("## Every check")[1]
    rows = [f"| {each.name} | {each.meaning} | {each.looks_like} |" for each in CHECKS.values()]
    assert [line for line in table.splitlines() if line.startswith("| ")][1:] == rows
