"""Tokens per second of two processes with one thread each over one process with two threads.

    .venv/bin/python benchmarks/parallel.py --steps 10

The same model and batch, experts split over both processes; the difference is the exchange on
loopback, and what two processes gain by having no common memory. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from moestro.config import RunConfig
from moestro.data.windows import prepare
from moestro.train.distributed import joined
from moestro.train.loop import Trainer


def settings(parallel: dict[str, Any]) -> RunConfig:
    """A mixture of 16 experts."""
    return RunConfig(
        model={
            "dim": 256, "num_layers": 4, "attention": {"num_heads": 4, "context": 256},
            "moe": {"hidden_dim": 256, "num_experts": 16, "top_k": 2},
        },
        data={"seq_len": 256},
        train={
            "batch_size": 16, "dtype": "float32", "runtime": {"device": "cpu"},
        },
        parallel=parallel,
    )  # fmt: skip


def rank_main(folder: Path, steps: int, parallel: dict[str, Any]) -> None:
    """Time the steps; the first rank prints tokens per second."""
    cfg = settings(parallel)
    with joined(torch.device("cpu")) as ranks:
        if ranks.writes:
            prepare(cfg.data, folder)
        ranks.wait()
        corpus = prepare(cfg.data, folder)
        seconds = Trainer(cfg, folder / "run", corpus, ranks=ranks).time_steps(steps)
        if ranks.writes:
            print(cfg.train.batch_size * cfg.data.seq_len / seconds)


def measure(folder: Path, ranks: int, steps: int, parallel: dict[str, Any]) -> float:
    """Tokens per second with two threads in all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    children = []
    for rank in map(str, range(ranks)):
        own = {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": str(2 // ranks)}
        words = [sys.executable, __file__, "--rank", str(folder), "--steps", str(steps)]
        words += ["--parallel", json.dumps(parallel)]
        env = os.environ | shared | own
        children.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [child.communicate()[0] for child in children]
    return float(outputs[0])


def main() -> None:
    """Print both rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rank", type=Path)
    parser.add_argument("--parallel", default="{}")
    given = parser.parse_args()
    if given.rank is not None:
        rank_main(given.rank, given.steps, json.loads(given.parallel))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one = measure(folder, 1, given.steps, {})
        for parallel in ({"expert": 2}, {"expert": 2, "shard": 2}, {}):
            two = measure(folder, 2, given.steps, parallel)
            print(json.dumps({"two": parallel, "tokens_per_s": two, "over one": two / one}))


if __name__ == "__main__":
    main()
