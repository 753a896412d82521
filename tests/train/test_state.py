import errno
import json
import shutil
import signal
import time

import pytest
import torch
from safetensors import SafetensorError

from moestro.checkpoints import folders
from moestro.checkpoints.folders import newest_checkpoint, step_folders
from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.tensor_files import read_tensors
from moestro.config import OptimConfig
from moestro.errors import CheckpointError, ConfigError, TrainingError
from moestro.models.decoder import Decoder
from moestro.train import state
from moestro.train.loop import Trainer
from moestro.train.metrics import METRICS_NAME, read_metrics
from moestro.train.optim import make_optimizer
from moestro.train.snapshot import load_optimizer_tensors, optimizer_tensors
from moestro.train.state import checkpoint_folder, clear_leftovers, prune

from ..ranks import start_ranks


def step_names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture
def finished(tiny_settings, tiny_corpus, tmp_path):
    """A finished run of six steps: (settings, folder)."""
    Trainer(tiny_settings(), tmp_path / "run", tiny_corpus).train()
    return tiny_settings(), tmp_path / "run"


def test_a_checkpoint_holds_what_its_docstring_lists_and_no_pickle(finished):
    cfg, run = finished
    files = {path.name for path in (run / "checkpoints" / "step-000006").iterdir()}
    assert files == {
        "config.json",
        "model.safetensors",
        "moestro_tokenizer.json",
        "run.json",
        "optimizer.safetensors",
        "trainer.safetensors",
        "trainer.json",
        "manifest.json",
    }
    assert state.read_run_settings(run / "checkpoints" / "step-000006") == cfg
    values = json.loads((run / "checkpoints" / "step-000006" / "trainer.json").read_text())
    assert (values["step"], values["tokens"]) == (6, 6 * 4 * 16)


def test_optimizer_state_comes_back_bitwise(tiny_settings):
    cfg = tiny_settings().model

    def fresh():
        torch.manual_seed(0)
        model = Decoder(cfg)
        return model, make_optimizer(model, OptimConfig())

    def step(model, optimizer):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, 0.1 * (number + 1))
        optimizer.step()

    model, optimizer = fresh()
    step(model, optimizer)
    tensors = {k: v.clone() for k, v in optimizer_tensors(model, optimizer).items()}
    other, restored = fresh()
    other.load_state_dict(model.state_dict())
    load_optimizer_tensors(other, restored, tensors)
    step(model, optimizer)
    step(other, restored)
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)
    with pytest.raises(CheckpointError, match="fits no parameter"):
        load_optimizer_tensors(other, restored, {"nothing.exp_avg": torch.zeros(2)})
    name = "blocks.0.ffn.experts.gate_up"
    average = {f"{name}.momentum_buffer": torch.zeros_like(model.get_parameter(name))}
    with pytest.raises(CheckpointError, match=f"{name}.momentum_buffer is not what updates"):
        load_optimizer_tensors(other, restored, average)


@pytest.mark.parametrize(("keep", "left"), [(1, [6]), (2, [5, 6]), (9, [1, 2, 3, 4, 5, 6])])
def test_only_the_newest_are_kept(tiny_settings, tiny_corpus, tmp_path, keep, left):
    cfg = tiny_settings(train={"save_every": 1, "keep": keep})
    Trainer(cfg, tmp_path / "run", tiny_corpus).train()
    assert step_names(tmp_path / "run") == [f"step-{step:06d}" for step in left]


def test_settings_that_change_the_run_are_all_named(finished, tiny_settings, tiny_corpus):
    _, run = finished
    other = tiny_settings(
        {"top_k": 1}, optim={"lr": 0.5}, train={"steps": 9, "save_every": 2, "keep": 5}
    )
    with pytest.raises(ConfigError) as caught:
        Trainer(other, run, tiny_corpus).train(resume=True)
    message = str(caught.value)
    assert "optim.lr = 0.5 (saved: 0.002)" in message
    assert "model.moe.top_k = 1 (saved: 2)" in message
    assert "train.steps = 9 (saved: 6)" in message
    differing = message.partition("these differ:")[2].partition("Set them back")[0]
    assert "keep" not in differing
    assert "save_every" not in differing


