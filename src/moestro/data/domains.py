"""What the domains of a text may be called."""

from __future__ import annotations

from collections.abc import Collection

from moestro.errors import DataError
from moestro.text import utf8

# All domains together, wherever something is told by domain.
ALL = "all"


def check_domain(name: str, document: str) -> None:
    """Refuse a name that no file in UTF-8 can hold, as of a file that is named in Latin-1.

    Raises:
        DataError: names the document that has it.
    """
    try:
        utf8(name)
    except DataError:
        raise DataError(
            f"the domain {name!r} of {document!r} is not text in UTF-8; rename its folder or file, "
            "correct its label, or set data.domains to 'none'"
        ) from None


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
