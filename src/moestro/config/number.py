"""Ranges of numbers that settings share."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

# Beyond any model; a product of several such numbers does not overflow.
MOST = 2**40
# Bounds the time of what is done layer by layer.
MOST_LAYERS = 10_000

Natural = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # what torch's generators take
Positive = Annotated[int, Field(ge=1, le=MOST)]
Layers = Annotated[int, Field(ge=1, le=MOST_LAYERS)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Coefficient = Annotated[float, Field(ge=0.0)]
