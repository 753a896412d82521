"""The kind that a module of stored blocks is packed as."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from moestro.checkpoints.families.table import ROWS
from moestro.checkpoints.stored_modules import StoredModule
from moestro.kernels.packing import IQ4_NL, Q4_0


class Stored(NamedTuple):
    """What is asked of a source before anything is read."""

    shape: tuple[int, int]
    blocks: int
    stored_in: str = "blocks"


@pytest.mark.parametrize(
    ("blocks", "heights", "kind"),
    [
        (IQ4_NL, (64, 32), "iq4_nl"),
        (IQ4_NL, (64, 80), "iq4_nl"),  # the last part may end anywhere
        (IQ4_NL, (80, 64), "int8"),  # joined as numbers, which no table takes
        (Q4_0, (80, 64), "int4"),
    ],
)
def test_parts_that_end_within_a_block_of_rows(
    blocks: int, heights: tuple[int, int], kind: str
) -> None:
    layout = next(iter(ROWS))
    parts: Any = {"weight": {None: [(Stored((rows, 64), blocks), layout) for rows in heights]}}
    assert StoredModule(parts, None).format.kind == kind
