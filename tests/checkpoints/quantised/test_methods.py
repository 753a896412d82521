"""What config.json says of quantised weights: which forms that means, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moestro.checkpoints.families.table import OF_MATRICES
from moestro.checkpoints.quantised.awq import Awq
from moestro.checkpoints.quantised.compressed_tensors import Weights
from moestro.checkpoints.quantised.form import Quantised, join
from moestro.checkpoints.quantised.fp8 import BlockFp8, MatrixFp8
from moestro.checkpoints.quantised.gptq import Gptq
from moestro.checkpoints.quantised.methods import find_sources, quantisation, reading
from moestro.checkpoints.tensor_files import Stored
from moestro.errors import CheckpointError

from . import packing

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
GPTQ, AWQ, BNB = packing.gptq_settings(), packing.AWQ, packing.BNB


def compressed(**changes):
    return packing.compressed("pack-quantized", group_size=128) | changes


def weights(**changes):
    settings = packing.compressed("pack-quantized", group_size=128)
    settings["config_groups"]["group_0"]["weights"] |= changes
    return settings


def stored(key, shape=(2, 3), dtype=torch.float32):
    return Stored(Path("model.safetensors"), key, dtype, shape, 4 * 6, 0)


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        (GPTQ, Gptq(4, 16, less_one=True, symmetric=True)),
        ({**GPTQ, "checkpoint_format": "gptq"}, Gptq(4, 16, less_one=True, symmetric=True)),
        ({**GPTQ, "checkpoint_format": "gptq_v2", "format": "gptq_v2", "bits": 8, "group_size": -1},
         Gptq(8, -1, less_one=False, symmetric=True)),
        ({**GPTQ, "dynamic": {r"-:.*mlp\.gate.*": {}}}, Gptq(4, 16, less_one=True, symmetric=True)),
        ({**AWQ, "version": "GEMM", "modules_to_not_convert": ["gate"]}, Awq(16)),
        ({**GPTQ, "sym": False, "desc_act": True}, Gptq(4, 16, less_one=True, reordered=True)),
        (FP8, BlockFp8((128, 128))),
    ],
)  # fmt: skip
def test_the_form_that_is_described(settings, form):
    assert reading(settings).forms == (form,)


def test_fp8_without_blocks_has_one_scale():
    (form,) = reading({"quant_method": "fp8", "activation_scheme": "dynamic"}).forms
    assert isinstance(form, MatrixFp8)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Weights("int", 4, True, (1, 128))),
        ({"strategy": None}, Weights("int", 4, True, (1, 128))),
        ({"strategy": None, "group_size": -1}, Weights("int", 4, True, (1, None))),
        ({"strategy": None, "group_size": None}, Weights("int", 4, True, (None, None))),
        ({"symmetric": False, "actorder": "group"}, Weights("int", 4, False, (1, 128), True)),
        ({"actorder": "weight", "num_bits": 8}, Weights("int", 8, True, (1, 128))),
        ({"actorder": True, "strategy": "channel"}, Weights("int", 4, True, (1, None))),
        (
            {"type": "float", "num_bits": 8, "strategy": "block", "block_structure": [128, 64]},
            Weights("float", 8, True, (128, 64)),
        ),
    ],
)
def test_weights_of_compressed_tensors(changes, expected):
    for form in reading(weights(**changes)).forms:
        assert form.weights == (expected,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "hqq"}, "quant_method 'hqq'; read are awq, bitsandbytes"),
        ("gptq", "quant_method 'gptq'"),
        ({}, "quant_method None"),
        ({"quant_method": ["gptq"]}, r"quant_method \['gptq'\]"),
        ({**FP8, "bits": 8}, "unknown fields for fp8: bits"),
        ({**FP8, "fmt": "e5m2"}, "fmt 'e5m2'"),
        ({**FP8, "weight_block_size": [128]}, r"weight_block_size \[128\]"),
        ({**FP8, "weight_block_size": [0, 128]}, r"weight_block_size \[0, 128\]"),
        ({**FP8, "weight_block_size": [True, 128]}, r"weight_block_size \[True, 128\]"),
        ({"quant_method": "mxfp4", "bits": 4}, "unknown fields for mxfp4: bits"),
        ({**GPTQ, "bits": 3}, "bits 3; read is 4 or 8"),
        ({**GPTQ, "bits": "4"}, "bits '4'"),
        ({**GPTQ, "bits": True}, "bits True"),
        ({**GPTQ, "group_size": 0}, "group_size 0"),
        ({**GPTQ, "group_size": -2}, "group_size -2"),
        ({**GPTQ, "group_size": [128]}, r"group_size \[128\]"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'; read is 'gptq' or"),
        ({**GPTQ, "checkpoint_format": ["gptq"]}, "checkpoint_format"),
        ({**GPTQ, "checkpoint_format": "gptq_v2", "format": "gptq"}, "'gptq and gptq_v2'"),
        ({**GPTQ, "is_marlin_format": True}, "is_marlin_format True"),
        ({**GPTQ, "pack_dtype": "int16"}, "pack_dtype 'int16'"),
        ({**GPTQ, "rotation": "hadamard"}, "rotation 'hadamard'"),
        ({**GPTQ, "method": "qqq"}, "method 'qqq'"),
        ({**GPTQ, "colour": "blue"}, "unknown fields for gptq: colour"),
        ({**GPTQ, "dynamic": {r"+:.*\.18\..*": {"bits": 8}}}, r"dynamic .*'bits': 8"),
        ({**AWQ, "bits": 8}, "bits 8; read is 4"),
        ({**AWQ, "version": "gemv"}, "version 'gemv'; read is 'gemm'"),
        ({**AWQ, "version": "marlin"}, "version 'marlin'"),
        ({**AWQ, "backend": "llm-awq"}, "backend 'llm-awq'"),
        ({**BNB, "load_in_8bit": True}, "load_in_8bit True"),
        ({**BNB, "bnb_5bit": 1}, "unknown fields for bitsandbytes: bnb_5bit"),
        (compressed(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
        (compressed(format="marlin-24"), "format 'marlin-24'"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
        (compressed(transform_config={"config_groups": {"u": {}}}), "transform_config"),
        (compressed(config_groups={"W4A16": ["Linear"]}), r"config_groups.W4A16 \['Linear'\]"),
        (compressed(config_groups={}), "config_groups"),
        (compressed(colour=1), "unknown fields for compressed-tensors: colour"),
        (weights(num_bits=3), "num_bits 3"),
        (weights(type="float"), "num_bits 4; read is 8"),
        (weights(type="complex"), "type 'complex'"),
        (weights(strategy="tensor_group"), "strategy 'tensor_group'"),
        (weights(strategy=["group"]), "strategy"),
        (weights(strategy="block"), "block_structure None"),
        (weights(group_size=None), "group_size None"),
        (weights(dynamic=True), "dynamic True"),
        (weights(actorder="random"), "actorder 'random'"),
        (weights(actorder=["group"]), "actorder"),
        (weights(lut=[1]), "unknown fields for weights of compressed-tensors: lut"),
    ],
)
def test_others_are_refused(settings, message):
    with pytest.raises(CheckpointError, match=message):
        reading(settings)


def test_families_name_the_methods_there_are():
    assert set(OF_MATRICES) < {"mxfp4", *OF_MATRICES}
    for method in (*OF_MATRICES, "mxfp4"):
        with pytest.raises(CheckpointError) as refused:
            reading({"quant_method": method, "colour": "blue"})
        assert f"unknown fields for {method}: colour" in str(refused.value)
    assert quantisation({"quantization_config": GPTQ}).words == "GPTQ in 4 bits"


def test_without_quantization_config_nothing_is_joined():
    plain = {key: stored(key) for key in ("a.qweight", "a.weight")}
    assert find_sources(plain, {}) == plain


def test_keys_are_joined_in_their_order():
    keys = ["z.weight", "a.weight_scale_inv", "norm.weight", "a.weight", "b.input_scale"]
    of = {key: stored(key) for key in keys}
    of["a.weight"] = replace(of["a.weight"], dtype=torch.float8_e4m3fn)
    of["a.weight_scale_inv"] = replace(of["a.weight_scale_inv"], shape=(1, 1))
    found = find_sources(of, {"quantization_config": FP8})
    assert list(found) == ["z.weight", "a.weight", "norm.weight"]
    joined = found["a.weight"]
    assert isinstance(joined, Quantised)
    assert (joined.shape, joined.dtype, joined.bytes) == ((2, 3), None, 48)


@pytest.mark.parametrize(
    ("keys", "settings", "message"),
    [
        (["a.weight_scale_inv"], FP8, "has a.weight_scale_inv but lacks a.weight"),
        (["m.up_blocks"], {"quant_method": "mxfp4"}, "has m.up_blocks but lacks m.up_scales"),
        (["m.up_scales"], {"quant_method": "mxfp4"}, "has m.up_scales but lacks m.up_blocks"),
        (["a.qweight", "a.scales"], AWQ, "has a.qweight but lacks a.qzeros"),
        (["a.g_idx"], GPTQ, "has a.g_idx but lacks a.qweight"),
        (["a.weight", "a.weight_zero_point"], compressed(), "_zero_point but lacks a.weight_scale"),
        (["a.weight_packed", "a.weight_scale"], compressed(), "lacks a.weight_shape"),
        (["a.weight", "a.weight.quant_map"], BNB, "has a.weight.quant_map but lacks a.weight.abs"),
    ],
)
def test_half_a_pair_is_refused(keys, settings, message):
    with pytest.raises(CheckpointError, match=message):
        join({key: stored(key) for key in keys}, reading(settings).forms)
