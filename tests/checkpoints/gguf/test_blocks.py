"""Blocks of every kind: native reading against ggml's own library, and packing that keeps them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize
from torch import Tensor

from moestro.checkpoints.gguf import sources
from moestro.checkpoints.gguf.header import KINDS as KINDS_OF_GGML
from moestro.errors import CheckpointError, ShapeError
from moestro.kernels import native_cpu
from moestro.kernels.packing import (
    BLOCKS,
    EXACT,
    NF4,
    TABLES,
    BlockRows,
    Format,
    block_row_bytes,
    error_bound,
)

# NF4's blocks are of our own making.
NAMES = {number: GGMLQuantizationType(number).name for number in BLOCKS if number != NF4}
KINDS = pytest.mark.parametrize("number", NAMES, ids=NAMES.get)


def random_rows(number: int, rows: int, columns: int, seed: int = 0) -> BlockRows:
    """Random bytes; halves that stand for scales are finite and not tiny."""
    length, size = BLOCKS[number]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, columns // length, size), np.uint8)
    halves = {12: (0, 2), 13: (0, 2), 14: (208,), 3: (0, 2), 7: (0, 2)}.get(number, (0,))
    scales = (rng.standard_normal((rows, columns // length, len(halves))) * 0.1).astype("<f2")
    if NAMES[number] == "MXFP4":
        raw[..., 0] = rng.integers(118, 132, raw.shape[:2])
    else:
        for n, at in enumerate(halves):
            raw[..., at : at + 2] = scales[..., n : n + 1].copy().view(np.uint8)
    data = torch.from_numpy(raw.reshape(rows, -1).copy())
    return BlockRows(data, number, columns)


def theirs(rows: BlockRows) -> Tensor:
    found = dequantize(rows.data.numpy(), GGMLQuantizationType(rows.number))
    return torch.from_numpy(np.ascontiguousarray(found, np.float32)).view(len(rows.data), -1)


class Given:
    """One matrix for the packer."""

    def __init__(self, *parts: BlockRows | Tensor) -> None:
        self.parts = list(parts)
        self.rounding = torch.zeros(2, dtype=torch.float64)

    def rows(self, name: str, entry: int | None = None) -> list[BlockRows | Tensor]:
        return list(self.parts)


@KINDS
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (5, 768), (33, 512)])
def test_native_numbers_are_the_librarys(number: int, rows: int, columns: int) -> None:
    given = random_rows(number, rows, columns)
    assert torch.equal(native_cpu.read_rows(given), theirs(given))


@pytest.mark.parametrize(
    ("kind", "number"),
    [(kind, number) for kind in EXACT for number in EXACT[kind] if number != NF4],
)
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (45, 96), (71, 160)])
def test_what_is_kept_exactly(kind: str, number: int, rows: int, columns: int) -> None:
    given = Given(random_rows(number, rows, columns))
    packed = native_cpu.pack_matrix(torch.empty(rows, columns), Format(kind, 32), None, given)
    assert torch.equal(native_cpu.unpack_matrix(packed), theirs(given.parts[0]))
    assert given.rounding.tolist() == [0, 0]


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_is_for_its_own_blocks(kind: str) -> None:
    for other in (torch.randn(4, 64), random_rows(8, 4, 64)):
        with pytest.raises(ShapeError, match=f"{kind} holds its own blocks alone"):
            native_cpu.pack_matrix(torch.empty(4, 64), Format(kind), None, Given(other))
    with pytest.raises(ShapeError, match="with a table 32; given 64"):
        native_cpu.pack_matrix(torch.empty(4, 64), Format(kind, 64))


def test_powers_of_mxfp4_that_fp16_lacks_are_rounded_and_measured() -> None:
    rows = random_rows(39, 2, 64)
    rows.data[0, 0], rows.data[1, 17] = 90, 103  # 2^-38, 2^-25
    given, plain = Given(rows), theirs(rows)
    packed = native_cpu.pack_matrix(torch.empty(2, 64), Format("mxfp4"), None, given)
    off = (native_cpu.unpack_matrix(packed) - plain).double()
    assert 0 < off.abs().max() < 13 * 2.0**-24
    torch.testing.assert_close(given.rounding[0], off.square().sum(), rtol=1e-5, atol=0)
    rows.data[0, 0] = 150  # 2^22
    with pytest.raises(ShapeError, match="65504"):
        native_cpu.pack_matrix(torch.empty(2, 64), Format("mxfp4"), None, Given(rows))


def test_uint4_rounds_scales_and_minima_of_q4_k_alone() -> None:
    given = Given(random_rows(12, 45, 768))
    plain = theirs(given.parts[0])
    packed = native_cpu.pack_matrix(torch.empty(45, 768), Format("uint4", 32), None, given)
    unpacked = native_cpu.unpack_matrix(packed)
    # q · scale and the minimum, each up to 64 · 16 times a random fp16 number, rounded to 2^-11.
    most = plain.unflatten(1, (-1, 32)).abs().amax(-1).repeat_interleave(32, 1)
    assert bool(((unpacked - plain).abs() <= 2**-9 * most + 2**-20).all())
    # Steps and least numbers are recovered: two integers apart by one differ by the fp16 scale.
    off = unpacked.double() - plain.double()
    expected = torch.stack([off.square().sum(), plain.double().square().sum()])
    torch.testing.assert_close(given.rounding, expected, rtol=1e-4, atol=0)
    assert 0 < float((expected[0] / expected[1]).sqrt()) < 3e-4


def test_scales_of_q4_k_that_fp16_cannot_hold_are_rounded_as_plain_numbers() -> None:
    rows = random_rows(12, 3, 256)
    rows.data[:, :2] = torch.tensor([0x00, 0x68], dtype=torch.uint8)  # 2048: beyond with 6 bits
    rows.data[:, 4:12] = 63
    given = Given(rows)
    with pytest.raises(ShapeError, match="65504"):
        native_cpu.pack_matrix(torch.empty(3, 256), Format("uint4", 32), None, given)
    rows.data[:, 16:] = 0
    rows.data[:, 2:4] = 0
    packed = native_cpu.pack_matrix(torch.empty(3, 256), Format("uint4", 32), None, given)
    plain = native_cpu.pack_matrix(theirs(rows), Format("uint4", 32))
    assert torch.equal(packed.data, plain.data)


@KINDS
@pytest.mark.parametrize("format", [Format("int8", 64), Format("uint4", 64), Format("bfloat16")])
def test_other_forms_round_as_they_round_plain_numbers(number: int, format: Format) -> None:
    given = Given(random_rows(number, 40, 512))
    plain = theirs(given.parts[0])
    packed = native_cpu.pack_matrix(torch.empty(40, 512), format, None, given)
    assert torch.equal(packed.data, native_cpu.pack_matrix(plain, format).data)


@KINDS
def test_the_error_of_rounding_is_measured(number: int) -> None:
    given = Given(random_rows(number, 64, 512))
    plain = theirs(given.parts[0]).double()
    packed = native_cpu.pack_matrix(torch.empty(64, 512), Format("int8", 32), None, given)
    off = native_cpu.unpack_matrix(packed).double() - plain
    assert bool(
        (off.abs() <= error_bound(plain.float(), Format("int8", 32)).repeat_interleave(32, 1)).all()
    )
    if number in EXACT["int8"]:
        return
    expected = torch.stack([off.square().sum(), plain.square().sum()])
    torch.testing.assert_close(given.rounding, expected, rtol=1e-4, atol=0)


def test_parts_of_several_kinds() -> None:
    parts = [random_rows(2, 32, 256), random_rows(14, 64, 256, 1), random_rows(8, 7, 256, 2)]
    given = Given(*parts)
    packed = native_cpu.pack_matrix(torch.empty(103, 256), Format("int8", 32), None, given)
    alone = [
        native_cpu.pack_matrix(torch.empty(len(p.data), 256), Format("int8", 32), None, Given(p))
        for p in parts
    ]
    found = torch.cat([native_cpu.unpack_matrix(each) for each in alone])
    assert torch.equal(native_cpu.unpack_matrix(packed), found)


def test_parts_that_do_not_fit() -> None:
    wide = random_rows(8, 8, 64)
    for given in (Given(wide, wide), Given(wide), Given(random_rows(8, 16, 96))):
        with pytest.raises(ShapeError):
            native_cpu.pack_matrix(torch.empty(16, 64), Format("int8", 32), None, given)
    with pytest.raises(ShapeError, match="blocks of kind 10"):
        block_row_bytes(10, 256)
    with pytest.raises(ShapeError):
        native_cpu.read_rows(BlockRows(torch.zeros(2, 33, dtype=torch.uint8), 8, 32))


def test_a_scale_that_is_not_finite_is_refused() -> None:
    rows = random_rows(8, 4, 32)
    rows.data[2, :2] = torch.tensor([0, 0x7C], dtype=torch.uint8)
    with pytest.raises(ShapeError, match="NaN or infinity"):
        native_cpu.pack_matrix(torch.empty(4, 32), Format("int8", 32), None, Given(rows))


# Blocks of these go into these kinds word by word, 32 rows at a time.
MOVED = pytest.mark.parametrize(
    ("kind", "number"),
    [("int8", 8), ("int4", 2), ("uint4", 3), ("iq4_nl", 20), ("mxfp4", 39)],
)


@MOVED
def test_blocks_that_move_are_those_made_row_by_row(kind: str, number: int) -> None:
    """Of fewer than 32 rows, each is taken apart and put together."""
    rows = random_rows(number, 32, 96)
    if kind == "mxfp4":
        rows.data[9, 17] = 100  # which fp16 rounds, so that these rows do not move either
    given, apart = Given(rows), [Given(rows._replace(data=part)) for part in rows.data.split(31)]
    whole = native_cpu.pack_matrix(torch.empty(32, 96), Format(kind), None, given)
    parts = [
        native_cpu.pack_matrix(torch.empty(len(each.parts[0].data), 96), Format(kind), None, each)
        for each in apart
    ]
    found = torch.cat([native_cpu.unpack_matrix(each) for each in parts])
    assert torch.equal(native_cpu.unpack_matrix(whole), found)
    assert (given.rounding[0] > 0) == (kind == "mxfp4")


@MOVED
def test_a_block_with_a_scale_beyond_fp16_does_not_move(kind: str, number: int) -> None:
    rows = random_rows(number, 64, 64)
    size = BLOCKS[number][1]
    rows.data[40, size : size + 2] = torch.tensor([0, 0x7C], dtype=torch.uint8)
    if kind == "mxfp4":
        rows.data[40, size] = 150
    with pytest.raises(ShapeError, match="65504"):
        native_cpu.pack_matrix(torch.empty(64, 64), Format(kind), None, Given(rows))


def test_matrices_packed_side_by_side() -> None:
    """While one has the team of threads, others are packed alone."""
    rows = random_rows(7, 33, 32 * 1024)  # enough numbers for a team

    def packed(_: int) -> tuple[Tensor, Tensor]:
        given = Given(rows)
        shape = torch.empty(33, 32 * 1024, device="meta")
        return native_cpu.pack_matrix(shape, Format("int8"), None, given).data, given.rounding

    data, rounding = packed(0)
    with ThreadPoolExecutor(3) as threads:
        for other, sums in threads.map(packed, range(6)):
            assert torch.equal(other, data)
            torch.testing.assert_close(sums, rounding, rtol=1e-12, atol=0)


def test_what_rounding_experts_adds_is_that_of_their_matrices() -> None:
    class Experts(Given):
        def rows(self, name: str, entry: int | None = None) -> list[BlockRows | Tensor]:
            assert entry is not None
            return [random_rows(7, 64 if name == "gate_up" else 32, 32, seed=entry)]

    given, format = Experts(), Format("int8")
    native_cpu.pack_experts(
        torch.empty(5, 64, 32), torch.empty(5, 32, 32), "swiglu", format, stored=given
    )
    alone = torch.zeros(2, dtype=torch.float64)
    for entry in range(5):
        for name in ("gate_up", "down"):
            one = Given(*given.rows(name, entry))
            shape = torch.empty(len(one.parts[0].data), 32)
            native_cpu.pack_matrix(shape, format, None, one)
            alone += one.rounding
    torch.testing.assert_close(given.rounding, alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [1, 3 * 4 * 256, 1 << 20])
def test_a_matrix_is_read_in_pieces(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_rows(12, 7, 256)
    file = tmp_path / "blocks"
    file.write_bytes(b"x" * 32 + rows.data.numpy().tobytes())
    source = sources.Blocks(file, "w", None, (7, 256), rows.data.numel(), KINDS_OF_GGML[12], 32)
    monkeypatch.setattr(sources, "BUFFER_BYTES", size)
    for dtype in (torch.float32, torch.bfloat16):
        target = torch.empty(7, 256, dtype=dtype)
        source.load_into(target)
        assert torch.equal(target, theirs(rows).to(dtype))
    assert torch.equal(source.part(2, 5).load(torch.float32), theirs(rows)[2:5])
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="ends inside w"):
        source.load_into(target)
