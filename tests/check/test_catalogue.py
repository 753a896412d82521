"""Every seeded defect is found in every shape and the right part is named; clean layers pass."""

import pytest

from moestro.check import check

from .defects import CATALOGUE
from .plain_layer import SHAPES, factory

FORWARD = {"outputs", "weights", "choice"}
PLAIN = FORWARD | {"input-gradient", "router-gradient", "expert-gradients", "shared-gradients"}
# Checks that a defect of the plain run fails too: what it breaks is more than one way of running.
BOTH = {"adapter-outputs", "adapter-gradients", "determinism", "batch-split"}


def innocent(checks):
    """Checks that must not fail: they are of what the defect leaves alone."""
    if set(checks) & (FORWARD | BOTH):
        return set()
    return FORWARD if set(checks) & PLAIN else PLAIN


def test_the_catalogue_is_large_and_says_where_each_comes_from():
    assert len(CATALOGUE) >= 40
    assert len(SHAPES) >= 5
    assert all(row.source for row in CATALOGUE)
    assert len({row.change.__name__ for row in CATALOGUE}) == len(CATALOGUE)


@pytest.mark.parametrize("row", CATALOGUE, ids=lambda row: row.change.__name__)
def test_a_defect_is_named_in_every_shape_and_nothing_else_is(row):
    for name in row.shapes or SHAPES:
        report = check(factory(SHAPES[name], row.change), only={*row.checks, *PLAIN})
        assert set(report.wrong) & set(row.checks), f"{name}: {report.text()}"
        assert not set(report.wrong) & innocent(row.checks), f"{name}: {report.text()}"


def test_what_follows_of_a_defect_is_not_said_of_every_way_to_run():
    """A router cut off, or experts' gradients lost, is one finding, not one for each mode."""
    changes = {row.change.__name__: row.change for row in CATALOGUE}
    for name, follows in (("Detached", {"input-gradient"}), ("DownDetached", set())):
        report = check(factory(SHAPES["mixtral"], changes[name]))
        own = {"Detached": "router-gradient", "DownDetached": "expert-gradients"}[name]
        assert set(report.wrong) == {own} | follows, report.text()


# Every shape by seed 0, every seed by a shape of its own; the other pairs say little more.
PAIRS = [
    pytest.param(name, seed, marks=() if seed in (0, at) else pytest.mark.slow)
    for at, name in enumerate(SHAPES)
    for seed in range(5)
]


@pytest.mark.parametrize(("name", "seed"), PAIRS)
def test_a_clean_layer_is_not_accused(name, seed):
    report = check(factory(SHAPES[name], seed=seed), seed=seed)
    assert report.exit_code == 0, report.text()
