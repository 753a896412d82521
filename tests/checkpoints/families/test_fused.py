"""Checkpoints with all experts of a layer in one tensor, as transformers 5 has them in memory."""

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.writing import write_pretrained
from moestro.errors import CheckpointError

from . import tiny

NAMES = [
    name
    for name, (kind, _) in tiny.TINY.items()
    if kind not in ("Llama", "Mistral", "Qwen2", "Qwen3", "Lfm2", "GptOss")
]


def save_fused(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, save_original_format=False)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_model_either_way(name, tmp_path):
    theirs = tiny.build(name)
    save_fused(theirs, tmp_path / "fused")
    tiny.save(theirs, tmp_path / "apart")
    fused, apart = (
        load_file(tmp_path / "fused/model.safetensors"),
        open_checkpoint(tmp_path / "apart"),
    )
    assert any(key.endswith("experts.gate_up_proj") for key in fused)
    found = open_checkpoint(tmp_path / "fused")
    wanted = apart.model.state_dict()
    assert found.model.state_dict().keys() == wanted.keys()
    for key, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, wanted[key]), key
    # Written the published way again, and fused.
    write_pretrained(found.model, tmp_path / "back", hf_config=found.hf_config)
    original = load_file(tmp_path / "apart/model.safetensors")
    assert load_file(tmp_path / "back/model.safetensors").keys() == original.keys()
    write_pretrained(found.model, tmp_path / "again", hf_config=found.hf_config, fused_experts=True)
    again = load_file(tmp_path / "again/model.safetensors")
    assert again.keys() == fused.keys()
    assert all(torch.equal(again[key], fused[key]) for key in fused)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, key: t.pop(key), "missing .*gate_up_proj"),
        (lambda t, key: t.update({key: t[key][1:].clone()}), r"\[5, 40, 48\] instead of \[6"),
        (lambda t, key: t.update({key: t[key].mT.contiguous()}), r"\[6, 48, 40\] instead of"),
    ],
)
def test_fused_experts_that_do_not_fit(change, words, tmp_path):
    save_fused(tiny.build("mixtral"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors, "model.layers.2.mlp.experts.gate_up_proj")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path)
