"""Qwen3-Next and Qwen3.5-MoE: layouts, what is left out, text parts, and what is refused."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from moestro.checkpoints.families import FAMILIES, text_part
from moestro.checkpoints.families.table import LAYOUTS
from moestro.checkpoints.families.translate import to_fields, to_settings
from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.reading import read_settings
from moestro.checkpoints.writing import write_pretrained
from moestro.errors import ConfigError
from moestro.infer.decoding import Decoding, NativeDecoding
from moestro.kernels import native_cpu
from moestro.models.norms import RMSNorm

from . import tiny
from .published_delta import DELTA_MODELS, QWEN3_5_TEXT

NEXT = DELTA_MODELS["Qwen3-Next-80B-A3B"][0]


def settings_of(fields):
    return to_settings(FAMILIES[fields["model_type"]], fields)


def agree(ours, theirs):
    tokens_BS = torch.randint(0, tiny.VOCABULARY, (2, 19))
    with torch.no_grad():
        torch.testing.assert_close(
            ours(tokens_BS).logits, theirs(tokens_BS).logits, rtol=1e-4, atol=1e-4
        )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A checkpoint of text and images, and transformers' model of its text."""
    folder = tmp_path_factory.mktemp("images")
    _, changes = tiny.TINY["qwen3_5_moe"]
    text = {**tiny.BODY, **changes, "mtp_num_hidden_layers": 1}
    small = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 8}
    vision = {**small, "out_hidden_size": 48, "num_position_embeddings": 16}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = tiny.transformers.Qwen3_5MoeConfig(text_config=text, vision_config=vision)
        model = tiny.transformers.Qwen3_5MoeForConditionalGeneration(config)
        tiny.save(tiny.randomise(model), folder)
        theirs = tiny.transformers.Qwen3_5MoeForCausalLM.from_pretrained(
            folder, attn_implementation="eager", experts_implementation="eager"
        )
    return folder, theirs.eval()


def test_the_text_part_of_text_and_images(images, tmp_path):
    """It is read with a warning, and written as a model of text alone."""
    folder, theirs = images
    with pytest.warns(UserWarning, match="an encoder of images, which moestro does not run"):
        read = open_checkpoint(folder)
    assert read.family == "qwen3_5_moe_text"
    agree(read.model, theirs)
    write_pretrained(read.model, tmp_path / "back", hf_config=read.hf_config)
    fields = json.loads((tmp_path / "back/config.json").read_text())
    assert fields["model_type"] == "qwen3_5_moe_text"
    assert fields["architectures"] == ["Qwen3_5MoeForCausalLM"]
    assert fields["mtp_num_hidden_layers"] == 0
    before = load_file(folder / "model.safetensors")
    plain = {
        key.replace("model.language_model.", "model."): tensor
        for key, tensor in before.items()
        if "visual" not in key
    }
    after = load_file(tmp_path / "back/model.safetensors")
    assert after.keys() == plain.keys()
    for key, tensor in plain.items():
        assert torch.equal(after[key], tensor), key
    agree(read.model, tiny.load(tmp_path / "back"))


def test_what_stands_beside_the_text_counts():
    fields = {"model_type": "qwen3_5_moe", "tie_word_embeddings": True, "text_config": QWEN3_5_TEXT}
    part = text_part({**fields, "quantization_config": {"quant_method": "fp8"}, "image_token": 1})
    assert part["tie_word_embeddings"] is True
    assert part["quantization_config"] == {"quant_method": "fp8"}
    assert "image_token" not in part
    assert text_part(QWEN3_5_TEXT) == QWEN3_5_TEXT


def test_a_text_part_that_is_missing(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "qwen3_5_moe", "text_config": null}')
    with pytest.raises(ConfigError, match=r"config\.json: .*'qwen3_5_moe' needs a text_config"):
        read_settings(path)


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_moe"])
def test_multi_token_prediction_is_left_out(name, tmp_path):
    theirs = tiny.build(name)
    tiny.save(theirs, tmp_path)
    path = tmp_path / "model.safetensors"
    extra = {"mtp.fc.weight": torch.ones(48, 96), "mtp.layers.0.mlp.gate.weight": torch.ones(6, 48)}
    save_file({**load_file(path), **extra}, path, metadata={"format": "pt"})
    message = "a layer for multi-token prediction.* 2 tensors with 4,896 numbers"
    with pytest.warns(UserWarning, match=message):
        read = open_checkpoint(tmp_path)
    agree(read.model, theirs)


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_next_mixed", "qwen3_5_moe"])
def test_written_back_in_bf16(name, tmp_path):
    """Byte by byte, small norm weights too."""
    theirs = tiny.build(name).bfloat16()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "norm" in key:
                parameter.mul_(2**-8)
    tiny.save(theirs, tmp_path / "there")
    read = open_checkpoint(tmp_path / "there")
    write_pretrained(read.model, tmp_path / "back", hf_config=read.hf_config)
    before, after = (load_file(tmp_path / way / "model.safetensors") for way in ("there", "back"))
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key].view(torch.uint8), tensor.view(torch.uint8)), key


