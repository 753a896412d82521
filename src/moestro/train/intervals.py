"""Intervals of a mean over few runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# Student's t of 95 %, two-sided, by degrees of freedom from 1 on; beyond, it is expanded.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_NORMAL = 1.959964


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean (Student's t); NaN of a single value."""
    if len(values) < 2:
        return math.nan
    return student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def student(freedom: int) -> float:
    """Student's t of 95 %, two-sided (Abramowitz and Stegun 26.7.5 from 10 degrees on)."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    x = _NORMAL
    first = (x**3 + x) / 4
    second = (5 * x**5 + 16 * x**3 + 3 * x) / 96
    third = (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384
    return x + first / freedom + second / freedom**2 + third / freedom**3
