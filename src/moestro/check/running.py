"""Run checks on a subject and collect what they find."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

from moestro.check.checks.check import Check
from moestro.check.checks.table import chosen
from moestro.check.report import Explained, Finding, Report
from moestro.check.subject import of_anything
from moestro.check.trial import Trial
from moestro.errors import MoestroError


def check(
    target: Any,
    *,
    only: Collection[str] = (),
    skip: Collection[str] = (),
    seed: int = 0,
    slow: bool = False,
    title: str = "",
) -> Report:
    """Compare a mixture with its definition, in every way the table of checks lists.

    Args:
        target: (module, Description), a function that returns them or its name as
            "module:factory", a `moestro.MoE`, or a `Subject`.
        only: names of checks; empty: all but the slow ones.
        skip: names of checks to leave out.
        seed: of inputs.
        slow: the slow ones too (torch.compile).
        title: of the report.

    Raises:
        MoestroError: the target cannot be checked at all, or a name is unknown.
    """
    checks = chosen(only, skip, slow)
    subject = of_anything(target, title)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trial = Trial(subject, seed)
            _ = trial.exact
        except (RuntimeError, TypeError, AttributeError) as error:
            first = str(error).strip().split("\n")[0]
            raise MoestroError(
                f"{subject.title}: its definition cannot run ({first}); a layer takes "
                "[B, S, D], and its float64 copy computes in float64"
            ) from error
        if not trial.x.shape[1]:
            raise MoestroError(f"{subject.title}: no token has a clear choice of experts")
        failed = _failure(lambda: trial.ran)
        found = [
            Explained(
                c.name, _done(c, trial) if failed is None else failed, c.meaning, c.looks_like
            )
            for c in checks[: None if failed is None else 1]
        ]
    return Report(subject.title, tuple(found), seed)


def _done(check: Check, trial: Trial) -> Finding:
    """What a check finds; a layer that raises where it should compute is wrong."""
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
        return Finding("wrong", f"it raised {type(error).__name__}: {first}", float("inf"))
    return None
