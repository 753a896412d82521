"""What is refused in a folder of Hugging Face's layout: by name, before anything is read."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from moestro import Decoder, ModelConfig
from moestro.checkpoints import reading, tensor_files
from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.writing import write_pretrained
from moestro.errors import CheckpointError, ConfigError


@pytest.fixture
def folder(tmp_path):
    """A tiny Mixtral in several tensor_files."""
    cfg = ModelConfig(
        vocab_size=50,
        dim=32,
        num_layers=2,
        attention={"num_heads": 4, "num_kv_heads": 2, "context": 64},
        moe={"hidden_dim": 24, "num_experts": 4, "router": {"renormalize": True}},
        head={"tied": False},
    )
    write_pretrained(Decoder(cfg), tmp_path / "model", shard_bytes=10_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    return tmp_path / "model"


def tensors_of(folder):
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def change_tensors(folder, change):
    """Rewrite a folder as one file with changed tensors."""
    tensors = tensors_of(folder)
    for path in [*folder.glob("*.safetensors"), folder / tensor_files.INDEX]:
        path.unlink()
    change(tensors)
    save_file(tensors, folder / tensor_files.SINGLE)


def test_keys_that_nobody_needs(folder):
    change_tensors(
        folder,
        lambda t: t.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(4)}),
    )
    open_checkpoint(folder)


W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(W1), rf"missing {W1}"),
        (lambda t: t.update(extra=torch.zeros(1)), r"unknown extra in model\.safetensors"),
        (
            lambda t: t.update({W1: torch.zeros(24, 33)}),
            rf"{W1} in model\.safetensors is \[24, 33\] instead of \[24, 32\]",
        ),
        (lambda t: t.update({W1: t[W1].T.contiguous()}), r"\[32, 24\] instead of \[24, 32\]"),
        (lambda t: t.update({W1: t[W1].to(torch.int8)}), rf"{W1} in model\.safetensors is torch"),
        (lambda t: t.update({W1: t[W1].to(torch.float8_e4m3fn)}), r"float8_e4m3fn, not a float"),
        (lambda t: t.update({f"{W1}_scale_inv": torch.ones(1, 1)}), "unknown.*w1.weight_scale_inv"),
        (lambda t: t.update({W1.replace("experts.2", "experts.4"): t[W1].clone()}), r"experts\.4"),
        (
            lambda t: t.clear(),
            r"describes 28,192 parameters in 2 layers, and .* 0 tensors of 0 byt",
        ),
    ],
)
def test_tensors_that_do_not_fit(folder, change, words, monkeypatch):
    """Refused by name, before memory is taken or a tensor read."""

    def never(*_):
        raise AssertionError("memory was taken before everything was checked")

    change_tensors(folder, change)
    monkeypatch.setattr(reading, "materialize", never)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)


def change_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **changes}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not known; known: .*mixtral"),
        (
            {"model_type": "jamba"},
            r"transformers runs others: .* moestro\.hf\.install\(\) speeds",
        ),
        ({"frobnicate": 1}, r"config\.json: unknown field frobnicate"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_hidden_layers": 0}, "num_layers"),
    ],
)
def test_configs_that_are_refused(folder, change, words):
    change_config(folder, **change)
    with pytest.raises(ConfigError, match=words):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 3}, r"missing model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"unknown model\.layers\.1"),
        ({"num_local_experts": 5}, r"missing .*experts\.4"),
        ({"vocab_size": 51}, r"embed_tokens\.weight.* instead of \[51, 32\]"),
    ],
)
def test_configs_that_do_not_fit_the_tensors(folder, change, words):
    change_config(folder, **change)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10_000},
        {"num_local_experts": 10**6},
        {"hidden_size": 2**20, "head_dim": 8},
        {"vocab_size": 2**31 - 1},
        {"num_attention_heads": 2**30, "num_key_value_heads": 2**30, "head_dim": 2**20},
    ],
)
def test_a_model_far_larger_than_its_files_is_not_built(folder, change, monkeypatch):
    def never(*_):
        raise AssertionError("it was built")

    change_config(folder, **change)
    monkeypatch.setattr(reading, "build_model", never)
    with pytest.raises(CheckpointError, match=r"does not fit its config\.json: that describes"):
        open_checkpoint(folder)


def test_fields_accepted_by_name(folder):
    plain = open_checkpoint(folder).model.state_dict()
    change_config(folder, frobnicate=1)
    read = open_checkpoint(folder, accept_fields=["frobnicate"])
    assert all(torch.equal(plain[key], value) for key, value in read.model.state_dict().items())
    # Written again it stays, as all that is said beyond our settings.
    write_pretrained(read.model, folder.parent / "back", hf_config=read.hf_config)
    assert config_of(folder.parent / "back")["frobnicate"] == 1


def test_damaged_folders(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=path.name):
        open_checkpoint(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path.name} is missing"):
        open_checkpoint(folder)


def test_pickle_is_refused(folder):
    for path in [*folder.glob("*.safetensors"), folder / tensor_files.INDEX]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*Only safetensors"):
        open_checkpoint(folder)


def test_a_file_that_shrinks_while_it_is_read(folder, monkeypatch):
    real = reading.materialize

    def shrink(*arguments):
        path = max(folder.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-4])
        return real(*arguments)

    monkeypatch.setattr(reading, "materialize", shrink)
    with pytest.raises(CheckpointError, match="ends inside"):
        open_checkpoint(folder)
