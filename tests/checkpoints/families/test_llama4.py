"""Llama-4: folders of text and images, and layers said in several ways."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from moestro.checkpoints.families import FAMILIES
from moestro.checkpoints.families.translate import to_fields, to_settings
from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.writing import write_pretrained
from moestro.errors import ConfigError

from . import tiny
from .published_llama4 import LLAMA4_MODELS

SCOUT = LLAMA4_MODELS["Llama-4-Scout-17B-16E"][0]
LLAMA4 = FAMILIES["llama4_text"]


def test_the_text_part_of_a_model_of_text_and_images(tmp_path):
    """Its keys begin otherwise; what sees images is left out, with a word."""
    theirs = tiny.build("llama4")
    tiny.save(theirs, tmp_path / "text")
    folder = tmp_path / "both"
    folder.mkdir()
    text = json.loads((tmp_path / "text/config.json").read_text())
    beside = {"model_type": "llama4", "vision_config": {"hidden_size": 8}, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps({**beside, "text_config": text}))
    tensors = load_file(tmp_path / "text/model.safetensors")
    both = {f"language_model.{key}": tensor for key, tensor in tensors.items()}
    both["vision_model.class_embedding"] = torch.ones(8)
    both["multi_modal_projector.linear_1.weight"] = torch.ones(48, 8)
    save_file(both, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="an encoder of images.* 2 tensors with 392 numbers"):
        read = open_checkpoint(folder)
    tokens_BS = torch.randint(0, tiny.VOCABULARY, (2, 19))
    with torch.no_grad():
        torch.testing.assert_close(
            read.model(tokens_BS).logits, theirs(tokens_BS).logits, rtol=1e-4, atol=1e-4
        )
    write_pretrained(read.model, tmp_path / "back", hf_config=read.hf_config)
    after = load_file(tmp_path / "back/model.safetensors")
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize(
    ("changes", "rotary", "pieces"),
    [
        ({}, [1, 1, 1, 0], [8192, 8192, 8192, None]),
        ({"no_rope_layers": [], "no_rope_layer_interval": 2}, [1, 0, 1, 0], [8192, None] * 2),
        ({"no_rope_layers": [1] * 48}, [1] * 4, [8192] * 4),
        ({"attention_chunk_size": None}, [1, 1, 1, 0], [None] * 4),
        ({"layer_types": ["full_attention"] * 48}, [1, 1, 1, 0], [None] * 4),
    ],
)
def test_which_layers_see_what(changes, rotary, pieces):
    cfg = to_settings(LLAMA4, {**SCOUT, **changes})
    layers = cfg.stacks()[0].layers[:4]
    assert [int(each.rotary) for each in layers] == rotary
    assert [each.chunk for each in layers] == pieces
    assert to_settings(LLAMA4, to_fields(LLAMA4, cfg, {})) == cfg


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"no_rope_layers": [0, 1, 1, 1] * 12}, "no_rope_layers does not name every n-th layer"),
        ({"no_rope_layers": [1, 0]}, "2 entries for 48 layers"),
        ({"layer_types": ["sliding_attention"] * 48}, "has 'sliding_attention'; known"),
        (
            {"layer_types": ["chunked_attention"] * 48, "attention_chunk_size": None},
            "without attention_chunk_size",
        ),
        ({"moe_layers": [0, 5]}, "moe_layers does not name every n-th layer"),
        ({"moe_layers": []}, "no layer is a mixture"),
        ({"num_experts_per_tok": 2}, "with top_k = 1; kind is sigmoid and top_k 2"),
        ({"use_qk_norm": "full"}, "use_qk_norm is 'full'"),
    ],
)
def test_what_cannot_be_expressed(changes, words):
    with pytest.raises(ConfigError, match=words):
        to_settings(LLAMA4, {**SCOUT, **changes})


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_other_families_refuse_its_settings(model_type):
    with pytest.raises(ConfigError):
        to_fields(FAMILIES[model_type], to_settings(LLAMA4, SCOUT), {})
