"""What a check is: its name, what it says, and a function of a Trial."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from moestro.check.report import Finding
from moestro.check.trial import Trial


class Check(NamedTuple):
    """One row of the table.

    Attributes:
        name: for `--only`.
        meaning: one sentence: what should hold.
        looks_like: published defects that break it.
        function: does it.
        slow: done only when asked for.
    """

    name: str
    meaning: str
    looks_like: str
    function: Callable[[Trial], Finding]
    slow: bool = False