def test_gains_do_not_fit_into_16_bits():
    """Why norm weights stay zero-centred: 1 + w is not w again, but for a few."""
    weights = torch.randn(1000).mul(0.01).bfloat16()
    assert ((1 + weights) - 1 != weights).float().mean() > 0.5
    norm = RMSNorm(1000, 1e-6, zero_centred=True)
    with torch.no_grad():
        norm.weight.copy_(weights)
    assert torch.equal(norm.bfloat16().gain(), 1 + weights.float())


@pytest.mark.parametrize("layout", ["delta_qkvz", "delta_ba"])
def test_rows_of_key_heads(layout):
    """Two key heads with three value heads each, rows named by head and part."""
    delta = {"key_heads": 2, "value_heads": 6, "key_dim": 2, "value_dim": 1}
    cfg = settings_of({**NEXT, **dict(zip(_NAMES, delta.values(), strict=True))})
    parts = list(enumerate({"delta_qkvz": [2, 2, 3, 3], "delta_ba": [3, 3]}[layout]))
    theirs = [(head, part, row) for head in (0, 1) for part, n in parts for row in range(n)]
    ours = sorted(theirs, key=lambda name: (name[1], name[0], name[2]))
    numbers = torch.tensor([ours.index(name) for name in theirs])[:, None]
    loaded = LAYOUTS[layout].load(numbers, cfg)
    assert loaded.flatten().tolist() == list(range(len(ours)))
    assert torch.equal(LAYOUTS[layout].save(loaded, cfg), numbers)


_NAMES = (
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
)


@pytest.mark.parametrize(
    ("change", "every"),
    [
        ({}, 4),
        ({"full_attention_interval": 6}, 6),
        ({"full_attention_interval": None}, 4),
        ({"layer_types": ["linear_attention"] * 48}, 0),
        ({"layer_types": ["full_attention"] * 48}, 1),
        ({"layer_types": ["linear_attention", "full_attention"] * 24}, 2),
    ],
)
def test_which_layers_have_attention(change, every):
    assert settings_of({**NEXT, **change}).attention.delta.full_every == every


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_types": ["full_attention", "linear_attention"] * 24}, "in every n-th layer"),
        ({"layer_types": ["linear_attention"] * 47}, "47 entries for 48 layers"),
        ({"layer_types": ["sliding_attention"] * 48}, "has 'sliding_attention'; known"),
        ({"use_sliding_window": True}, "would mean layers that see only a window"),
        ({"partial_rotary_factor": 0.001}, "of a head of width 256 is 0; .* an even number"),
        ({"partial_rotary_factor": 0.03, "head_dim": 250}, "of a head of width 250 is 7; pairs"),
        ({"linear_num_value_heads": 20}, "20 value_heads do not share 16 key_heads"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_what_cannot_be_expressed(change, words):
    with pytest.raises(ConfigError, match=words):
        settings_of({**NEXT, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attn_output_gate": False}, "attn_output_gate is False; only True"),
        ({"mamba_ssm_dtype": "bfloat16"}, "a state in fewer bits"),
        ({"mlp_only_layers": [0]}, "dense layers among the mixtures"),
    ],
)
def test_what_qwen3_5_cannot_express(change, words):
    with pytest.raises(ConfigError, match=words):
        settings_of({**QWEN3_5_TEXT, **change})


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mistral", "gpt_oss", "olmoe"])
def test_other_families_refuse_delta_layers(model_type):
    cfg = settings_of(NEXT)
    with pytest.raises(ConfigError):
        to_fields(FAMILIES[model_type], cfg, {})


def test_other_families_turn_whole_heads():
    fields = json.loads(json.dumps(tiny.transformers.Qwen3MoeConfig().to_dict()))
    partial = {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(ConfigError, match="partial_rotary_factor below 1 cannot be expressed"):
        settings_of({**fields, "rope_parameters": partial})


@pytest.mark.parametrize("way", [Decoding, NativeDecoding])
def test_decodes(way, tmp_path):
    tiny.save(tiny.build("qwen3_next"), tmp_path)
    model = open_checkpoint(tmp_path).model
    if way is NativeDecoding and native_cpu.available() is not None:
        pytest.skip("no native library")
    tokens = torch.randint(0, tiny.VOCABULARY, (30,)).tolist()
    decoding = way(model)
    past, _ = decoding.begin(tokens[:20])
    for token in tokens[20:]:
        (passed,) = decoding.step([[token]], [past])
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[:, -1]
    torch.testing.assert_close(passed.logits_NV, expected, rtol=1e-4, atol=1e-4)
