"""Checkpoints: whole or not there, every byte verified, every key accounted for."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moestro import Decoder, ModelConfig
from moestro.checkpoints import reading
from moestro.checkpoints.folders import (
    atomic_folder,
    checkpoints,
    newest_checkpoint,
    seal,
    verify_folder,
)
from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.writing import save_model
from moestro.errors import CheckpointError

SETTINGS = {
    "vocab_size": 20,
    "dim": 8,
    "num_layers": 2,
    "attention": {"num_heads": 2, "context": 16},
    "moe": {
        "hidden_dim": 8,
        "num_experts": 4,
        "router": {"kind": "sigmoid", "selection_bias": True},
        "shared": {"hidden_dim": 4, "gate": True},
    },
}


def new_model(**changes):
    model = Decoder(ModelConfig(**{**SETTINGS, **changes}))
    for layer in model.mixtures():
        layer.router.bias.normal_()
    return model


def save(model, target):
    with atomic_folder(target) as folder:
        save_model(model, folder)
    return target


def run_with(tmp_path, *steps):
    """A run folder with a checkpoint for each step; returns it and them."""
    folders = [save(new_model(), tmp_path / f"checkpoints/step-{step:06d}") for step in steps]
    return tmp_path, folders


def rewrite(folder, change):
    """Change the tensors of a checkpoint, and its manifest with them, as if saved so."""
    tensors = load_file(folder / "model.safetensors")
    cfg = json.loads((folder / "config.json").read_text())
    change(tensors, cfg)
    shutil.rmtree(folder)
    with atomic_folder(folder) as inner:
        save_file(tensors, inner / "model.safetensors")
        (inner / "config.json").write_text(json.dumps(cfg))


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_round_trip(tmp_path, tie_embeddings):
    model = new_model(head={"tied": tie_embeddings}).eval()
    loaded = open_checkpoint(save(model, tmp_path / "model")).model
    assert loaded.cfg == model.cfg
    assert not loaded.training
    own, theirs = model.state_dict(), loaded.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    assert (loaded.head.weight is loaded.embed.weight) is tie_embeddings
    tokens_BS = torch.randint(0, 20, (2, 7))
    assert torch.equal(loaded(tokens_BS).logits, model(tokens_BS).logits)


def test_a_run_and_its_checkpoint_both_load(tmp_path):
    run, (_, newest) = run_with(tmp_path, 5, 10)
    assert newest_checkpoint(run) == newest_checkpoint(newest) == newest
    assert open_checkpoint(run).model.cfg == open_checkpoint(newest).model.cfg


def test_the_backend_is_passed_on(tmp_path):
    model = open_checkpoint(save(new_model(), tmp_path / "model"), backend="reference").model
    assert model.mixtures()[0].experts.backend == "reference"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated(tmp_path, name, share):
    folder = save(new_model(), tmp_path / "model")
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("where", [0.0, 0.3, 0.999])
def test_one_altered_byte(tmp_path, name, where):
    folder = save(new_model(), tmp_path / "model")
    data = bytearray((folder / name).read_bytes())
    data[int(len(data) * where)] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{name}.*(checksum|altered)"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
def test_missing_file(tmp_path, name):
    folder = save(new_model(), tmp_path / "model")
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}|no checkpoint"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "manifest",
    ["[]", "{}", '{"files": {}}', '{"files": []}', '{"files": {"model.safetensors": {}}}', "7"],
)
def test_a_manifest_that_vouches_for_nothing(tmp_path, manifest):
    """Valid JSON, and no manifest: the files it should name are unverified."""
    folder = save(new_model(), tmp_path / "model")
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match="manifest"):
        open_checkpoint(folder)


def test_unknown_missing_and_misshapen_keys_are_all_named(tmp_path):
    folder = save(new_model(), tmp_path / "model")

    def change(tensors, cfg):
        del tensors["blocks.0.attention.out.weight"]
        tensors["blocks.0.attention.output.weight"] = torch.zeros(1)
        tensors["blocks.1.ffn.experts.down"] = torch.zeros(4, 8, 9)

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert "missing blocks.0.attention.out.weight" in message
    assert "unknown blocks.0.attention.output.weight" in message
    assert (
        "blocks.1.ffn.experts.down in model.safetensors is [4, 8, 9] instead of [4, 8, 8]"
        in message
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _, cfg: cfg.update(dmi=8), "dmi.*dim"),
        (lambda _, cfg: cfg["moe"].update(top_k=9), "top_k is 9"),
        (
            lambda _, cfg: cfg.update(vocab_size=21),
            r"embed\.weight in model\.safetensors is \[20, 8\]",
        ),
        (lambda _, cfg: cfg.update(num_layers=3), r"missing blocks\.2"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, change, words):
    folder = save(new_model(), tmp_path / "model")
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "change", [{"num_layers": 10_000}, {"dim": 2**30, "moe": None}, {"vocab_size": 2**40}]
)
def test_a_model_far_larger_than_its_file_is_not_built(tmp_path, change, monkeypatch):
    def never(*_):
        raise AssertionError("it was built")

    folder = save(new_model(), tmp_path / "model")
    rewrite(folder, lambda _, cfg: cfg.update(change))
    monkeypatch.setattr(reading, "build_model", never)
    with pytest.raises(CheckpointError, match=r"does not fit its config\.json: that describes"):
        open_checkpoint(folder)


def test_an_untied_head_is_not_loaded_into_a_tied_embedding(tmp_path):
    folder = save(new_model(head={"tied": False}), tmp_path / "model")
    rewrite(folder, lambda _, cfg: cfg.update(head={"tied": True}))
    with pytest.raises(CheckpointError, match=r"head\.weight"):
        open_checkpoint(folder)


class Exploding:
    """Unpickling this would leave a mark."""

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def test_pickle_is_refused_and_not_run(tmp_path):
    bomb = Exploding()
    bomb.mark = tmp_path / "exploded"
    with atomic_folder(tmp_path / "model") as folder:
        save_model(new_model(), folder)
        (folder / "model.safetensors").write_bytes(pickle.dumps(bomb))
    with pytest.raises(CheckpointError, match=r"safetensors.*never pickle"):
        open_checkpoint(tmp_path / "model")
    assert not bomb.mark.exists()


def save_and_fail(target):
    with atomic_folder(target) as folder:
        save_model(new_model(), folder)
        raise OSError("disk full")


def test_a_save_that_fails_leaves_nothing(tmp_path):
    run, (good,) = run_with(tmp_path, 5)
    with pytest.raises(OSError, match="disk full"):
        save_and_fail(run / "checkpoints/step-000010")
    assert checkpoints(run) == [good]
    assert list((run / "checkpoints").iterdir()) == [good]
    verify_folder(good)


def test_an_existing_checkpoint_is_never_overwritten(tmp_path):
    folder = save(new_model(), tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="exists"):
        save(new_model(), folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_writing_is_verified(tmp_path, monkeypatch):
    """A disk that loses bytes on the way down is noticed before the rename."""
    real = os.fsync

    def lossy(descriptor):
        for path in tmp_path.rglob("model.safetensors"):
            os.truncate(path, 100)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", lossy)
    with pytest.raises(CheckpointError, match="truncated"):
        save(new_model(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_other_ranks_have_sealed_must_be_there(tmp_path):
    """A shared disk may show a file late: then there is no checkpoint, rather than one without."""

    def write(content):
        with atomic_folder(tmp_path / "model", {"theirs": record}) as folder:
            (folder / "own").write_text("own")
            if content is not None:
                (folder / "theirs").write_text(content)

    (tmp_path / "theirs").write_text("their file")
    record = seal([tmp_path / "theirs"])["theirs"]
    for content, message in ((None, "lacks the file theirs"), ("their", "5 bytes instead of 10")):
        with pytest.raises(CheckpointError, match=message):
            write(content)
        assert not (tmp_path / "model").exists()
    write("their file")
    assert json.loads((tmp_path / "model/manifest.json").read_text())["files"].keys() == {
        "own", "theirs",
    }  # fmt: skip


KILLED = """
import os, signal, sys
from pathlib import Path
from moestro import Decoder, ModelConfig
from moestro.checkpoints.folders import atomic_folder
from moestro.checkpoints.writing import save_model
with atomic_folder(Path(sys.argv[1])) as folder:
    save_model(Decoder(ModelConfig()), folder)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_in_the_middle_of_a_save(tmp_path):
    run, (good,) = run_with(tmp_path, 5)
    target = run / "checkpoints/step-000010"
    source = Path(__file__).parents[2] / "src"
    environment = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(target)], env=environment, check=False)
    assert done.returncode == -9
    assert not target.exists()
    assert len(list(target.parent.iterdir())) == 2, "the kill came too early to leave anything"
    assert newest_checkpoint(run) == good
    # The next save of the same step clears what was left.
    assert newest_checkpoint(save(new_model(), target)) == target
    assert sorted(target.parent.iterdir()) == [good, target]


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path):
    run, (good, damaged) = run_with(tmp_path, 5, 10)
    (damaged / "model.safetensors").write_bytes(b"short")
    assert newest_checkpoint(run) == good
    (good / "config.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        newest_checkpoint(run)
    assert "model.safetensors" in str(caught.value)
    assert "config.json" in str(caught.value)


def test_steps_are_ordered_by_number(tmp_path):
    run, (_, million) = run_with(tmp_path, 999_999, 1_000_000)
    assert newest_checkpoint(run) == million


def test_nothing_to_load(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        open_checkpoint(tmp_path)
