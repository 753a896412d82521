"""What a save costs training: waiting for it, and while a thread writes a copy.

Three runs of the same steps: saving is waited for, done in the background, or left out. The cost
of a save is the time of a run beyond that of the last kind, over the saves within its steps; the
save at the end, which every run waits for, is not in it. The copy and the write alone stand beside.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

import measure

from moestro.config import RunConfig
from moestro.data.windows import Corpus, prepare
from moestro.models.count import count
from moestro.train.loop import Trainer
from moestro.train.memory import keep_freed_memory
from moestro.train.progress import ProgressDisplay
from moestro.train.saving import Saver
from moestro.train.snapshot import Snapshot

MODES = ("wait", "background", "never")


class Clock(ProgressDisplay):
    """Shows nothing, and keeps when each step was done."""

    def __init__(self) -> None:
        super().__init__()
        self.done_s: list[float] = []

    def update(self, record: object, steps: int) -> None:
        """A step is done; called before its save."""
        self.done_s.append(time.perf_counter())

    def note(self, text: str) -> None:
        """Nothing."""


class Timed:
    """Seconds of each call of a method, for as long as it is entered."""

    def __init__(self, owner: type, name: str) -> None:
        self.owner, self.name, self.call = owner, name, getattr(owner, name)
        self.seconds: list[float] = []

    def __enter__(self) -> list[float]:
        def timed(*given: object) -> object:
            start = time.perf_counter()
            try:
                return self.call(*given)
            finally:
                self.seconds.append(time.perf_counter() - start)

        setattr(self.owner, self.name, timed)
        return self.seconds

    def __exit__(self, *raised: object) -> None:
        setattr(self.owner, self.name, self.call)


def settings(args: argparse.Namespace, mode: str, text: Path) -> RunConfig:
    """Those of one run; the first `save_every` steps warm up."""
    every, steps = args.save_every, args.save_every * (args.saves + 1)
    return RunConfig(
        model={
            "dim": args.dim, "num_layers": 4, "attention": {"num_heads": 4, "context": 256},
            "moe": {"hidden_dim": args.dim, "num_experts": args.experts},
        },
        data={"sources": (str(text),), "seq_len": 256, "held_out": 0.2},
        train={
            "steps": steps, "batch_size": args.batch, "eval_every": 10**9, "eval_tokens": 256,
            "save_every": 10**9 if mode == "never" else every,
            "runtime": {"save": "background" if mode == "background" else "wait"},
        },
    )  # fmt: skip


def text_in(folder: Path) -> Path:
    """A folder of random texts."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=5)) for _ in range(500)]
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text(" ".join(draw.choices(words, k=2000)))
    return folder


def main() -> None:
    parser = measure.arguments(__doc__ or "", repeats=3)
    for name, default in (
        ("dim", 256), ("experts", 32), ("batch", 4), ("save-every", 8), ("saves", 3),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    keep_freed_memory()
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    with (
        tempfile.TemporaryDirectory(dir=".") as folder,
        Timed(Snapshot, "copied") as copies,
        Timed(Saver, "_run") as writes,
    ):
        root = Path(folder)
        text = text_in(root / "text")
        corpus: Corpus = prepare(settings(args, "wait", text).data, root / "data")
        for turn in range(args.repeats):
            for mode in MODES:
                clock = Clock()
                run = root / f"{mode} {turn}"
                Trainer(settings(args, mode, text), run, corpus, clock).train()
                first = args.save_every - 1  # the save of this step is the first counted
                seconds[mode].append(clock.done_s[-1] - clock.done_s[first])
        size = 12 * count(settings(args, "wait", text).model).total
    rows = [
        {
            "mode": mode, "seconds": min(found),
            "a save costs": (min(found) - min(seconds["never"])) / args.saves,
        }
        for mode, found in seconds.items()
    ]  # fmt: skip
    facts = {
        "checkpoint GB": size / 1e9, "copy, median s": sorted(copies)[len(copies) // 2],
        "write, median s": sorted(writes)[len(writes) // 2],
    }  # fmt: skip
    measure.report(f"saving{args.name}", rows, facts)


if __name__ == "__main__":
    main()
