"""Kinds whose four bits are places in a table: every path the same bits, and the definition's."""

import pytest
import torch
from torch import Tensor

from moestro.kernels import native_cpu, reference
from moestro.kernels.packing import BLOCKS, EXACT, TABLES, BlockRows, Format

KINDS = pytest.mark.parametrize("kind", TABLES)


@pytest.fixture(autouse=True)
def _needs_the_library(native):
    pass


def blocks(kind: str, rows: int, columns: int) -> tuple[BlockRows, Tensor]:
    """Rows of random places, and the numbers that they stand for by `TABLES`."""
    places_OGQ = torch.randint(0, 16, (rows, columns // 32, 32), dtype=torch.uint8)
    halves = places_OGQ[..., :16] | places_OGQ[..., 16:] << 4
    if kind == "mxfp4":
        powers = torch.randint(118, 126, (rows, columns // 32, 1), dtype=torch.uint8)
        head, scales_OG = powers, 2.0 ** (powers[..., 0].float() - 128)
    else:
        scales = torch.rand(rows, columns // 32, 1).half() * 0.01
        head, scales_OG = scales.view(torch.uint8), scales[..., 0].float()
    (number,) = EXACT[kind]
    data = torch.cat([head, halves], -1).reshape(rows, -1)
    assert data.shape[1] == columns // 32 * BLOCKS[number][1]
    values = torch.tensor(TABLES[kind], dtype=torch.float32)[places_OGQ.int()]
    return BlockRows(data, number, columns), (values * scales_OG[..., None]).flatten(1)


class Given:
    def __init__(self, **parts: list[BlockRows]) -> None:
        self.parts, self.rounding = parts, torch.zeros(2, dtype=torch.float64)

    def rows(self, name: str, entry: int | None = None) -> list[BlockRows]:
        return self.parts[name]


@KINDS
@pytest.mark.parametrize("rows", [1, 7, 63])
def test_linear(kind, rows, on_every_path):
    given, w_OI = blocks(kind, 45, 96)
    packed = native_cpu.pack_matrix(torch.empty(45, 96), Format(kind), None, Given(weight=[given]))
    assert torch.equal(native_cpu.unpack_matrix(packed), w_OI)
    x_TI = torch.randn(rows, 96)
    y_TO = on_every_path(lambda: native_cpu.linear(packed, x_TI))
    # int8 of the same numbers, which is held against the definition elsewhere.
    twin = native_cpu.pack_matrix(torch.empty(45, 96), Format("int8"), None, Given(weight=[given]))
    expected_TO = native_cpu.linear(twin, x_TI)
    assert torch.equal(native_cpu.unpack_matrix(twin), w_OI)
    assert torch.equal(y_TO, expected_TO)


@KINDS
def test_mixture(kind, on_every_path):
    (gate, gate_FD), (up, up_FD), (down, down_DF) = (
        blocks(kind, *sizes) for sizes in ((64, 96), (64, 96), (96, 64))
    )
    both = gate._replace(data=torch.cat([gate.data, up.data]))
    up_EHD, down_EDF = torch.cat([gate_FD, up_FD])[None], down_DF[None]
    for ups in ([gate, up], [both]):
        packed = native_cpu.pack_experts(
            up_EHD, down_EDF, "swiglu", Format(kind), stored=Given(gate_up=ups, down=[down])
        )
        found_HD, found_DF = native_cpu.unpack_expert(packed, 0)
        assert torch.equal(found_HD, up_EHD[0])
        assert torch.equal(found_DF, down_DF)
    x_TD, tokens = torch.randn(19, 96), torch.arange(19)
    chosen = (tokens, torch.zeros_like(tokens), torch.ones(19))
    y_TD = on_every_path(lambda: native_cpu.mixture(packed, x_TD, *chosen))
    expected_TD = reference.mixture(x_TD, *chosen, up_EHD, down_EDF, "swiglu", None)
    size = expected_TD.abs().max().item()
    torch.testing.assert_close(y_TD, expected_TD, rtol=0, atol=4e-2 * size)
