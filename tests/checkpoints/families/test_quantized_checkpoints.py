"""Checkpoints in MXFP4 and fp8: the models that transformers makes of the same bytes."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from moestro.checkpoints.families import FAMILIES
from moestro.checkpoints.families.translate import to_fields
from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.reading import read_settings
from moestro.checkpoints.writing import write_pretrained
from moestro.errors import CheckpointError, ConfigError

from . import tiny

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

BLOCK = 2
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}


def rewrite(folder, change, **fields):
    """Change the tensors and config.json of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def to_mxfp4(tensors):
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, width_in, width_out = tensors.pop(key).shape
        rows = (experts, width_out, width_in // 32)
        tensors[f"{key}_blocks"] = torch.randint(0, 256, (*rows, 16), dtype=torch.uint8)
        tensors[f"{key}_scales"] = torch.randint(122, 126, rows, dtype=torch.uint8)


def to_fp8(tensors):
    """What DeepSeek-V3 keeps in fp8: all projections, but neither router, embedding nor head."""
    for key in [key for key in tensors if "_proj" in key and tensors[key].dim() == 2]:
        weight_OI = tensors[key]
        rows, columns = (-(-side // BLOCK) for side in weight_OI.shape)
        scales = torch.rand(rows, columns) * 0.004 + 0.001
        spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        values = (weight_OI / spread).clamp(-448, 448)
        tensors[key] = values.to(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = scales


def from_fp8(tensors):
    """By transformers' code; its loader for fp8 needs another package."""
    for key in [key for key in tensors if key.endswith("_scale_inv")]:
        name = key.removesuffix("_scale_inv")
        scales = tensors.pop(key)
        tensors[name] = Fp8Dequantize(None)._dequantize_one(tensors[name], scales, torch.float32)


@torch.no_grad()
def agree(ours, theirs):
    tokens_BS = torch.randint(0, tiny.VOCABULARY, (2, 19))
    expected = theirs(tokens_BS).logits
    scale = expected.abs().max()
    assert scale > 0.5
    torch.testing.assert_close(ours(tokens_BS).logits / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.fixture
def gpt_oss(tmp_path):
    folder = tmp_path / "gpt_oss"
    tiny.save(tiny.build("gpt_oss_even"), folder)
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    rewrite(folder, to_mxfp4, quantization_config=settings)
    return folder


@pytest.fixture
def deepseek(tmp_path):
    folder = tmp_path / "deepseek"
    tiny.save(tiny.build("deepseek_v3"), folder)
    rewrite(folder, to_fp8, quantization_config=FP8)
    return folder


def test_mxfp4(gpt_oss, tmp_path):
    read = open_checkpoint(gpt_oss, dtype=torch.float32)
    dequantize = tiny.transformers.Mxfp4Config(dequantize=True)
    theirs = tiny.load(gpt_oss, quantization_config=dequantize, dtype=torch.float32)
    agree(read.model, theirs)
    write_pretrained(read.model, tmp_path / "plain", hf_config=read.hf_config)
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    agree(read.model, tiny.load(tmp_path / "plain"))


def test_mxfp4_in_bfloat16_is_exact(gpt_oss):
    """Four bits times a power of two fit: nothing is lost in the dtype of the published rest."""
    wide = open_checkpoint(gpt_oss, dtype=torch.float32).model
    narrow = open_checkpoint(gpt_oss, dtype=torch.bfloat16).model
    for block, other in zip(wide.blocks, narrow.blocks, strict=True):
        assert other.ffn.experts.gate_up.dtype == torch.bfloat16
        assert torch.equal(block.ffn.experts.gate_up, other.ffn.experts.gate_up.float())
        assert torch.equal(block.ffn.experts.down, other.ffn.experts.down.float())


def test_fp8(deepseek, tmp_path):
    read = open_checkpoint(deepseek, dtype=torch.float32)
    write_pretrained(read.model, tmp_path / "plain", hf_config=read.hf_config)
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    rewrite(deepseek, from_fp8, quantization_config=None)
    theirs = tiny.load(deepseek)
    agree(read.model, theirs)
    agree(read.model, tiny.load(tmp_path / "plain"))


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3", "glm4_moe", "glm4_moe_lite"])
def test_fp8_of_any_family(name, tmp_path):
    """Qwen publishes it too, and tools make it of others."""
    folder = tmp_path / name
    tiny.save(tiny.build(name), folder)
    rewrite(folder, to_fp8, quantization_config=FP8)
    read = open_checkpoint(folder, dtype=torch.float32)
    rewrite(folder, from_fp8, quantization_config=None)
    agree(read.model, tiny.load(folder))


def to_fp8_by_matrix(tensors):
    """What AutoFP8 makes of Mixtral: one scale for each matrix, and others for activations."""
    for key in [key for key in tensors if ".experts." in key or "self_attn" in key]:
        scale = tensors[key].abs().max() / 448
        tensors[key] = (tensors[key] / scale).to(torch.float8_e4m3fn)
        tensors[f"{key}_scale"] = scale
        tensors[key.replace(".weight", ".input_scale")] = torch.tensor(0.5)
    tensors["model.layers.0.self_attn.k_scale"] = torch.tensor(2.0)


def test_fp8_with_one_scale_per_matrix(tmp_path):
    theirs = tiny.build("mixtral")
    tiny.save(theirs, tmp_path)
    settings = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    rewrite(tmp_path, to_fp8_by_matrix, quantization_config=settings)
    read = open_checkpoint(tmp_path, dtype=torch.float32)

    def back(tensors):
        for key in [key for key in tensors if key.endswith(".weight_scale")]:
            scale, name = tensors.pop(key), key.removesuffix("_scale")
            tensors[name] = tensors[name].float() * scale
        for key in [key for key in tensors if key.endswith("_scale")]:
            del tensors[key]

    rewrite(tmp_path, back, quantization_config=None)
    agree(read.model, tiny.load(tmp_path))


def to_fp8_stacks(tensors):
    for key in [key for key in tensors if ".mlp.experts." in key]:
        stack = tensors.pop(key)
        each = [{key: matrix.clone()} for matrix in stack]
        for one in each:
            to_fp8(one)
        for name in each[0]:
            # torch does not stack fp8.
            bits = torch.stack([one[name].view(torch.uint8) for one in each])
            tensors[name] = bits.view(each[0][name].dtype)


def test_fp8_of_fused_experts(tmp_path):
    theirs = tiny.build("qwen3_moe")
    theirs.save_pretrained(tmp_path, save_original_format=False)
    rewrite(tmp_path, to_fp8_stacks, quantization_config=FP8)
    read = open_checkpoint(tmp_path, dtype=torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    for n, block in enumerate(read.model.blocks):
        key = f"model.layers.{n}.mlp.experts.down_proj"
        for e, down in enumerate(block.ffn.experts.down):
            values, scales = stored[key][e], stored[f"{key}_scale_inv"][e]
            plain = Fp8Dequantize(None)._dequantize_one(values, scales, torch.float32)
            assert torch.equal(down, plain)

    def fewer(tensors):
        key = "model.layers.1.mlp.experts.down_proj_scale_inv"
        tensors[key] = tensors[key][:2].clone()

    rewrite(tmp_path, fewer)
    with pytest.raises(CheckpointError, match=r"down_proj: _scale_inv is float32 \[2, 24, 7\]"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quantization_config": {"quant_method": "hqq", "bits": 4}}, "hqq in 4 bits"),
        ({"quantization_config": {"quant_method": "modelopt"}}, "ModelOpt"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "MXFP4"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX in 4 bits"),
        ({"quantization_config": {"group_size": 64, "bits": 6}}, "MLX in 6 bits"),
        ({"quantization_config": {"quant_method": "of_tomorrow"}}, "of_tomorrow"),
        ({"quantization_config": {"colour": "blue"}}, "an unnamed method"),
    ],
)
def test_other_quantisations_are_named_and_refused_where_weights_are_read(fields, words, tmp_path):
    """Their settings are read all the same: planning needs no weights."""
    tiny.save(tiny.build("qwen3_moe"), tmp_path)
    cfg = read_settings(tmp_path, for_weights=False).cfg
    rewrite(tmp_path, lambda tensors: None, **fields)
    for use in (open_checkpoint, read_settings):
        with pytest.raises(
            ConfigError, match=f"quantised by {words}; read for qwen3_moe: awq, .*gptq, or"
        ):
            use(tmp_path)
    described = read_settings(tmp_path, for_weights=False)
    assert described.cfg == cfg
    assert not to_fields(FAMILIES["qwen3_moe"], cfg, described.fields).keys() & fields.keys()


def test_selection_biases_stay_exact_in_bfloat16(deepseek):
    stored = load_file(deepseek / "model.safetensors")
    model = open_checkpoint(deepseek, dtype=torch.bfloat16).model
    for n in (1, 2):
        expected = stored[f"model.layers.{n}.mlp.gate.e_score_correction_bias"]
        assert torch.equal(model.blocks[n].ffn.router.bias, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.experts.down_proj_scales"),
            "lacks .*down_proj_scales",
        ),
        (
            lambda t: t.pop("model.layers.1.mlp.experts.down_proj_blocks"),
            "lacks .*down_proj_blocks",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.down_proj_scales": torch.zeros(2, 3)}),
            "down_proj",
        ),
    ],
)
def test_a_broken_pair_is_refused(gpt_oss, change, message):
    rewrite(gpt_oss, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(gpt_oss)


def test_a_quantisation_that_the_tensors_do_not_have_is_refused(gpt_oss):
    rewrite(gpt_oss, lambda tensors: None, quantization_config=FP8)
    with pytest.raises(CheckpointError, match=r"unknown .*down_proj_blocks"):
        open_checkpoint(gpt_oss)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("glm4_moe", "model.layers.3.shared_head.norm.weight"),
        ("glm4_moe_lite", "model.layers.3.eh_proj.weight"),
        ("ernie4_5_moe", "model.mtp_emb_norm.0.weight"),
    ],
)
def test_modules_for_multi_token_prediction_of_newer_families(name, key, tmp_path):
    theirs = tiny.build(name)
    tiny.save(theirs, tmp_path)
    extra = {key: torch.ones(5)}
    rewrite(tmp_path, lambda tensors: tensors.update(extra), num_nextn_predict_layers=1)
    with pytest.warns(UserWarning, match=r"multi-token prediction.* 1 tensors with 5 numbers"):
        read = open_checkpoint(tmp_path)
    agree(read.model, theirs)


def test_kimi_k2_in_fp8(tmp_path):
    """transformers has DeepSeek-V3 for it, by another name in config.json."""
    folder = tmp_path / "kimi"
    tiny.save(tiny.build("deepseek_v3_plain"), folder)
    rewrite(folder, to_fp8, quantization_config=FP8, model_type="kimi_k2")
    read = open_checkpoint(folder, dtype=torch.float32)
    write_pretrained(read.model, tmp_path / "back", hf_config=read.hf_config)
    assert json.loads((tmp_path / "back/config.json").read_text())["model_type"] == "kimi_k2"
    again = open_checkpoint(tmp_path / "back").model.state_dict()
    assert all(torch.equal(again[key], x) for key, x in read.model.state_dict().items())
    rewrite(folder, from_fp8, quantization_config=None, model_type="deepseek_v3")
    agree(read.model, tiny.load(folder))


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 3, "group_size": 128},
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"},
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
    ],
)
def test_a_form_that_is_not_read_is_refused_where_weights_are(settings, tmp_path):
    tiny.save(tiny.build("qwen3_moe"), tmp_path)
    cfg = read_settings(tmp_path, for_weights=False).cfg
    rewrite(tmp_path, lambda tensors: None, quantization_config=settings)
    with pytest.raises(CheckpointError, match=r"quantization_config of config\.json has"):
        open_checkpoint(tmp_path)
    assert read_settings(tmp_path, for_weights=False).cfg == cfg


