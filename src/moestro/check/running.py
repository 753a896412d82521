"""Run checks on a subject and collect what they find."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

from moestro.check.checks.check import Check
from moestro.check.checks.table import chosen
from moestro.check.report import Explained, Finding, Report
from moestro.check.subject import Subject, of_anything
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
        trial = _trial(subject, seed)
        found = [Explained(c.name, _done(c, trial), c.meaning, c.looks_like) for c in checks]
    return Report(subject.title, tuple(found), seed)


def _trial(subject: Subject, seed: int) -> Trial:
    trial = Trial(subject, seed)
    if len(trial.x[0]) == 0:
        raise MoestroError(f"{subject.title}: no token has a clear choice of experts")
    _ = trial.exact  # a definition that fails is a description that does not fit
    return trial


def _done(check: Check, trial: Trial) -> Finding:
    """What a check finds; a layer that raises where it should compute is wrong."""
    try:
        return check.function(trial)
    except MoestroError as error:
        return Finding("unchecked", str(error))
    except Exception as error:
        first = str(error).strip().split("\n")[0][:200]
        return Finding("wrong", f"it raised {type(error).__name__}: {first}", float("inf"))
