"""A run that is being trained is left alone by others, until its process ends."""

import subprocess
import sys
from threading import Timer

import pytest

from moestro.errors import ConfigError
from moestro.train.locking import locked
from moestro.train.loop import Trainer
from moestro.train.progress import ProgressDisplay

HOLD = """
import sys, time
from pathlib import Path
from moestro.train.locking import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


class Each(ProgressDisplay):
    """Shows nothing; calls a function after each step."""

    def __init__(self, call):
        super().__init__()
        self._call = call

    def update(self, record, steps):
        self._call()


def test_a_run_that_is_being_trained_is_refused_and_left_as_it_is(
    tiny_settings, tiny_corpus, tmp_path
):
    run, cfg, refused = tmp_path / "run", tiny_settings(train={"steps": 2, "save_every": 1}), []

    def files():
        return {path: path.stat().st_mtime_ns for path in run.rglob("*")}

    def another():
        before = files()
        with pytest.raises(ConfigError, match=r"another process trains the run in .*Ctrl-C"):
            Trainer(cfg, run, tiny_corpus).train(resume=True)
        refused.append(before == files())

    Trainer(cfg, run, tiny_corpus, Each(another)).train()
    assert refused == [True, True]
    assert Trainer(cfg, run, tiny_corpus).train(resume=True).step == 2


def test_a_killed_process_leaves_no_lock(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another process"), locked(tmp_path):
            pass
        Timer(0.3, holder.kill).start()
        with locked(tmp_path, wait_s=30):
            assert not list(tmp_path.iterdir())
    with locked(tmp_path):
        pass