def test_settings_that_do_not_may_differ(finished, tiny_settings, tiny_corpus):
    _, run = finished
    shutil.rmtree(run / "checkpoints" / "step-000006")
    runtime = {"device": "cpu", "checkpoint_activations": True}
    changes = {"save_every": 1, "keep": 3, "eval_every": 1, "eval_tokens": 64, "runtime": runtime}
    Trainer(tiny_settings(train=changes), run, tiny_corpus).train(resume=True)
    assert step_names(run) == ["step-000004", "step-000005", "step-000006"]


def test_a_folder_with_a_run_needs_resume(finished, tiny_corpus):
    cfg, run = finished
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="add --resume"):
        Trainer(cfg, run, tiny_corpus).train()
    assert (run / "metrics.jsonl").read_bytes() == before


def test_resume_needs_a_folder_with_a_run(tiny_settings, tiny_corpus, tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        Trainer(tiny_settings(), tmp_path / "nothing", tiny_corpus).train(resume=True)
    assert not (tmp_path / "nothing").exists()


def test_a_run_stopped_before_its_first_checkpoint_starts_again(
    tiny_settings, tiny_corpus, tmp_path
):
    cfg = tiny_settings()
    state.open_run(tmp_path / "run", cfg, resume=False)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    result = Trainer(cfg, tmp_path / "run", tiny_corpus).train(resume=True)
    assert result.step == 6
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 6
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        state.open_run(tmp_path / "run", tiny_settings(optim={"lr": 1.0}), resume=True)


def test_a_folder_that_cannot_be_made_is_a_config_error(tiny_settings, tiny_corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to"):
        Trainer(tiny_settings(), tmp_path / "file" / "run", tiny_corpus).train()


def test_a_damaged_newest_checkpoint_is_passed_over_and_replaced(finished, tiny_corpus):
    cfg, run = finished
    newest = run / "checkpoints" / "step-000006"
    whole = {k: v.clone() for k, v in read_tensors(newest / "model.safetensors").items()}
    (newest / "model.safetensors").write_bytes(b"torn")
    result = Trainer(cfg, run, tiny_corpus).train(resume=True)
    assert result.checkpoint == newest
    again = read_tensors(newest / "model.safetensors")
    assert all(torch.equal(whole[name], value) for name, value in again.items())


def test_a_damaged_checkpoint_is_read_through_once(finished, tiny_corpus, monkeypatch):
    """By all ranks together, when the run goes on; not again by the one that replaces it."""
    cfg, run = finished
    newest, read, real = run / "checkpoints" / "step-000006", [], folders._fingerprint
    (newest / "trainer.safetensors").write_bytes(b"x" * 200)
    size = (newest / "trainer.safetensors").stat().st_size
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"]["trainer.safetensors"]["bytes"] = size
    (newest / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(folders, "_fingerprint", lambda path: read.append(path) or real(path))
    Trainer(cfg, run, tiny_corpus).train(resume=True)
    assert read.count(newest / "trainer.safetensors") == 1


def test_damaged_checkpoints_are_removed_as_the_run_passes_them(
    finished, tiny_settings, tiny_corpus
):
    _, run = finished
    damaged = (run / "checkpoints" / "step-000006").rename(run / "checkpoints" / "step-000005")
    (damaged / "model.safetensors").write_bytes(b"torn")
    Trainer(tiny_settings(train={"keep": 3}), run, tiny_corpus).train(resume=True)
    assert step_names(run) == ["step-000003", "step-000006"]


def test_an_error_does_not_name_a_damaged_checkpoint_as_good(
    finished, tiny_settings, tiny_corpus, monkeypatch
):
    def full(tensors, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    _, run = finished
    (run / "checkpoints" / "step-000006" / "model.safetensors").write_bytes(b"torn")
    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(TrainingError, match=r"last good checkpoint is \S*step-000003\. "):
        Trainer(tiny_settings(train={"save_every": 1}), run, tiny_corpus).train(resume=True)


def test_with_all_checkpoints_damaged_nothing_is_touched(finished, tiny_corpus):
    cfg, run = finished
    for folder in (run / "checkpoints").iterdir():
        (folder / "optimizer.safetensors").write_bytes(b"torn")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        Trainer(cfg, run, tiny_corpus).train(resume=True)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert len(step_names(run)) == 2


def saving(save):
    return {"device": "cpu", "save": save}


@pytest.mark.parametrize(
    ("error", "save"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "wait"),
        (SafetensorError("No space left"), "background"),
    ],
)
def test_a_full_disk_costs_no_good_checkpoint(
    tiny_settings, tiny_corpus, tmp_path, monkeypatch, error, save
):
    run, real, calls = tmp_path / "run", state.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) > 1:
            path.write_bytes(b"half")
            raise error
        real(tensors, path)

    monkeypatch.setattr(state, "save_file", full)
    cfg = tiny_settings(train={"keep": 1, "steps": 20, "runtime": saving(save)})
    with pytest.raises(TrainingError, match="No space left") as caught:
        Trainer(cfg, run, tiny_corpus).train()
    assert str(run / "checkpoints" / "step-000003") in str(caught.value)
    assert step_names(run) == ["step-000003"]
    open_checkpoint(run)
    # In the background it may come to light later, but not after the next save.
    assert len(read_metrics(run / METRICS_NAME)) <= (6 if save == "wait" else 9)
    monkeypatch.undo()
    assert Trainer(cfg, run, tiny_corpus).train(resume=True).step == 20


KILLED_MID_SAVE = """
import sys, time
from pathlib import Path
from moestro.train import state
from moestro.data.windows import Corpus
from moestro.train.loop import Trainer

run, data = Path(sys.argv[1]), Path(sys.argv[2])
real = state.seal

def slow(paths):
    if "000006" in paths[0].parent.name:
        paths[0].write_bytes(paths[0].read_bytes()[:1000])
        (run / "writing").touch()
        time.sleep(60)
    return real(paths)

state.seal = slow
cfg = state.read_run_settings(run.parent, "settings.json")
Trainer(cfg, run, Corpus(data)).train()
"""


@pytest.mark.parametrize("save", ["wait", "background"])
def test_a_process_killed_while_saving_loses_nothing(
    tiny_settings, tiny_corpus, tiny_data_folder, tmp_path, save
):
    cfg, run = tiny_settings(train={"keep": 1, "runtime": saving(save)}), tmp_path / "run"
    (tmp_path / "settings.json").write_text(cfg.model_dump_json())
    child = start_ranks(1, KILLED_MID_SAVE, tmp_path / "printed", run, tiny_data_folder)
    try:
        deadline = time.monotonic() + 60
        while not (run / "writing").exists():
            assert time.monotonic() < deadline, child.printed(0, "err")
            time.sleep(0.02)
    finally:
        child.send(0, signal.SIGKILL)
        assert child.ended() == [-signal.SIGKILL]
    assert len(step_names(run)) == 2, "the killed save should have left something behind"
    assert newest_checkpoint(run).name == "step-000003"
    open_checkpoint(run)
    result = Trainer(cfg, run, tiny_corpus).train(resume=True)
    assert step_names(run) == ["step-000006"]
    Trainer(cfg, tmp_path / "straight", tiny_corpus).train()
    straight = read_tensors(tmp_path / "straight/checkpoints/step-000006/model.safetensors")
    resumed = read_tensors(result.checkpoint / "model.safetensors")
    assert all(torch.equal(straight[name], value) for name, value in resumed.items())


def test_a_kill_while_a_checkpoint_is_removed_leaves_none_that_is_half_there(tmp_path, monkeypatch):
    """It is renamed first; the next start sweeps it up."""
    folders = [checkpoint_folder(tmp_path, step) for step in (1, 2, 3)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "a").write_text("a")
        (folder / "b").write_text("b")

    def killed(path, ignore_errors=False):
        if not path.exists():
            return
        (path / "a").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, 3, keep=1)
    assert list(step_folders(tmp_path).values()) == folders[1:]
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in folders[0].parent.iterdir()) == [
        "step-000002", "step-000003",
    ]  # fmt: skip
