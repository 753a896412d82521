"""Processes that die, or are asked to stop: the others end soon, and the run goes on."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from moestro.checkpoints.folders import newest_checkpoint, verify_folder

SETTINGS = {
    "model.dim": 16,
    "model.num_layers": 2,
    "model.attention": "{num_heads = 2, context = 16}",
    "model.moe": "{hidden_dim = 16, num_experts = 4}",
    "data.seq_len": 16,
    "data.held_out": 0.2,
    "train.steps": 100_000,
    "train.batch_size": 4,
    "train.eval_every": 100_000,
    "train.eval_tokens": 64,
    "train.save_every": 2,
    "train.dtype": "float32",
    "train.runtime.device": "cpu",
    "parallel.expert": 2,
    "parallel.shard": "auto",
    "parallel.timeout_s": 60,
}


@pytest.fixture
def start(tmp_path):
    """A function: torchrun's restart count → two processes of one run, killed in the end."""
    (tmp_path / "text").mkdir()
    for number in range(12):
        (tmp_path / "text" / f"{number}.txt").write_text(f"text number {number} " * 60)
    words = ["train", "--out", tmp_path / "run", "--source", tmp_path / "text"]
    words += [w for name, value in SETTINGS.items() for w in ("--set", f"{name}={value}")]
    children = []

    def launch(restarts=0):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {
            "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "TORCHELASTIC_RESTART_COUNT": str(restarts), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        pair = [
            subprocess.Popen(
                [sys.executable, "-m", "moestro", *map(str, words)],
                env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in ("0", "1")
        ]
        children.extend(pair)
        return pair

    yield launch
    for child in children:
        child.kill()
        child.communicate()


def wait_for(run, steps):
    """Return once a checkpoint of at least so many steps is there."""
    until = time.monotonic() + 100
    while time.monotonic() < until:
        done = sorted((run / "checkpoints").glob("step-*"))
        if done and int(done[-1].name.removeprefix("step-")) >= steps:
            return int(done[-1].name.removeprefix("step-"))
        time.sleep(0.02)
    raise TimeoutError(f"no checkpoint of step {steps}")


def test_a_killed_process_ends_the_run_and_a_restart_resumes(start, tmp_path):
    run = tmp_path / "run"
    first, second = start()
    reached = wait_for(run, 4)
    second.kill()
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 1
    assert "another process of the run ended" in errors
    assert "Traceback" not in errors
    verify_folder(newest_checkpoint(run))

    first, second = start(restarts=1)
    wait_for(run, reached + 6)
    second.send_signal(signal.SIGINT)  # to one only
    outputs = [child.communicate(timeout=60)[1] for child in (first, second)]
    assert (first.returncode, second.returncode) == (128 + 15, 128 + 2), outputs
    assert "stopped by SIGTERM after step" in outputs[0]
    verify_folder(newest_checkpoint(run))


@pytest.mark.slow
def test_kills_at_any_moment_lose_nothing(start, tmp_path):
    """As often as MOESTRO_KILLS says: the newest checkpoint stays whole, and the run moves on."""
    run, reached = tmp_path / "run", 0
    for number in range(int(os.environ.get("MOESTRO_KILLS", "5"))):
        pair = start(restarts=number)
        reached = wait_for(run, reached + 2)
        time.sleep(0.013 * (number % 23))
        pair[number % 2].kill()
        for child in pair:
            child.communicate(timeout=60)
        newest = newest_checkpoint(run)
        assert int(newest.name.removeprefix("step-")) >= reached
