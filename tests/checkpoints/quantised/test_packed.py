"""Quantised checkpoints in packed kinds that hold their integers: exactly, or by how much not."""

import re
import warnings

import pytest
import torch

from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.quantised.awq import Awq
from moestro.checkpoints.quantised.bitsandbytes import Nf4
from moestro.checkpoints.quantised.compressed_tensors import PackedInts, Weights, WholeValues
from moestro.checkpoints.quantised.gptq import Gptq
from moestro.checkpoints.quantised.mxfp4 import Mxfp4
from moestro.errors import CheckpointError, ShapeError
from moestro.kernels import native_cpu
from moestro.kernels.packing import EXACT, Format
from moestro.moe.packed import Packed

from ..families import tiny
from ..families.test_quantized_checkpoints import rewrite, to_mxfp4
from . import packing
from .test_models import even, quantise

pytestmark = pytest.mark.skipif(native_cpu.available() is not None, reason="no native library")
ROWS = 20  # no multiple of 32


class Given:
    """What a form gives, for the packer."""

    def __init__(self, rows) -> None:
        self.given, self.rounding = rows, torch.zeros(2, dtype=torch.float64)

    def rows(self, name, entry=None):
        return [self.given]


def packed(form, parts, kind):
    """The numbers of a form's blocks once packed, and what it says that it adds."""
    rows, added = form.rows(parts)
    height = len(rows.data)
    made = native_cpu.pack_matrix(
        torch.empty(height, rows.columns), Format(kind), None, Given(rows)
    )
    return native_cpu.unpack_matrix(made), added


def ints(bits, symmetric, group, kind=PackedInts):
    return kind((Weights("int", bits, symmetric, (1, None if group == -1 else group)),))


EXACTLY = [
    ("int4", lambda g: (Gptq(4, g, True, True), packing.gptq(weight(), 4, g)[0])),
    ("int4", lambda g: (Gptq(4, g, False, True), packing.gptq(weight(), 4, g, version=2)[0])),
    ("int4", lambda g: (ints(4, True, g), packing.packed_ints(weight(), 4, g)[0])),
    ("int8", lambda g: (Gptq(8, g, True, True), packing.gptq(weight(), 8, g)[0])),
    ("int8", lambda g: (ints(8, True, g), packing.packed_ints(weight(), 8, g)[0])),
]


def weight(rows=24, columns=256):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * 0.05


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize(("kind", "make"), EXACTLY)
def test_groups_of_integers_are_kept_exactly(kind, make, group):
    form, parts = make(group)
    assert form.in_blocks
    assert form.blocks(parts) in EXACT[kind]
    numbers, added = packed(form, parts, kind)
    assert torch.equal(numbers, form.dequantize(parts, torch.float32))
    assert added == (0.0, 0.0)


def test_whole_int8_is_kept_exactly():
    weights = Weights("int", 8, True, (1, None))
    form = WholeValues((weights,))
    parts, _ = packing.whole_ints(weight(ROWS))
    parts[".weight_scale"] = parts[".weight_scale"].bfloat16()
    numbers, added = packed(form, parts, "int8")
    assert torch.equal(numbers, form.dequantize(parts, torch.float32))
    assert added == (0.0, 0.0)
    parts[".weight_scale"] = parts[".weight_scale"].float() * 1.0001  # more bits than fp16 has
    check_measured(form, parts, "int8", 5e-4)


def check_measured(form, parts, kind, most):
    """What it says is what it adds: (0, 0) where it is exact."""
    numbers, (squared, whole) = packed(form, parts, kind)
    exact = form.dequantize(parts, torch.float32).double()
    off = numbers.double() - exact
    found = torch.tensor([squared, whole], dtype=torch.float64)
    expected = torch.stack([off.square().sum(), exact.square().sum()]) * off.any()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    assert squared <= whole * most**2


ZEROS = [
    lambda g: (Gptq(4, g, True), packing.gptq(weight(), 4, g, symmetric=False)[0]),
    lambda g: (Awq(g), packing.awq(weight(), g)[0]),
    lambda g: (ints(4, False, g), packing.packed_ints(weight(), 4, g, symmetric=False)[0]),
]


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("make", ZEROS)
def test_zero_points_round_the_minimum_alone(make, group):
    form, parts = make(group)
    # A minimum is at most 15 scales, so it moves by at most 2^-12 of 16; weights are 4 on average.
    check_measured(form, parts, "uint4", 2.0**-10)


def test_zero_points_that_fp16_holds_are_exact():
    """Powers of two times a scale are fp16 as it is."""
    parts, _ = packing.awq(weight(), 64)
    form = Awq(64)
    ones = sum(8 << place for place in range(0, 32, 4)) - (1 << 32)
    parts[".qzeros"] = torch.full_like(parts[".qzeros"], ones)
    numbers, added = packed(form, parts, "uint4")
    assert torch.equal(numbers, form.dequantize(parts, torch.float32))
    assert added == (0.0, 0.0)


@pytest.mark.parametrize("double", [False, True])
def test_nf4_rounds_its_table(double):
    parts, _ = packing.nf4(weight(), double=double)
    form = Nf4()
    own = {suffix.removeprefix(".weight"): part for suffix, part in parts.items()}
    check_measured(form, own, "nf4", 7e-3)
    own[".quant_map"] = own[".quant_map"] ** 3
    with pytest.raises(ShapeError, match="not the table of NF4"):
        form.rows(own)