def test_mxfp4_packed_in_int4_is_warned_about(gpt_oss):
    with pytest.warns(UserWarning, match=r"weights in MXFP4 are packed .* error of [5-9]\.\d\d %"):
        open_checkpoint(gpt_oss, weights="int4", keep=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_checkpoint(gpt_oss, weights="int8", keep=False)


def test_the_layer_for_multi_token_prediction_is_left_out_aloud(tmp_path):
    """It lies behind the last layer; config.json no longer speaks of it when it is written."""
    folder = tmp_path / "deepseek"
    theirs = tiny.build("deepseek_v3")
    tiny.save(theirs, folder)
    extra = {
        "model.layers.3.eh_proj.weight": torch.ones(48, 96),
        "model.layers.3.enorm.weight": torch.ones(48),
        "model.layers.3.self_attn.q_a_proj.weight": torch.ones(18, 48),
    }
    rewrite(folder, lambda tensors: tensors.update(extra), num_nextn_predict_layers=1)
    message = "multi-token prediction.* 3 tensors with 5,520 numbers, 22,080 bytes"
    with pytest.warns(UserWarning, match=message):
        read = open_checkpoint(folder)
    agree(read.model, theirs)
    write_pretrained(read.model, tmp_path / "back", hf_config=read.hf_config)
    fields = json.loads((tmp_path / "back/config.json").read_text())
    assert fields["num_nextn_predict_layers"] == 0
    assert not extra.keys() & load_file(tmp_path / "back/model.safetensors").keys()
    agree(read.model, tiny.load(tmp_path / "back"))
