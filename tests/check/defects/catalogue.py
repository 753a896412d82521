"""Seeded defects: what each re-creates, where it was published, which checks must name it."""

from typing import NamedTuple


class Defect(NamedTuple):
    """One row of the catalogue.

    Attributes:
        change: a class that overrides steps of `PlainLayer`.
        source: where it was reported, or whose rule it breaks.
        checks: at least one of these must fail: the part that is wrong.
        shapes: names of those it applies to; empty: all.
    """

    change: type
    source: str
    checks: tuple[str, ...]
    shapes: tuple[str, ...] = ()


CATALOGUE: list[Defect] = []


def defect(source: str, checks: str, shapes: str = ""):
    """Enter a class into the catalogue."""

    def enter(change: type) -> type:
        CATALOGUE.append(Defect(change, source, tuple(checks.split()), tuple(shapes.split())))
        return change

    return enter
