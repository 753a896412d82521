"""Run checks on a subject and collect what they find."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

from moestro.check.checks.check import Check
from moestro.check.checks.table import CHECKS, chosen
from moestro.check.report import Explained, Finding, Report, joined, skipped, wrong
from moestro.check.subject import Subject
from moestro.check.targets import of_anything
from moestro.check.trial import Trial
from moestro.errors import MoestroError

RUN = CHECKS["run"]


def check(
    target: Any,
    *,
    only: Collection[str] = (),
    skip: Collection[str] = (),
    seed: int = 0,
    slow: bool = False,
    title: str = "",
    implementation: str = "",
) -> Report:
    """Compare a mixture with its definition, in every way the table of checks lists.

    Args:
        target: (module, Description), a function that returns them or its name as
            "module:factory", a `moestro.MoE`; a model of transformers, its settings, the path of
            their config.json or the name of a model on the hub; or a `Subject`. The findings in
            a model's several kinds of blocks are one report.
        only: names of checks; empty: all but the slow ones.
        skip: names of checks to leave out.
        seed: of inputs.
        slow: the slow ones too (torch.compile).
        title: of the report.
        implementation: experts_implementation of a model of transformers; empty: its own.

    Raises:
        MoestroError: the target cannot be checked at all, or a name is unknown.
    """
    checks = chosen(only, skip, slow)
    return joined(all_found(of_anything(target, title, implementation), checks, seed))


def all_found(
    subjects: Collection[Subject], checks: Collection[Check], seed: int = 0
) -> list[Report]:
    """What these checks find in each; of several, one that cannot be checked does not end it.

    Raises:
        MoestroError: there is but one, and it cannot be checked.
    """
    reports = []
    for subject in subjects:
        try:
            reports.append(found(begun(subject, seed), checks))
        except MoestroError as error:
            if len(subjects) == 1:
                raise
            words = str(error).removeprefix(f"{subject.title}: ")
            row = Explained(RUN.name, Finding("unchecked", words), RUN.meaning, "")
            reports.append(Report(subject.title, (row,), seed))
    return reports


def begun(subject: Subject, seed: int = 0) -> Trial:
    """The subject beside its definition, which has run once.

    Raises:
        MoestroError: it cannot.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trial = Trial(subject, seed)
            _ = trial.exact
        except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
            first = str(error).strip().split("\n")[0]
            raise MoestroError(
                f"{subject.title}: its definition cannot run ({first}); a layer takes "
                "[B, S, D], and its float64 copy computes in float64"
            ) from error
    if not trial.x.shape[1]:
        raise MoestroError(f"{subject.title}: no token has a clear choice of experts")
    return trial


def found(trial: Trial, checks: Collection[Check]) -> Report:
    """What these checks find in one subject; that it raises, where it does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        failed = _failure(lambda: trial.ran)
        if failed is not None:
            words = f"{failed.words}; no other check was done"
            findings = [Explained(RUN.name, failed._replace(words=words), RUN.meaning, "")]
        else:
            findings = [Explained(c.name, _done(c, trial), c.meaning, c.looks_like) for c in checks]
    return Report(trial.subject.title, tuple(findings), trial.seed)


def _done(check: Check, trial: Trial) -> Finding:
    """What a check finds; a layer that raises where it should compute is wrong."""
    if trial.subject.unreached:
        return Finding("unchecked", trial.subject.unreached)
    if trial.subject.only and check.name not in trial.subject.only:
        return skipped("packed weights have no state dict, dtype, size or gradient of their own")
    found: list[Finding] = []
    failed = _failure(lambda: found.append(check.function(trial)))
    return failed or found[0]


def _failure(function: Callable[[], Any]) -> Finding | None:
    """What a function's exception says; None: it raised none."""
    try:
        function()
    except MoestroError as error:
        return Finding("unchecked", str(error))
    except Exception as error:
        first = str(error).strip().split("\n")[0][:200]
        return wrong(f"it raised {type(error).__name__}: {first}")
    return None
