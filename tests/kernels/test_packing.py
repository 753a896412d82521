"""Packed weights: the native packer against the definition, bit by bit, and what packing costs."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moestro.errors import ShapeError
from moestro.kernels import native_cpu
from moestro.kernels.native_packing import private_memory
from moestro.kernels.packing import (
    PAGE,
    ExpertSlabs,
    Format,
    PackedMatrix,
    dequantise,
    error_bound,
    quantise,
)

QUANTISED = [Format(kind, group) for kind in ("int8", "int4", "uint4") for group in (32, 64)]
FORMATS = [*QUANTISED, Format("bfloat16"), Format("float32")]
MIXED = [Format("uint4", 32, "int8"), Format("bfloat16", 64, "int4")]
FUZZ = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _needs_the_library(native):
    pass


def name(format: Format) -> str:
    return "-".join(str(each) for each in format if each is not None)


@st.composite
def matrices(draw) -> torch.Tensor:
    """Any shape and size of number, with zeros and perhaps one weight far from all others."""
    rows, columns = draw(st.integers(1, 70)), draw(st.integers(1, 200))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = 10.0 ** draw(st.floats(-8, 4))
    w_OI = (torch.rand(rows, columns, generator=generator) * 2 - 1) * scale
    kept = draw(st.sampled_from([1.0, 0.5, 0.0]))
    w_OI[torch.rand(rows, columns, generator=generator) > kept] = 0
    if draw(st.booleans()):
        w_OI[draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))] = -3.0 * scale
    if draw(st.booleans()):  # steps that tie when rounded, and equal sizes of both signs
        w_OI = (w_OI / scale * 4).round() / 4 * scale
    return w_OI.bfloat16() if draw(st.booleans()) else w_OI


def padded(w_OI: torch.Tensor, format: Format) -> torch.Tensor:
    """To whole blocks and groups."""
    rows, columns = w_OI.shape
    return torch.nn.functional.pad(w_OI, (0, -columns % format.group, 0, -rows % 32))


def opened(packed: PackedMatrix) -> tuple[torch.Tensor, ...]:
    """Integers [O, I], scales and minima [O, I / Q] by the layout that packing.py describes."""
    format, blocks = packed.format, -(-packed.rows // 32)
    groups, quads = -(-packed.columns // format.group), format.group // 4
    data_BGX = packed.data.view(blocks, groups, -1)
    head = 128 if format.kind == "uint4" else 64
    head_BGHN = data_BGX[..., :head].contiguous().view(torch.float16).unflatten(-1, (-1, 32))
    lines_BGX = data_BGX[..., head:].contiguous()
    if format.kind == "int8":
        q = lines_BGX.view(torch.int8).view(blocks, groups, quads, 32, 4)
    else:
        both = lines_BGX.view(blocks, groups, quads // 2, 1, 32, 4)
        q = torch.cat([both & 15, both >> 4], dim=3).view(torch.int8)
        q = q - 8 if format.kind == "int4" else q
        q = q.view(blocks, groups, quads, 32, 4)
    q_OI = q.permute(0, 3, 1, 2, 4).reshape(blocks * 32, groups * format.group)
    return q_OI, *head_BGHN.permute(2, 0, 3, 1).reshape(-1, blocks * 32, groups)


@pytest.mark.parametrize("format", QUANTISED, ids=name)
@FUZZ
@given(w_OI=matrices())
def test_integers_and_scales_are_the_definitions(format, w_OI):
    q_OI, *found = opened(native_cpu.pack_matrix(w_OI, format))
    expected_OI, *expected = quantise(padded(w_OI, format), format)
    for found_OG, expected_OG in zip(found, filter(torch.is_tensor, expected), strict=True):
        assert torch.equal(found_OG.view(torch.int16), expected_OG.view(torch.int16))
    assert torch.equal(q_OI, expected_OI)


@pytest.mark.parametrize("format", FORMATS, ids=name)
@FUZZ
@given(w_OI=matrices())
def test_unpacked_weights_are_within_the_bound(format, w_OI):
    packed = native_cpu.pack_matrix(w_OI, format)
    unpacked_OI = native_cpu.unpack_matrix(packed)
    errors_OI, bound = (unpacked_OI - w_OI.float()).abs(), error_bound(w_OI, format)
    if format in QUANTISED:
        expected_OI = dequantise(*quantise(padded(w_OI, format), format))
        assert torch.equal(unpacked_OI, expected_OI[: w_OI.shape[0], : w_OI.shape[1]])
        bound = bound.repeat_interleave(format.group, dim=1)[:, : w_OI.shape[1]]
    assert (errors_OI <= bound).all()


def test_what_16_and_32_bits_keep():
    w_OI = torch.randn(37, 45)
    for kind, expected_OI in (("float32", w_OI), ("bfloat16", w_OI.bfloat16().float())):
        packed = native_cpu.pack_matrix(w_OI, Format(kind))
        assert torch.equal(native_cpu.unpack_matrix(packed), expected_OI)


@pytest.mark.parametrize("format", FORMATS, ids=name)
def test_packing_again_changes_nothing(format):
    once_OI = native_cpu.unpack_matrix(native_cpu.pack_matrix(torch.randn(40, 70), format))
    again_OI = native_cpu.unpack_matrix(native_cpu.pack_matrix(once_OI, format))
    torch.testing.assert_close(again_OI, once_OI, rtol=2**-10, atol=0)


def test_a_view_is_packed_as_its_copy():
    wide_OI = torch.randn(40, 90)
    for view_OI in (wide_OI[3:36, 5:70], wide_OI.T):
        view, copy = (native_cpu.pack_matrix(w, QUANTISED[2]) for w in (view_OI, view_OI.clone()))
        assert torch.equal(view.data, copy.data)


@pytest.mark.parametrize("kind", ["int8", "int4", "uint4", "bfloat16", "float32"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(kind, bad):
    w_OI = torch.randn(70, 40)
    w_OI[69, 39] = bad
    with pytest.raises(ShapeError, match="NaN or infinity"):
        native_cpu.pack_matrix(w_OI, Format(kind))


@pytest.mark.parametrize("kind", ["int8", "int4", "uint4"])
def test_sizes_above_fp16_are_refused(kind):
    w_OI = torch.randn(3, 40)
    w_OI[1, 2] = -65504.0
    packed = native_cpu.pack_matrix(w_OI, Format(kind))
    assert native_cpu.unpack_matrix(packed)[1, 2].item() == pytest.approx(-65504, rel=2**-10)
    w_OI[1, 2] = -65505.0
    with pytest.raises(ShapeError, match="65504"):
        native_cpu.pack_matrix(w_OI, Format(kind))


def test_formats_that_do_not_exist():
    w_OI = torch.randn(4, 32)
    unknown = (Format("int3"), "int3"), (Format("plain"), "plain"), (Format("int8", 32, "x"), "x")
    for format, says in unknown:
        with pytest.raises(ShapeError, match=says):
            native_cpu.pack_matrix(w_OI, format)
    with pytest.raises(ShapeError, match="32 or 64"):
        native_cpu.pack_matrix(w_OI, Format("int8", 16))
    with pytest.raises(ShapeError, match="float64"):
        native_cpu.pack_matrix(w_OI.double(), Format("int8"))


def test_bits_count_the_scales():
    assert Format("int4", 32).bits == 4.5
    assert Format("int4", 64).bits == 4.25
    assert Format("int8", 64).bits == 8.25
    assert Format("uint4", 32).bits == 5
    assert [Format(kind).bits for kind in ("bfloat16", "float32")] == [16, 32]
    packed = native_cpu.pack_matrix(torch.randn(64, 256), Format("int4"))
    assert packed.data.numel() * 8 == 4.5 * 64 * 256


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("format", [*FORMATS, *MIXED], ids=name)
def test_an_expert_is_its_two_matrices(format, activation):
    dim, hidden = 70, 45
    up_HD = torch.randn(hidden * (2 if activation == "swiglu" else 1), dim)
    down_DF = torch.randn(dim, hidden)
    size = native_cpu.slab_bytes(dim, hidden, activation, format)
    data = native_cpu.aligned(2 * size)
    assert size % PAGE == 0
    assert data.data_ptr() % PAGE == 0
    data.fill_(77)
    native_cpu.pack_expert(up_HD, down_DF, activation, format, data[size:])
    assert (data[:size] == 77).all(), "the neighbour's slab was written to"
    data[:size] = 78
    native_cpu.pack_expert(up_HD, down_DF, activation, format, data[:size])
    assert torch.equal(data[:size], data[size:]), "what memory held before is in it"
    packed = ExpertSlabs(data, 2, dim, hidden, activation, format)
    given = ((up_HD, format), (down_DF, format.of_down))
    for unpacked, (given_OI, own) in zip(native_cpu.unpack_expert(packed, 1), given, strict=True):
        alone = native_cpu.unpack_matrix(native_cpu.pack_matrix(given_OI, own))
        assert torch.equal(unpacked, alone)


def test_experts_are_packed_in_inference_mode():
    up_EHD, down_EDF = torch.randn(3, 64, 32), torch.randn(3, 32, 32)
    want = native_cpu.pack_experts(up_EHD, down_EDF, "swiglu", Format("int8"))
    with torch.inference_mode():
        got = native_cpu.pack_experts(up_EHD, down_EDF, "swiglu", Format("int8"))
    assert torch.equal(got.data, want.data)


def test_an_expert_that_does_not_fit_is_refused():
    format = Format("int8")
    slab = native_cpu.aligned(native_cpu.slab_bytes(64, 32, "swiglu", format))
    with pytest.raises(ShapeError, match="slab"):
        native_cpu.pack_expert(
            torch.randn(64, 64), torch.randn(64, 32), "swiglu", format, slab[:-PAGE]
        )
    for up_HD in (torch.randn(32, 64), torch.randn(64, 96)):
        with pytest.raises(ShapeError, match="have up"):
            native_cpu.pack_expert(up_HD, torch.randn(64, 32), "swiglu", format, slab)


def test_memory_that_the_system_does_not_have():
    with pytest.raises(MemoryError, match="not enough memory for 1073741825 MiB"):
        private_memory((1 << 50) + 1)
