"""What the domains of a text may be called."""

from __future__ import annotations

from collections.abc import Collection

from moestro.errors import DataError

# All domains together, wherever something is told by domain.
ALL = "all"


def check_domains(names: Collection[str]) -> None:
    """Refuse a domain that would be taken for all of them together.

    Raises:
        DataError: one of several is called `ALL`.
    """
    if ALL in names and len(names) > 1:
        raise DataError(
            f"one of {len(names)} domains is called {ALL!r}, the name of all of them together; "
            "rename its folder, file or label, or set data.domains to 'none'"
        )
