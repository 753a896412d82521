"""A run of adapters knows the checkpoint that it was trained over."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moestro.checkpoints.adapters import own_file, own_settings
from moestro.checkpoints.fingerprints import digest
from moestro.checkpoints.folders import atomic_folder
from moestro.checkpoints.hub import given_name
from moestro.checkpoints.opening import in_blocks, open_adapted, open_checkpoint, use_adapter
from moestro.checkpoints.writing import save_model, write_pretrained
from moestro.config import LoraConfig, ModelConfig
from moestro.errors import CheckpointError
from moestro.kernels import native_cpu
from moestro.models.adapters import attach
from moestro.models.decoder import Decoder


def decoder(seed=0):
    torch.manual_seed(seed)
    moe = {"num_experts": 2, "hidden_dim": 4, "top_k": 2}
    return Decoder(
        ModelConfig(vocab_size=11, dim=8, num_layers=1, attention={"num_heads": 2}, moe=moe)
    )


@pytest.fixture
def base(tmp_path):
    write_pretrained(decoder(), tmp_path / "base", family="mixtral")
    return tmp_path / "base"


def run_over(base, folder, **lora):
    """The checkpoint of a run of adapters."""
    net = decoder()
    cfg = LoraConfig(base=str(base), base_digest=digest(base), rank=1, **lora)
    attach(net, cfg)
    with atomic_folder(folder) as inner:
        own_file(net, cfg).write(inner)
        (inner / "config.json").write_text(net.cfg.model_dump_json())
    return folder


def change(base):
    """Other weights of the same shapes, in place: the manifest beside them is left as it was."""
    path = base / "model.safetensors"
    stored = {name: tensor + 1 for name, tensor in load_file(path).items()}
    save_file(stored, path, {"format": "pt"})


def test_a_base_that_changed_in_place_is_refused_by_all_who_open_it(base, tmp_path):
    run = run_over(base, tmp_path / "run")
    open_checkpoint(run)
    change(base)
    for opened in (
        lambda: open_checkpoint(run),
        lambda: use_adapter(open_checkpoint(base), run),
        lambda: open_adapted(run, own_settings(run), torch.float32, "cpu"),
    ):
        with pytest.raises(CheckpointError, match=r"base has other weights .* put back"):
            opened()
    write_pretrained(decoder(), tmp_path / "again", family="mixtral")
    shutil.copy(tmp_path / "again" / "model.safetensors", base)
    open_checkpoint(run)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(CheckpointError, match="base has other weights or settings"):
        open_checkpoint(run)


def test_a_copy_is_the_same_and_another_model_is_warned_of(base, tmp_path):
    run = run_over(base, tmp_path / "run")
    shutil.copytree(base, tmp_path / "copy", copy_function=shutil.copyfile)
    use_adapter(open_checkpoint(tmp_path / "copy"), run)
    change(tmp_path / "copy")
    with pytest.warns(UserWarning, match=r"trained over .*base, whose files are not .*copy"):
        use_adapter(open_checkpoint(tmp_path / "copy"), run)
    (tmp_path / "link").symlink_to(base)  # the same place by another name
    change(base)
    with pytest.raises(CheckpointError, match="has other weights or settings"):
        use_adapter(open_checkpoint(tmp_path / "link"), run)


def test_a_run_of_before_has_no_digest_and_is_taken(base, tmp_path):
    run = run_over(base, tmp_path / "run")
    path = run / "adapter.safetensors"
    old = json.dumps({"base": str(base), "rank": 1})
    with atomic_folder(tmp_path / "old") as inner:
        save_file(load_file(path), inner / path.name, {"lora": old})
        shutil.copy(run / "config.json", inner)
    change(base)
    open_checkpoint(tmp_path / "old")


def test_a_run_over_our_own_layout(tmp_path):
    for name, seed in (("base", 0), ("other", 1)):
        with atomic_folder(tmp_path / name) as inner:
            save_model(decoder(seed), inner)
    run = run_over(tmp_path / "base", tmp_path / "run")
    open_checkpoint(run)
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "other").rename(tmp_path / "base")
    with pytest.raises(CheckpointError, match="has other weights or settings"):
        open_checkpoint(run)


@pytest.mark.skipif(native_cpu.available() is not None, reason="no native library")
def test_a_run_over_a_base_in_blocks_is_in_blocks(base, tmp_path):
    run = run_over(base, tmp_path / "run")
    assert not in_blocks(run)
    config = json.loads((base / "config.json").read_text())
    quantised = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    assert in_blocks(run)


def test_a_checkpoint_is_called_what_it_was_given_as(base, tmp_path):
    store = tmp_path / "models--org--some-model" / "snapshots" / "0123"
    store.mkdir(parents=True)
    assert given_name(store) == "org/some-model"
    assert given_name(base) == str(base)
