"""Tokens per second of two processes with one thread each over one process with two threads.

The same model and batch, its text this project's docs. Experts split over both processes: the
difference is the exchange on loopback, what two processes gain by having no common memory, and what
one waits for the other where experts get unequal shares. Expert choice gives each expert the same,
so it shows the exchange alone; softmax routing is that of the first steps, before any balance is
learned. Each turn starts the processes anew and takes the median of its steps; turns alternate. Run
it on a quiet machine: two busy cores are all it has.
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
ROUTERS = ("expert_choice", "softmax")
LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "expert 2": {"expert": 2},
    "expert 2, shard 2": {"expert": 2, "shard": 2},
    "data parallel": {},
}


def settings(parallel: dict[str, Any], router: str) -> RunConfig:
    """A mixture of 16 experts."""
    return RunConfig(
        model={
            "dim": 256, "num_layers": 4, "attention": {"num_heads": 4, "context": 256},
            "moe": {"hidden_dim": 256, "num_experts": 16, "top_k": 2, "router": {"kind": router}},
        },
        data={"seq_len": 256, "sources": (str(DOCS),)},
        train={
            "batch_size": 16, "dtype": "float32", "runtime": {"device": "cpu"},
        },
        parallel=parallel,
    )  # fmt: skip


def rank_main(folder: Path, steps: int, parallel: dict[str, Any], router: str) -> None:
    """Time the steps; the first rank prints tokens per second."""
    cfg = settings(parallel, router)
    with joined(torch.device("cpu")) as ranks:
        if ranks.writes:
            prepare(cfg.data, folder)
        ranks.wait()
        corpus = prepare(cfg.data, folder)
        seconds = Trainer(cfg, folder / "run", corpus, ranks=ranks).time_steps(steps)
        if ranks.writes:
            print(cfg.train.batch_size * cfg.data.seq_len / seconds)


def started(folder: Path, steps: int, router: str, layout: str) -> float:
    """Tokens per second with two threads in all."""
    ranks = 1 if layout == "one process" else 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    children = []
    for rank in map(str, range(ranks)):
        own = {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": str(2 // ranks)}
        words = [sys.executable, __file__, "--rank", str(folder), "--steps", str(steps)]
        words += ["--parallel", json.dumps(LAYOUTS[layout]), "--router", router]
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
    parser.add_argument("--router", default=ROUTERS[0])
    given = parser.parse_args()
    if given.rank is not None:
        rank_main(given.rank, given.steps, json.loads(given.parallel), given.router)
        return
    found: dict[tuple[str, str], list[float]] = {
        (router, layout): [] for router in ROUTERS for layout in LAYOUTS
    }
    with tempfile.TemporaryDirectory() as name:
        for _ in range(given.repeats):
            for (router, layout), rates in found.items():
                rates.append(started(Path(name) / router, given.steps, router, layout))
    rows, claims = [], {}
    for (router, layout), rates in found.items():
        rate, one = (
            statistics.median(each) for each in (rates, found[router, next(iter(LAYOUTS))])
        )
        rows.append(
            {
                "router": router,
                "layout": layout,
                "tokens/s": rate,
                "least": min(rates),
                "most": max(rates),
                "over one process": rate / one,
            }
        )
        if rates is not found[router, next(iter(LAYOUTS))]:
            claims[f"{router}, {layout}: over one process"] = rate / one
    measure.report(f"parallel{given.name}", rows, claims)


if __name__ == "__main__":
    main()
