"""All checks, in the order of a report."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from moestro.check.checks import adapters, losses, model_losses, modes, parallel, tokens, values
from moestro.check.checks.check import Check
from moestro.errors import ConfigError

CHECKS = {
    each.name: each
    for each in (
        *values.CHECKS,
        *tokens.CHECKS,
        *losses.CHECKS,
        *model_losses.CHECKS,
        *adapters.CHECKS,
        *modes.CHECKS,
        *parallel.CHECKS,
    )
}


def chosen(
    only: Collection[str] = (), skip: Collection[str] = (), slow: bool = False
) -> list[Check]:
    """Those to run.

    Args:
        only: their names; empty: all but the slow ones.
        skip: names of others not to run.
        slow: the slow ones too.

    Raises:
        ConfigError: no check has such a name, or none is left.
    """
    for name in (*only, *skip):
        if name not in CHECKS:
            near = difflib.get_close_matches(name, CHECKS, 1)
            hint = f"did you mean {near[0]}?" if near else "`moestro check --list` names them"
            raise ConfigError(f"there is no check {name!r}; {hint}")
    names = only or [each.name for each in CHECKS.values() if slow or not each.slow]
    found = [CHECKS[name] for name in CHECKS if name in names and name not in skip]
    if not found:
        raise ConfigError(f"no check is left: {', '.join(skip)} are skipped; leave out fewer")
    return found
