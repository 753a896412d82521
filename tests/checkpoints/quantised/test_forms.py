"""Each form against its definition, number by number, and what it refuses."""

import json
import math

import pytest
import torch

from moestro.checkpoints.quantised import bitsandbytes, scaling
from moestro.checkpoints.quantised.awq import Awq
from moestro.checkpoints.quantised.bitsandbytes import Fp4, Nf4
from moestro.checkpoints.quantised.compressed_tensors import PackedInts, Weights, WholeValues
from moestro.checkpoints.quantised.gptq import Gptq
from moestro.checkpoints.quantised.methods import reading
from moestro.errors import CheckpointError, ShapeError

from . import packing

GENERATOR = torch.Generator().manual_seed(0)


def any_words(*shape):
    return torch.randint(-(2**31), 2**31, shape, generator=GENERATOR).int()


def some_scales(*shape, dtype=torch.float16):
    return (torch.rand(shape, generator=GENERATOR) + 0.1).to(dtype)


def field(word, place, bits):
    """The value at a place of a word."""
    return ((word % 2**32) >> (bits * place)) & (2**bits - 1)


@pytest.fixture(params=[64, 1 << 18])
def at_once(request, monkeypatch):
    """Many goes or one give the same."""
    monkeypatch.setattr(scaling, "_NUMBERS_AT_ONCE", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", ["as_it_is", "g_idx", "act_order"])
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 32), (4, -1), (8, 8), (8, -1), (4, 20)])
def test_gptq(bits, group, order, version, dtype, at_once):
    """Version 1: any zero point but 0 lies in its place, less one."""
    height, width, per = 24, 48, 32 // bits
    groups = 1 if group == -1 else math.ceil(width / group)
    zeros = torch.randint(1, 2**bits, (groups, height), generator=GENERATOR)
    parts = {
        ".qweight": any_words(width // per, height),
        ".qzeros": packing.words(zeros - (1 if version == 1 else 0), bits),
        ".scales": some_scales(groups, height),
    }
    g = [0 if group == -1 else i // group for i in range(width)]
    if order != "as_it_is":
        if order == "act_order":
            g = torch.tensor(g)[torch.randperm(width, generator=GENERATOR)].tolist()
        parts[".g_idx"] = torch.tensor(g, dtype=torch.int32)
    form = Gptq(bits, group, version == 1)
    assert form.shape(parts) == (height, width)
    result = form.dequantize(parts, dtype)
    assert result.dtype == dtype
    for o in range(height):
        for i in range(width):
            value = field(int(parts[".qweight"][i // per, o]), i % per, bits)
            exact = (value - int(zeros[g[i], o])) * parts[".scales"][g[i], o].double()
            assert result[o, i] == exact.to(dtype)


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_of_version_1_takes_back_what_was_subtracted_from_the_word(bits):
    """A zero point of 0 borrows from the next, and the highest's goes out of the word."""
    zeros = torch.randint(0, 2, (2, 16), generator=GENERATOR)
    ones = sum(1 << place for place in range(0, 32, bits))
    less = (packing.words(zeros, bits).long() - ones) % 2**32
    parts = {
        ".qweight": torch.zeros(32 * bits // 32, 16, dtype=torch.int32),
        ".qzeros": (less - 2**32 * (less >= 2**31)).int(),
        ".scales": torch.ones(2, 16),
    }
    result = Gptq(bits, 16, less_one=True).dequantize(parts, torch.float32)
    assert torch.equal(result[:, 0], -zeros[0].float())
    assert torch.equal(result[:, 31], -zeros[1].float())


@pytest.mark.parametrize(("height", "width"), [(8, 8), (24, 8), (8, 48)])
@pytest.mark.parametrize("pack", [packing.gptq, packing.awq, packing.packed_ints])
def test_one_word_a_row(pack, height, width):
    parts, numbers = pack(torch.randn(height, width, generator=GENERATOR), group=8)
    weights = Weights("int", 4, True, (1, 8))
    form = {packing.gptq: Gptq(4, 8, less_one=True), packing.awq: Awq(8)}.get(
        pack, PackedInts((weights,))
    )
    assert torch.equal(form.dequantize(parts, torch.float32), numbers)


@pytest.mark.parametrize("group", [16, -1])
def test_awq(group, at_once):
    height, width = 24, 48
    groups = 1 if group == -1 else width // group
    parts = {
        ".qweight": any_words(width, height // 8),
        ".qzeros": any_words(groups, height // 8),
        ".scales": some_scales(groups, height),
    }
    assert Awq(group).shape(parts) == (height, width)
    result = Awq(group).dequantize(parts, torch.float32)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # output of each place of a word
    for o in range(height):
        for i in range(width):
            g, place = 0 if group == -1 else i // group, order.index(o % 8)
            value = field(int(parts[".qweight"][i, o // 8]), place, 4)
            zero = field(int(parts[".qzeros"][g, o // 8]), place, 4)
            assert result[o, i] == (value - zero) * parts[".scales"][g, o].float()


@pytest.mark.parametrize("zeros", ["none", "packed", "whole"])
@pytest.mark.parametrize(("bits", "group", "order"), [(4, 10, False), (8, 6, True), (4, 50, False)])
def test_packed_ints(bits, group, order, zeros, at_once):
    """50 columns do not fill their words, nor 13 rows those of the zero points."""
    height, width, per = 13, 50, 32 // bits
    groups = math.ceil(width / group)
    parts = {
        ".weight_packed": any_words(height, math.ceil(width / per)),
        ".weight_scale": some_scales(height, groups, dtype=torch.bfloat16),
        ".weight_shape": torch.tensor([height, width]),
    }
    whole = torch.zeros(height, groups, dtype=torch.int8)
    if zeros == "packed":
        parts[".weight_zero_point"] = any_words(math.ceil(height / per), groups)
    elif zeros == "whole":
        half = 2 ** (bits - 1)
        whole = torch.randint(-half, half, whole.shape, generator=GENERATOR).to(torch.int8)
        parts[".weight_zero_point"] = whole
    g = [i // group for i in range(width)]
    if order:
        g = torch.tensor(g)[torch.randperm(width, generator=GENERATOR)].tolist()
        parts[".weight_g_idx"] = torch.tensor(g, dtype=torch.int32)
    kinds = (Weights("int", 4, True, (1, 7)), Weights("int", bits, zeros == "none", (1, group)))
    form = PackedInts(kinds)
    assert form.shape(parts) == (height, width)
    result = form.dequantize(parts, torch.float32)
    for o in range(height):
        for i in range(width):
            value = field(int(parts[".weight_packed"][o, i // per]), i % per, bits)
            zero = int(whole[o, g[i]]) + 2 ** (bits - 1)
            if zeros == "packed":
                zero = field(int(parts[".weight_zero_point"][o // per, g[i]]), o % per, bits)
            assert result[o, i] == (value - zero) * parts[".weight_scale"][o, g[i]].float()


def test_groups_that_were_never_set_are_in_order():
    parts, numbers = packing.packed_ints(torch.randn(8, 32, generator=GENERATOR))
    form = PackedInts((Weights("int", 4, True, (1, 16)),))
    unset = torch.full((32,), -1, dtype=torch.int32)
    assert torch.equal(form.dequantize({**parts, ".weight_g_idx": unset}, torch.float32), numbers)
    unset[3] = 0
    with pytest.raises(ShapeError, match="weight_g_idx names the group -1; there are 2"):
        form.dequantize({**parts, ".weight_g_idx": unset}, torch.float32)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("scale", "block"),
    [((), (None, None)), ((1,), (None, None)), ((13, 1), (1, None)), ((13,), (1, None)),
     ((13, 5), (1, 10)), ((4, 4), (4, 14))],
)  # fmt: skip
def test_whole_ints(scale, block, zeros, at_once):
    values = torch.randint(-128, 128, (13, 50), generator=GENERATOR).to(torch.int8)
    parts = {".weight": values, ".weight_scale": some_scales(*scale, dtype=torch.float32)}
    whole = torch.zeros(scale)
    if zeros:
        whole = torch.randint(-128, 128, scale, generator=GENERATOR).to(torch.int8)
        parts[".weight_zero_point"] = whole
    form = WholeValues((Weights("int", 8, not zeros, block),))
    assert form.shape(parts) == (13, 50)
    result = form.dequantize(parts, torch.float32)
    rows, columns = block[0] or 13, block[1] or 50
    for o in range(13):
        for i in range(50):
            at = (
                (o // rows, i // columns)[: len(scale)] if len(scale) != 1 or scale[0] > 1 else (0,)
            )
            difference = int(values[o, i]) - int(whole[at])
            assert result[o, i] == difference * parts[".weight_scale"][at]


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("shape", "block"), [((6, 64), 64), ((8, 40), 128), ((700, 64), 32)])
def test_nf4(shape, block, double, storage, monkeypatch):
    """The second and third form have blocks across rows, and more than one block of blocks."""
    monkeypatch.setattr(bitsandbytes, "_BYTES_AT_ONCE", 4096)
    parts, _ = packing.nf4(torch.randn(shape, generator=GENERATOR), block, double, storage)
    parts = {suffix.removeprefix(".weight"): part for suffix, part in parts.items()}
    assert Nf4().shape(parts) == shape
    result = Nf4().dequantize(parts, torch.float32).view(-1).tolist()
    data, table = parts[""].view(torch.uint8).view(-1).tolist(), parts[".quant_map"]
    state = json.loads(bytes(parts[".quant_state.bitsandbytes__nf4"].tolist()))
    for at in range(0, len(result), 7):
        byte = data[at // 2]
        code, largest = byte & 15 if at % 2 else byte >> 4, parts[".absmax"][at // block]
        if double:
            outer = parts[".nested_absmax"][at // block // 256]
            largest = parts[".nested_quant_map"][int(largest)] * outer + state["nested_offset"]
        assert result[at] == table[code] * largest


def test_an_odd_number_of_values():
    parts, numbers = packing.nf4(torch.randn(3, 5, generator=GENERATOR))
    parts = {suffix.removeprefix(".weight"): part for suffix, part in parts.items()}
    assert torch.equal(Nf4().dequantize(parts, torch.float32), numbers)


def test_fp4_has_another_table_and_key():
    parts, _ = packing.nf4(torch.randn(4, 64, generator=GENERATOR))
    parts = {suffix.removeprefix(".weight"): part for suffix, part in parts.items()}
    state = parts.pop(".quant_state.bitsandbytes__nf4")
    text = bytes(state.tolist()).replace(b"nf4", b"fp4")
    parts[".quant_state.bitsandbytes__fp4"] = torch.tensor(list(text), dtype=torch.uint8)
    parts[".quant_map"] = torch.arange(16.0)
    high = parts[""].view(-1) >> 4
    expected = high * parts[".absmax"].repeat_interleave(32)
    assert torch.equal(Fp4().dequantize(parts, torch.float32).view(-1)[::2], expected)


def read_form(name):
    """The form and parts of a small matrix that a packer makes."""
    settings, pack = packing.FORMS[name]
    forms = reading(settings).forms
    found, numbers = pack(torch.randn(24, 32, generator=GENERATOR))
    for form in forms:
        start = "" if form.tensor else ".weight"
        parts = {suffix.removeprefix(start): part for suffix, part in found.items()}
        if set(form.needed) <= parts.keys() <= {*form.needed, *form.optional}:
            return form, parts, numbers
    raise AssertionError(name)


@pytest.mark.parametrize("name", packing.FORMS)
def test_every_part_of_another_shape_or_dtype_is_refused(name):
    """Or it says that the tensor is another one, which is then held against the model."""
    form, parts, numbers = read_form(name)
    assert form.shape(parts) == numbers.shape
    assert torch.equal(form.dequantize(parts, torch.float32), numbers)
    refused = 0
    for suffix, part in parts.items():
        flat = part.reshape(-1)
        others = [part[None], part.to(torch.float64), part.bool(), flat.repeat(3)[: len(flat) + 1]]
        if len(flat) > 1:
            others += [part[:-1], flat[0]]
        for other in others:
            changed = {**parts, suffix: other}
            try:
                shape = form.shape(changed)
            except ShapeError:
                refused += 1
                with pytest.raises(ShapeError):
                    form.dequantize(changed, torch.float32)
                continue
            if shape == numbers.shape:  # the same bytes, or the one number, in another shape
                assert other.shape != part.shape
                assert torch.equal(form.dequantize(changed, torch.float32), numbers)
    assert refused >= 4 * len(parts)


@pytest.mark.parametrize("name", packing.FORMS)
def test_a_target_of_any_strides_is_filled(name):
    form, parts, numbers = read_form(name)
    around = torch.zeros(numbers.shape[1], 2 * numbers.shape[0] + 1, dtype=torch.float64)
    form.fill(parts, around[:, 1::2].T)
    assert torch.equal(around[:, 1::2].T, numbers.double())
    assert not around[:, ::2].any()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (b"{", "no JSON"), (b"[1]", r"quant_state is \[1\]"), (b'{"colour": 1}', "colour"),
        (b'{"shape": [24, 32, 1]}', r"shape \[24, 32, 1\]"), (b'{"shape": null}', "shape None"),
        (b'{"shape": [24, true]}', "True"), (b'{"shape": [-24, -32]}', "-24"),
        (b'{"shape": [24, 32], "quant_type": "fp4"}', "quant_type 'fp4' under a key of nf4"),
        (b'{"shape": [24, 32], "quant_type": "nf4", "blocksize": 2147483648}', "2147483648"),
        (b'{"shape": [24, 32], "quant_type": "nf4", "blocksize": 0}', r"blocks of \[0\]"),
        (b'{"shape": [24, 33], "quant_type": "nf4", "blocksize": 64}', "384 bytes; .* 396"),
        (b'{"shape": [24, 32], "quant_type": "nf4", "blocksize": 32}', r"absmax .*\[12\].*\[24\]"),
    ],
)  # fmt: skip
def test_facts_of_nf4_that_do_not_fit_are_refused(facts, message):
    form, parts, _ = read_form("nf4")
    parts[".quant_state.bitsandbytes__nf4"] = torch.tensor(list(facts), dtype=torch.uint8)
    with pytest.raises(ShapeError, match=message):
        form.shape(parts)


def test_half_of_double_quantisation_is_refused():
    form, parts, _ = read_form("nf4_double")
    del parts[".nested_quant_map"]
    with pytest.raises(ShapeError, match="go together"):
        form.shape(parts)


@pytest.mark.parametrize("value", [-1, 2, 2**31 - 1])
def test_groups_out_of_range_are_refused(value):
    form, parts, _ = read_form("gptq_order")
    parts[".g_idx"][5] = value
    with pytest.raises(ShapeError, match=f"g_idx names the group {value}; there are 2, from 0 on"):
        form.dequantize(parts, torch.float32)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("packed_zeros", {".weight_zero_point": None}, "not symmetric have no weight_zero_point"),
        ("packed_zeros", {".weight_g_idx": None}, "actorder group have no weight_g_idx"),
        ("packed_int4", {".weight_shape": torch.tensor([24, 64])}, "columns . bits / 32. for 4"),
        ("packed_int4", {".weight_shape": torch.tensor([-24, 32])}, r"\[-24, 32\]"),
        ("packed_int4", {".weight_scale": torch.ones(24, 3)}, r"scales \[24, 3\]; .* \[24, 2\]"),
        ("int8_rows", {".weight_scale": torch.ones(24, 2)}, r"scales \[24, 2\]; .*\[24, 1\] or"),
        ("fp8_rows", {".weight": torch.ones(24, 32).to(torch.int8)}, "no such weights"),
        ("fp8_rows", {".weight_scale": torch.ones(24, 1).char()}, "weight_scale is torch.int8"),
    ],
)
def test_compressed_tensors_refuses_what_is_not_described(name, changes, message):
    form, parts, _ = read_form(name)
    parts = {key: part for key, part in {**parts, **changes}.items() if part is not None}
    with pytest.raises(ShapeError, match=message):
        form.shape(parts)


def test_bits_that_both_fit_are_refused():
    """Three columns fill one word of either size."""
    parts, _ = packing.packed_ints(torch.randn(8, 3, generator=GENERATOR), 4, -1)
    kinds = [Weights("int", bits, True, (1, None)) for bits in (4, 8)]
    assert PackedInts((kinds[0],)).shape(parts) == (8, 3)
    with pytest.raises(ShapeError, match="for 4 and 8 bits"):
        PackedInts(tuple(kinds)).shape(parts)


def test_settings_alone_are_refused_too():
    with pytest.raises(CheckpointError, match="group_size 0"):
        reading(packing.gptq_settings(group=0))
