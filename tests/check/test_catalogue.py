"""Every seeded defect is found and named; clean layers are not accused."""

import pytest

from moestro.check import check

from .defects import CATALOGUE
from .plain_layer import SHAPES, factory

# Each defect on one shape, in turn.
FEW = [(row, (row.shapes or tuple(SHAPES))[i % len(row.shapes or SHAPES)])
       for i, row in enumerate(CATALOGUE)]  # fmt: skip


def label(value):
    return value if isinstance(value, str) else value.change.__name__


def test_the_catalogue_is_large_and_says_where_each_comes_from():
    assert len(CATALOGUE) >= 40
    assert all(row.source for row in CATALOGUE)
    assert len({row.change.__name__ for row in CATALOGUE}) == len(CATALOGUE)


@pytest.mark.parametrize(("row", "name"), FEW, ids=label)
def test_a_defect_is_named(row, name):
    report = check(factory(SHAPES[name], row.change), only=row.checks)
    assert set(report.wrong) & set(row.checks), report.text()


@pytest.mark.parametrize("name", SHAPES)
def test_a_clean_layer_is_not_accused(name):
    report = check(factory(SHAPES[name]))
    assert report.exit_code == 0, report.text()
