"""Saving in the background: the bytes of a save that training waits for, and no trace after."""

import errno
import os
import shutil
import signal
import threading
import weakref

import pytest

from moestro.checkpoints.folders import newest_checkpoint
from moestro.errors import TrainingError
from moestro.train import state
from moestro.train.loop import Trainer
from moestro.train.metrics import METRICS_NAME, read_metrics
from moestro.train.progress import ProgressDisplay
from moestro.train.snapshot import Snapshot

TENSORS = ("model.safetensors", "optimizer.safetensors", "trainer.safetensors")


class Watcher(ProgressDisplay):
    """Shows nothing; calls a function after each step, and keeps what was noted at which."""

    def __init__(self, call=lambda step: None):
        super().__init__()
        self.call, self.step, self.notes = call, 0, []

    def update(self, record, steps):
        self.step = record["step"]
        self.call(self.step)

    def note(self, text):
        self.notes.append((self.step, text.rpartition("/")[2]))


@pytest.fixture
def settings(tiny_settings):
    """A function: how to save, and more of `train` → settings of six steps, saved every second."""

    def make(save="background", **train):
        runtime = {"device": "cpu", "save": save}
        return tiny_settings(train={"save_every": 2, "keep": 9, "runtime": runtime, **train})

    return make


@pytest.fixture
def gate(monkeypatch):
    """An event that the save of step 2 waits for."""
    event, real = threading.Event(), state.save

    def late(what, snapshot, numbers, last):
        if numbers.step == 2:
            assert event.wait(60)
        return real(what, snapshot, numbers, last)

    monkeypatch.setattr(state, "save", late)
    yield event
    event.set()


def opening(gate, step, then=lambda: None):
    """A display that opens the gate after a step."""

    def call(now):
        if now == step:
            then()
            gate.set()

    return Watcher(call)


@pytest.fixture
def straight(settings, tiny_corpus, tmp_path):
    """The same run, saved while it waits."""
    Trainer(settings("wait"), tmp_path / "straight", tiny_corpus).train()
    return tmp_path / "straight"


def losses(run):
    return [record["loss"] for record in read_metrics(run / METRICS_NAME)]


def assert_same_bytes(run, other, *steps):
    for step in steps:
        folders = [root / "checkpoints" / f"step-00000{step}" for root in (run, other)]
        for name in TENSORS:
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_the_bytes_are_those_of_the_step(
    settings, straight, gate, tiny_corpus, tmp_path, monkeypatch
):
    copies, real, run = [], Snapshot.copied, tmp_path / "run"

    def kept(self):
        found = real(self)
        copies.extend(weakref.ref(one.make()) for file in found.files for one in file.tensors)
        return found

    monkeypatch.setattr(Snapshot, "copied", kept)
    before, shown = threading.active_count(), opening(gate, 3)
    result = Trainer(settings(), run, tiny_corpus, shown).train()
    assert_same_bytes(run, straight, 2, 4, 6)  # written after step 3
    assert losses(run) == losses(straight)
    assert result.checkpoint == newest_checkpoint(run) == run / "checkpoints" / "step-000006"
    assert [text for _, text in shown.notes] == ["step-000002", "step-000004", "step-000006"]
    assert shown.notes[0][0] > 2
    assert threading.active_count() == before
    assert copies
    assert not any(copy() is not None for copy in copies)

    shutil.rmtree(run / "checkpoints" / "step-000006")
    Trainer(settings("wait"), run, tiny_corpus).train(resume=True)
    assert_same_bytes(run, straight, 6)


def test_ctrl_c_while_a_save_is_running_ends_with_whole_checkpoints(
    settings, straight, gate, tiny_corpus, tmp_path
):
    run = tmp_path / "run"
    shown = opening(gate, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    result = Trainer(settings(), run, tiny_corpus, shown).train()
    assert (result.step, result.stopped_by) == (4, signal.SIGINT)
    assert newest_checkpoint(run) == result.checkpoint
    assert_same_bytes(run, straight, 2, 4)


def test_a_second_ctrl_c_does_not_wait(settings, gate, tiny_corpus, tmp_path):
    def twice(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        Trainer(settings(), tmp_path / "run", tiny_corpus, Watcher(twice)).train()
    (saver,) = set(threading.enumerate()) - before
    assert saver.daemon
    gate.set()
    saver.join()


def test_an_error_waits_for_the_save_and_names_it(settings, gate, tiny_corpus, tmp_path):
    box = []
    ruin = opening(gate, 3, lambda: box[0].model.head.weight.data.fill_(float("nan")))
    box.append(Trainer(settings(), tmp_path / "run", tiny_corpus, ruin))
    with pytest.raises(TrainingError, match=r"^step 4: .*last good checkpoint is \S*step-000002\."):
        box[0].train()
    assert newest_checkpoint(tmp_path / "run").name == "step-000002"


def test_an_error_tells_of_a_save_that_failed(settings, gate, tiny_corpus, tmp_path, monkeypatch):
    def full(paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    box = []
    ruin = opening(gate, 3, lambda: box[0].model.head.weight.data.fill_(float("nan")))
    box.append(Trainer(settings(), tmp_path / "run", tiny_corpus, ruin))
    monkeypatch.setattr(state, "seal", full)
    with pytest.raises(
        TrainingError, match=r"^step 4: .*Before that, it could not save .*No space"
    ):
        box[0].train()
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_save_that_fails_ends_the_run_before_the_next(
    settings, tiny_corpus, tmp_path, monkeypatch
):
    before = set(threading.enumerate())

    def let_it_fail(step):
        if step == 9:
            for saver in set(threading.enumerate()) - before:
                saver.join()

    monkeypatch.setattr(state, "seal", lambda paths: (tmp_path / "nothing").stat())
    cfg, run = settings(steps=30, save_every=8), tmp_path / "run"
    with pytest.raises(TrainingError, match="could not save the checkpoint of step 8"):
        Trainer(cfg, run, tiny_corpus, Watcher(let_it_fail)).train()
    assert len(losses(run)) == 10


def test_a_copy_without_memory_says_what_to_set(settings, tiny_corpus, tmp_path, monkeypatch):
    def full(snapshot):
        raise MemoryError

    monkeypatch.setattr(Snapshot, "copied", full)
    with pytest.raises(TrainingError, match=r"not enough memory.*Set train.runtime.save to wait"):
        Trainer(settings(), tmp_path / "run", tiny_corpus).train()
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_an_old_checkpoint_that_stays_is_only_warned_of(
    settings, tiny_corpus, tmp_path, monkeypatch
):
    def stays(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(state, "remove_folder", stays)
    with pytest.warns(UserWarning, match="an old checkpoint cannot be removed: .*denied"):
        result = Trainer(settings("wait", keep=1), tmp_path / "run", tiny_corpus).train()
    assert newest_checkpoint(tmp_path / "run") == result.checkpoint
