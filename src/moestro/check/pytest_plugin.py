"""For pytest: a mixture's checks as tests of another project, one test each, or a fixture.

    @pytest.mark.moestro(make_layer, skip=["float64"])
    def test_my_layer(moestro_finding):
        pass

`make_layer` is what `moestro.check.check` takes. Nothing but pytest is imported before a test asks.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from moestro.check.report import Finding, Report

FOUND: pytest.StashKey[Report] = pytest.StashKey()
OPTIONS = {"only": (), "skip": (), "seed": 0, "slow": False, "implementation": ""}
MARK = f"moestro(target, *, {', '.join(f'{name}={value!r}' for name, value in OPTIONS.items())})"


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known."""
    config.addinivalue_line("markers", f"{MARK}: every check of this mixture is a test of its own.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each check of what the mark names."""
    mark = metafunc.definition.get_closest_marker("moestro")
    if mark is None or "moestro_finding" not in metafunc.fixturenames:
        return
    chosen = import_module("moestro.check.checks.table").chosen
    options = _options(mark)
    checks = chosen(options["only"], options["skip"], options["slow"])
    metafunc.parametrize("moestro_finding", [each.name for each in checks], indirect=True)


def _options(mark: pytest.Mark) -> dict[str, Any]:
    """Those of a mark; the test fails where it gives others, or no target."""
    if len(mark.args) != 1:
        pytest.fail(
            "moestro_finding needs @pytest.mark.moestro(target), which takes one target; it was "
            f"given {len(mark.args)}",
            pytrace=False,
        )
    for name in mark.kwargs:
        if name not in OPTIONS:
            pytest.fail(
                f"@pytest.mark.moestro has no option {name!r}; it has {', '.join(OPTIONS)}",
                pytrace=False,
            )
    return {**OPTIONS, **mark.kwargs}


@pytest.fixture(scope="session")
def moestro_trials() -> dict[Any, Any]:
    """What was begun for each target of the session: the plain runs that all its checks share."""
    return {}


@pytest.fixture
def moestro_finding(
    request: pytest.FixtureRequest, moestro_trials: dict[Any, Any]
) -> list[Finding]:
    """What one check found in the mixture of the mark; the test fails where it is wrong.

    It is skipped where the check does not apply, or could not be done in one of its mixtures.
    """
    mark = request.node.get_closest_marker("moestro")
    if mark is None:
        pytest.fail("moestro_finding needs @pytest.mark.moestro(target)", pytrace=False)
    target, options = mark.args[0], _options(mark)
    key = id(target), options["seed"], options["implementation"]
    running = import_module("moestro.check.running")
    if key not in moestro_trials:  # the target is kept: its id is its own as long as it lives
        subjects = import_module("moestro.check.targets").of_anything(target, "", key[2])
        moestro_trials[key] = target, [running.begun(each, key[1]) for each in subjects]
    check = import_module("moestro.check.checks.table").CHECKS[request.param]
    reports = [running.found(trial, [check]) for trial in moestro_trials[key][1]]
    report: Report = import_module("moestro.check.report").joined(reports)
    request.node.stash[FOUND] = report
    findings = [each.finding for each in report.found]
    unchecked = [each for each in findings if each.outcome == "unchecked"]
    # A test that passed would say that the check had been done on every mixture.
    if not report.wrong and (unchecked or not any(each.outcome == "ok" for each in findings)):
        pytest.skip((unchecked or findings)[0].words)
    return findings


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Fail a test whose check found something; in its fixture it would be an error."""
    report = item.stash.get(FOUND, None)
    if report is not None and report.wrong:
        pytest.fail(report.text(), pytrace=False)


@pytest.fixture
def moestro_check() -> Callable[..., Report]:
    """`moestro.check.check`, and the test fails where something is wrong or unchecked."""

    def checked(target: Any, **options: Any) -> Report:
        report: Report = import_module("moestro.check.running").check(target, **options)
        if not report.ok:
            pytest.fail(report.text(), pytrace=False)
        return report

    return checked