def test_mxfp4_is_kept_exactly():
    blocks = torch.randint(0, 256, (ROWS, 3, 16), dtype=torch.uint8)
    scales = torch.randint(110, 130, (ROWS, 3), dtype=torch.uint8)
    form, parts = Mxfp4(), {"_blocks": blocks, "_scales": scales}
    exact = form.dequantize(parts, torch.float32).T
    for kind in ("mxfp4", "int8"):
        numbers, added = packed(form, parts, kind)
        assert torch.equal(numbers, exact)
        assert added == (0.0, 0.0)


@pytest.mark.parametrize(
    "form",
    [
        Gptq(4, 16, True, True), Gptq(4, 128, True, True, reordered=True), Gptq(8, 128, True),
        Awq(48), ints(4, True, 16), ints(8, False, 32),
    ],
)  # fmt: skip
def test_what_no_kind_holds(form):
    assert not form.in_blocks


def test_a_width_of_no_whole_blocks():
    parts, _ = packing.gptq(weight(24, 80), group=-1)
    assert Gptq(4, -1, True, True).blocks(parts) is None


def test_settings_that_the_values_deny():
    parts, _ = packing.gptq(weight(), 4, 32, symmetric=False)
    with pytest.raises(ShapeError, match=r"settings call symmetric have -8 to 7"):
        Gptq(4, 32, True, True).rows(parts)
    parts, _ = packing.gptq(weight(), 4, 32, act_order=True)
    with pytest.raises(ShapeError, match="groups of another order; --weights int8 reads them"):
        Gptq(4, 32, True, True).rows(parts)


# Of whole models.

MODELS = {
    "gptq": (packing.gptq_settings(4, 32), lambda w: packing.gptq(w, 4, 32), "int4", 0),
    "awq": ({**packing.AWQ, "group_size": 32}, lambda w: packing.awq(w, 32), "uint4", 0.1),
    "int8": (*packing.FORMS["packed_int8"], "int8", 0),
    "nf4": (*packing.FORMS["nf4"], "nf4", 0.7),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_keeps_its_integers(name, tmp_path, monkeypatch):
    settings, pack, kind, most = MODELS[name]
    even("qwen3_moe", tmp_path / "plain", monkeypatch)
    matrices = quantise(tmp_path / "plain", tmp_path / "packed", settings, pack)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = open_checkpoint(tmp_path / "packed").model
    texts = [str(one.message) for one in said]
    found = [re.search(r"packed in another form.*error of ([\d.]+) %", text) for text in texts]
    assert len(found) == (most > 0)
    assert all(0 < float(match[1]) < most for match in found)
    modules = {path: each for path, each in ours.named_modules() if isinstance(each, Packed)}
    kinds = {path: each.weights.format.kind for path, each in modules.items()}
    assert set(kinds.values()) == {kind, "bfloat16"}
    assert [path for path in kinds if kinds[path] == "bfloat16"] == ["head"]
    assert len(matrices) > len(modules)  # of which several are one module
    plain = open_checkpoint(tmp_path / "plain", dtype="float32").model
    experts = plain.blocks[1].ffn.experts
    up, down = native_cpu.unpack_expert(ours.blocks[1].ffn.experts.weights, 1)
    for packed_one, exact in ((up, experts.gate_up[1]), (down, experts.down[1])):
        if most:
            assert (packed_one - exact).abs().max() < 0.02 * exact.abs().max()
        else:
            assert torch.equal(packed_one, exact)
    again = open_checkpoint(tmp_path / "packed").model  # from the kept file
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, ours(tokens).logits)


@pytest.mark.parametrize("weights", ["as-is", "int8"])
def test_mxfp4_of_gpt_oss_stays_what_it_is(weights, tmp_path):
    tiny.save(tiny.build("gpt_oss_even"), tmp_path)
    rewrite(tmp_path, to_mxfp4, quantization_config={"quant_method": "mxfp4"})
    plain = open_checkpoint(tmp_path, dtype="float32").model.blocks[0].ffn.experts
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = open_checkpoint(tmp_path, weights=weights, keep=False).model.blocks[0].ffn.experts
    assert ours.weights.format.kind == ("mxfp4" if weights == "as-is" else "int8")
    for e in range(4):
        up, down = native_cpu.unpack_expert(ours.weights, e)
        assert torch.equal(up, plain.gate_up[e])
        assert torch.equal(down, plain.down[e])
    assert torch.equal(ours.weights.up_bias, plain.gate_up_bias)


def test_settings_that_deny_the_values_name_the_tensor(tmp_path, monkeypatch):
    even("qwen3_moe", tmp_path / "plain", monkeypatch)
    pack = lambda w: packing.gptq(w, 4, 32, symmetric=False)  # noqa: E731
    quantise(tmp_path / "plain", tmp_path / "packed", packing.gptq_settings(4, 32), pack)
    with pytest.raises(CheckpointError, match=r"layers\.0.*weight: values are -?\d+ to \d+ from"):
        open_checkpoint(tmp_path / "packed")
