"""Processes that die, or are asked to stop: the others end soon, and the run goes on."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from moestro.checkpoints.folders import newest_checkpoint, verify_folder

from ..ranks import start_ranks

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
    "train.runtime.save": "background",
    "parallel.expert": 2,
    "parallel.shard": "auto",
    "parallel.timeout_s": 20,  # a rank waits so long for one that was killed at the start
}


RANK = "import sys; from moestro.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def words(tmp_path):
    """The command line of a run, after `moestro`."""
    (tmp_path / "text").mkdir()
    for number in range(12):
        (tmp_path / "text" / f"{number}.txt").write_text(f"text number {number} " * 60)
    words = ["train", "--out", tmp_path / "run", "--source", tmp_path / "text"]
    return words + [w for name, value in SETTINGS.items() for w in ("--set", f"{name}={value}")]


@pytest.fixture
def start(words, tmp_path):
    """A function: torchrun's restart count, and how to save → two processes of one run.

    They are killed in the end.
    """
    begun = []

    def launch(restarts=0, save="background"):
        folder = tmp_path / f"printed {restarts}"
        job = {"TORCHELASTIC_RUN_ID": "job"}
        more = ["--set", f"train.runtime.save={save}"]
        begun.append(start_ranks(2, RANK, folder, *words, *more, restarts=restarts, **job))
        return begun[-1]

    yield launch
    for ranks in begun:
        ranks.ended(0)


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
    ranks = start()
    reached = wait_for(run, 4)
    ranks.send(1, signal.SIGKILL)
    assert ranks.ended(60) == [1, -signal.SIGKILL]
    errors = ranks.printed(0, "err")
    assert "another process of the run ended" in errors
    assert "Traceback" not in errors
    verify_folder(newest_checkpoint(run))

    ranks = start(restarts=1)
    wait_for(run, reached + 6)
    ranks.send(1, signal.SIGINT)  # to one only
    assert ranks.ended(60) == [128 + 15, 128 + 2]
    assert "stopped by SIGTERM after step" in ranks.printed(0, "err")
    verify_folder(newest_checkpoint(run))


@pytest.mark.slow
def test_kills_at_any_moment_lose_nothing(start, tmp_path):
    """As often as MOESTRO_KILLS says: the newest checkpoint stays whole, and the run moves on."""
    run, reached, moments = tmp_path / "run", 0, random.Random(0)
    for number in range(int(os.environ.get("MOESTRO_KILLS", "3"))):
        ranks = start(number, ("background", "wait")[number % 2])
        if number and moments.random() < 0.3:  # the whole machine, even while they start
            time.sleep(moments.uniform(0, 2))
            for rank in (0, 1):
                ranks.send(rank, signal.SIGKILL)
            assert ranks.ended(60) == [-signal.SIGKILL] * 2
        else:
            reached = wait_for(run, reached + 2)
            time.sleep(moments.uniform(0, 0.3))
            ranks.send(moments.randrange(2), signal.SIGKILL)
            assert sorted(ranks.ended(60)) == [-signal.SIGKILL, 1]
        newest = newest_checkpoint(run)
        verify_folder(newest)
        assert int(newest.name.removeprefix("step-")) >= reached


@pytest.fixture
def torchrun(words, tmp_path):
    """A function: torchrun's options, more of ours → its process, of a session of its own."""
    begun = []

    def launch(*options, more=(), where=("--standalone", "--nproc-per-node", "2")):
        command = [Path(sys.executable).with_name("torchrun"), *where, *options]
        command += ["-m", "moestro", *words, *more]
        begun.append(
            subprocess.Popen(
                list(map(str, command)),
                # With its own store torchrun cannot replace a machine; see docs/scale.md.
                env=os.environ
                | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return begun[-1]

    yield launch
    for child in begun:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


def test_torchrun_trains_to_the_end(torchrun, tmp_path):
    printed, errors = (child := torchrun(more=("--json", "--set", "train.steps=4"))).communicate()
    assert child.returncode == 0, errors
    assert json.loads(printed)["step"] == 4  # printed once
    newest = newest_checkpoint(tmp_path / "run")
    assert newest.name == "step-000004"
    assert len(list(newest.glob("model-rank-*-of-00002.safetensors"))) == 2


def workers_of(child):
    """Process ids of what a torchrun has started."""
    found = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    return [int(pid) for pid in found]


@pytest.mark.slow
def test_torchrun_restarts_what_was_killed_and_ctrl_c_saves(torchrun, tmp_path):
    run, child = tmp_path / "run", torchrun("--max-restarts", "1")
    reached = wait_for(run, 4)
    os.kill(workers_of(child)[-1], signal.SIGKILL)
    wait_for(run, reached + 6)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does, to torchrun and to the workers
    _, errors = child.communicate(timeout=60)
    assert "stopped by SIGINT after step" in errors
    newest = newest_checkpoint(run)
    step = int(newest.name.removeprefix("step-"))
    assert f"after step {step};" in errors


@pytest.mark.slow
@pytest.mark.skipif("MOESTRO_MACHINES" not in os.environ, reason="MOESTRO_MACHINES=1: a minute")
def test_machines_restart_and_are_replaced(torchrun, tmp_path):
    """Two torchruns of one process each; a worker of either dies, then all of the second."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    run, where = tmp_path / "run", ["--nnodes", "2", "--nproc-per-node", "1"]
    where += ["--rdzv-backend", "c10d", "--rdzv-endpoint", address, "--rdzv-id", "job"]
    one = torchrun("--max-restarts", "3", where=where)
    with socket.socket() as probe:  # until it has the address, or the other might take it
        while probe.connect_ex(("localhost", int(address.partition(":")[2]))):
            time.sleep(0.1)
    other = torchrun("--max-restarts", "3", where=where)
    reached = wait_for(run, 4)
    for child in (other, one):
        os.kill(workers_of(child)[0], signal.SIGKILL)
        reached = wait_for(run, reached + 6)
    for pid in (other.pid, *workers_of(other)):
        os.kill(pid, signal.SIGKILL)
    other = torchrun("--max-restarts", "3", where=where)
    wait_for(run, reached + 6)
    os.kill(workers_of(other)[0], signal.SIGTERM)  # stops all; torchrun would start them again
    os.kill(one.pid, signal.SIGTERM)
    assert "stopped by SIGTERM after step" in one.communicate(timeout=60)[1]
    verify_folder(newest_checkpoint(run))
