"""Quantised tensors against a definition element by element, and against transformers' code."""

import math
import warnings

import pytest
import torch

from moestro.checkpoints.quantised import mxfp4, scaling
from moestro.checkpoints.quantised.fp8 import BlockFp8, MatrixFp8
from moestro.checkpoints.quantised.mxfp4 import Mxfp4, from_mxfp4
from moestro.errors import ShapeError


def from_fp8(values, scales, block, dtype):
    return BlockFp8(block).dequantize({"": values, "_scale_inv": scales}, dtype)


def e2m1(half: int) -> float:
    """The number of four bits: sign, two of exponent (bias 1), one of mantissa."""
    sign = -1.0 if half & 8 else 1.0
    exponent, mantissa = (half >> 1) & 3, half & 1
    if exponent == 0:
        return sign * mantissa / 2
    return sign * 2.0 ** (exponent - 1) * (1 + mantissa / 2)


def e4m3(byte: int) -> float:
    """The number of eight bits: sign, four of exponent (bias 7), three of mantissa."""
    sign = -1.0 if byte & 128 else 1.0
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    if exponent == 0:
        return sign * 2.0**-6 * mantissa / 8
    return sign * 2.0 ** (exponent - 7) * (1 + mantissa / 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leading", [(), (3,), (2, 5)])
def test_mxfp4_is_what_each_half_byte_says(leading, dtype):
    blocks = torch.randint(0, 256, (*leading, 3, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (*leading, 3), dtype=torch.uint8)
    values = from_mxfp4(blocks, scales, dtype)
    assert values.shape == (*leading, 96)
    assert values.dtype == dtype
    rows = zip(blocks.view(-1, 16).tolist(), scales.flatten().tolist(), strict=True)
    expected = [
        e2m1(half) * 2.0 ** (scale - 127)
        for block, scale in rows
        for byte in block
        for half in (byte & 15, byte >> 4)
    ]
    assert values.flatten().tolist() == expected


def test_more_than_is_done_at_once(monkeypatch):
    monkeypatch.setattr(mxfp4, "_GROUPS_AT_ONCE", 4)
    test_mxfp4_is_what_each_half_byte_says((3, 3), torch.float32)


def test_every_byte_of_fp8():
    every = torch.arange(256, dtype=torch.uint8)
    finite = every[(every & 127) != 127]
    values = finite.repeat(2, 1).view(torch.float8_e4m3fn)
    result = from_fp8(values, torch.ones(1, 1), (2, 254), torch.float32)
    assert result.tolist() == [[e4m3(byte) for byte in finite.tolist()]] * 2
    broken = torch.tensor([[127, 255]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert from_fp8(broken, torch.ones(1, 1), (1, 2), torch.float32).isnan().all()


def test_every_byte_and_the_ends_of_the_scale():
    every = torch.arange(256, dtype=torch.uint8).view(16, 16)
    values = from_mxfp4(every, torch.full((16,), 127, dtype=torch.uint8), torch.float32)
    assert values.view(256, 2).tolist() == [[e2m1(b & 15), e2m1(b >> 4)] for b in range(256)]
    one = torch.full((3, 16), 0x22, dtype=torch.uint8)
    ends = from_mxfp4(one, torch.tensor([0, 254, 255], dtype=torch.uint8), torch.float32)
    assert ends.view(3, 32)[:2, 0].tolist() == [2.0**-127, 2.0**127]
    assert ends.view(3, 32)[2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 6), (5, 7), (1, 1), (9, 3), (7, 8)])
def test_fp8_is_value_times_scale_of_the_block(shape, dtype):
    """Blocks of 4 × 3, parts of a block at the edges among them."""
    height, width = shape
    values = torch.randint(0, 127, shape, dtype=torch.uint8)
    values += 128 * torch.randint(0, 2, shape, dtype=torch.uint8)
    scales = torch.rand(math.ceil(height / 4), math.ceil(width / 3)) + 0.01
    result = from_fp8(values.view(torch.float8_e4m3fn), scales, (4, 3), dtype)
    assert result.dtype == dtype
    for i in range(height):
        for j in range(width):
            exact = torch.tensor(e4m3(int(values[i, j]))) * scales[i // 4, j // 3]
            assert result[i, j] == exact.to(dtype)


def test_the_same_numbers_as_transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("transformers")
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8)
    scales = torch.randint(100, 150, (3, 10, 2), dtype=torch.uint8)
    parts = {"_blocks": blocks, "_scales": scales}
    ours = Mxfp4().dequantize(parts, torch.bfloat16)
    assert Mxfp4().shape(parts) == tuple(ours.shape) == (3, 64, 10)
    assert torch.equal(ours, convert_moe_packed_tensors(blocks, scales))
    values = torch.randn(256, 384).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3) + 0.01
    form, parts = BlockFp8((128, 128)), {"": values, "_scale_inv": scales}
    ours = form.dequantize(parts, torch.bfloat16)
    assert form.shape(parts) == tuple(ours.shape)
    theirs = Fp8Dequantize(None)._dequantize_one(values, scales, torch.bfloat16)
    assert torch.equal(ours, theirs)


def test_shapes_and_dtypes_that_do_not_fit_are_refused():
    byte = torch.zeros(2, 16, dtype=torch.uint8)
    with pytest.raises(ShapeError, match=r"scales \[..., N\]; given .*\[3\]"):
        from_mxfp4(byte, byte[0, :3], torch.float32)
    with pytest.raises(ShapeError, match="int32"):
        from_mxfp4(byte.int(), byte[:, 0], torch.float32)
    values = torch.zeros(5, 7)
    with pytest.raises(ShapeError, match="should be float8_e4m3fn"):
        from_fp8(values, torch.ones(2, 3), (4, 3), torch.float32)
    with pytest.raises(ShapeError, match=r"_scale_inv .* \[1, 3\]; it should be .* \[2, 3\]"):
        from_fp8(values.to(torch.float8_e4m3fn), torch.ones(1, 3), (4, 3), torch.float32)


@pytest.mark.parametrize("most", [1, 20, 1 << 18])
def test_fp8_some_rows_at_a_time(most, monkeypatch):
    """Rows of one block are multiplied in several goes, and blocks of a row many at once."""
    monkeypatch.setattr(scaling, "_NUMBERS_AT_ONCE", most)
    test_fp8_is_value_times_scale_of_the_block((9, 3), torch.float32)
    test_fp8_is_value_times_scale_of_the_block((7, 8), torch.bfloat16)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_fp8_of_one_scale(shape):
    values = torch.randn(5, 7).to(torch.float8_e4m3fn)
    parts = {"": values, "_scale": torch.full(shape, 0.3, dtype=torch.bfloat16)}
    assert MatrixFp8().shape(parts) == (5, 7)
    expected = values.float() * torch.tensor(0.3, dtype=torch.bfloat16).float()
    assert torch.equal(MatrixFp8().dequantize(parts, torch.float32), expected)
    with pytest.raises(ShapeError, match=r"_scale is float32 \[5\]; it should be .* \[1\]"):
        MatrixFp8().shape({**parts, "_scale": torch.ones(5)})


def test_parts_that_do_not_fit_are_refused_before_they_are_read():
    byte = torch.zeros(3, 10, 2, 16, dtype=torch.uint8)
    with pytest.raises(ShapeError, match=r"_scales is uint8 \[3, 10\]; .* \[3, 10, 2\]"):
        Mxfp4().shape({"_blocks": byte, "_scales": byte[..., 0, 0]})
    with pytest.raises(ShapeError, match=r"_blocks is uint8 \[2, 16\]"):
        Mxfp4().shape({"_blocks": byte[0, 0], "_scales": byte[0, 0, :, 0]})
    values = torch.zeros(2, 5, 7, dtype=torch.float8_e4m3fn)
    form = BlockFp8((4, 3))
    assert form.shape({"": values, "_scale_inv": torch.ones(2, 2, 3)}) == (2, 5, 7)
    with pytest.raises(ShapeError, match=r"_scale_inv .*\[2, 3\]; it should be .*\[2, 2, 3\]"):
        form.shape({"": values, "_scale_inv": torch.ones(2, 3)})
    with pytest.raises(ShapeError, match="the weight is float32"):
        form.shape({"": values.float(), "_scale_inv": torch.ones(2, 2, 3)})
