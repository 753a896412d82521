"""Tokens per second of two processes with one thread each over one process with two threads.

The same model and batch, its text this project's docs. Experts split over both processes: the
difference is the exchange on loopback, and what two processes gain by having no common memory. Each
turn starts the processes anew and takes the median of its steps; turns alternate. Run it on a quiet
machine: two busy cores are all it has.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure
import torch

from moestro.config import RunConfig
from moestro.data.windows import prepare
from moestro.train.distributed import joined
from moestro.train.loop import Trainer

DOCS = Path(__file__).parents[1] / "docs"
LAYOUTS: dict[str, dict[str, Any]] = {
    "expert 2": {"expert": 2},
    "expert 2, shard 2": {"expert": 2, "shard": 2},
    "data parallel": {},
}


def settings(parallel: dict[str, Any]) -> RunConfig:
    """A mixture of 16 experts."""
    return RunConfig(
        model={
            "dim": 256, "num_layers": 4, "attention": {"num_heads": 4, "context": 256},
            "moe": {"hidden_dim": 256, "num_experts": 16, "top_k": 2},
        },
        data={"seq_len": 256, "sources": (str(DOCS),)},
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


def started(folder: Path, ranks: int, steps: int, parallel: dict[str, Any]) -> float:
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
    """Print all rates and their ratios."""
    parser = measure.arguments(__doc__ or "", repeats=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rank", type=Path)
    parser.add_argument("--parallel", default="{}")
    given = parser.parse_args()
    if given.rank is not None:
        rank_main(given.rank, given.steps, json.loads(given.parallel))
        return
    found: dict[str, list[float]] = {name: [] for name in ("one process", *LAYOUTS)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(given.repeats):
            for layout, rates in found.items():
                ranks = 1 if layout == "one process" else 2
                rates.append(started(folder, ranks, given.steps, LAYOUTS.get(layout, {})))
    one = statistics.median(found["one process"])
    rows = [
        {
            "layout": layout,
            "tokens/s": statistics.median(rates),
            "least": min(rates),
            "most": max(rates),
            "over one process": statistics.median(rates) / one,
        }
        for layout, rates in found.items()
    ]
    claims = {f"{row['layout']} over one process": row["over one process"] for row in rows[1:]}
    measure.report(f"parallel{given.name}", rows, claims)


if __name__ == "__main__":
    main()
