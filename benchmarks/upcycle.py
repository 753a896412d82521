"""Upcycled and trained on, against the dense model trained on: equal FLOPs, held-out loss.

Each side's learning rate is the best of the same trials, on one seed and one half of the held-out
text; what is reported is of other seeds and the other half. A seed is the order of the text, what
upcycling draws, and, where no model is given, the dense model itself. Differences are paired by
seed; the interval is Student's, of 95 %. A side whose best rate is at the end of the list needs a
longer list. A run that was interrupted goes on where it was; more rates may be given to it.

    .venv/bin/python benchmarks/upcycle.py --quick
    .venv/bin/python benchmarks/upcycle.py                                    # of a tiny model
    .venv/bin/python benchmarks/upcycle.py --dense MODEL --rates 1e-5 3e-5 1e-4 --steps 300
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import measure
from measure import moestro

from moestro.checkpoints.hub import find_checkpoint
from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.reading import read_settings
from moestro.config import DataConfig
from moestro.data.builtin import library_texts
from moestro.data.domains import ALL
from moestro.data.windows import Corpus, HeldOut, prepare
from moestro.train.evaluate import evaluate
from moestro.train.intervals import half_width
from moestro.train.task import train_flops

DENSE = "dense"
SIDES = {
    DENSE: None,
    "copies": ["--experts", "8", "--top-k", "2"],
    "slices": ["--experts", "16", "--top-k", "4", "--granularity", "2"],
    "drop": ["--experts", "8", "--top-k", "2", "--method", "drop"],
}
HELD_OUT = 8  # one module in so many
TUNING_SEED = 0
SHORT_S = 256


class Study(NamedTuple):
    """What all runs share."""

    args: argparse.Namespace
    corpus: Corpus

    def half(self, reported: bool) -> dict[str, HeldOut]:
        """Held-out windows: those that are reported, or those that choose a learning rate."""
        if reported:
            return self.corpus.held_out(self.args.tokens)
        windows = min(self.args.tokens // SHORT_S, self.corpus.windows_per_epoch)
        return {"text": HeldOut(self.corpus.batch(0, windows), 1.0)}


def write_texts(out: Path, most_bytes: int) -> None:
    """The standard library's code and prose, part of its modules held out."""
    taken: dict[tuple[str, str], int] = {}
    for text in library_texts():
        side = "train" if zlib.crc32(text.module.encode()) % HELD_OUT else "held"
        limit = most_bytes if side == "train" else most_bytes // 4
        for kind in ("code", "english"):
            content = getattr(text, kind)
            if content and taken.get((side, kind), 0) < limit:
                taken[side, kind] = taken.get((side, kind), 0) + len(content)
                path = out / side / kind / f"{text.module.replace('/', '__')}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content, encoding="utf-8")


def base_of(seed: int, args: argparse.Namespace) -> Path:
    """The dense model of a seed: the one given, or a tiny one, trained here once."""
    if args.dense is not None:
        given = Path(args.dense)
        return given.absolute() if given.exists() else given
    run = Path(args.out / f"dense-{seed}")
    if not run.exists():
        sizes = ["dim=64", "num_layers=2", "dense.hidden_dim=128"] if args.quick else []
        sets = ["model.moe=null", *(f"model.{each}" for each in sizes)]
        sets += [f"train.seed={seed}", f"data.seed={seed}", f"train.steps={args.pretrain}"]
        shutil.rmtree(args.out / "dense", ignore_errors=True)
        train(args.out / "dense", args, sets)
        (args.out / "dense").rename(run)
    return run


def train(run: Path, args: argparse.Namespace, sets: list[str], init: Path | None = None) -> None:
    sets = [
        f"data.seq_len={SHORT_S}", f"train.batch_size={args.batch}", "train.eval_every=1000000",
        "train.eval_tokens=1024", "train.save_every=1000000", *sets,
    ]  # fmt: skip
    begin = [] if init is None else ["--init", init]
    words = [word for each in sets for word in ("--set", each)]
    moestro("train", *begin, "--source", args.out / "text" / "train", "--out", run, *words)


def trained_on(side: str, seed: int, rate: float, study: Study, reported: bool) -> float:
    """Held-out bits per byte (per token in trials) of one side of one seed."""
    args, dense = study.args, base_of(seed, study.args)
    path, key = args.out / "found.json", f"{side} seed {seed} rate {rate:g}"
    found: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    if key in found:
        return found[key]
    begin, options = dense, SIDES[side]
    if options is not None:
        begin = args.out / "upcycled"
        shutil.rmtree(begin, ignore_errors=True)
        moestro("upcycle", dense, begin, *options, "--seed", seed)
    steps, run = steps_of(side, begin, dense, args), args.out / "run"
    sets = [f"optim.lr={rate}", f"train.steps={steps}", f"data.seed={seed}"]
    shutil.rmtree(run, ignore_errors=True)
    train(run, args, sets, begin)
    model = open_checkpoint(find_checkpoint(run)).model
    bits = evaluate(model, study.half(reported), 8)[ALL]
    shutil.rmtree(run)
    print(f"{key}: {steps} steps, {bits:.4f}", flush=True)
    path.write_text(json.dumps(found | {key: bits}, indent=1))
    return bits


def steps_of(side: str, begin: Path, dense: Path, args: argparse.Namespace) -> int:
    """As many as cost what the dense model's steps do."""
    flops = [train_flops(read_settings(find_checkpoint(each)).cfg, SHORT_S)
             for each in (dense, begin)]  # fmt: skip
    return round(args.steps * flops[0] / flops[1])


def row_of(side: str, rate: float, bits: list[float], dense: list[float]) -> dict[str, Any]:
    """Mean of the seeds, and the difference to the dense side with its interval."""
    more = [one - other for one, other in zip(bits, dense, strict=True)]
    half, difference = half_width(more), statistics.fmean(more)
    low, high = (None, None) if side == DENSE else (difference - half, difference + half)
    return {
        "side": side, "learning rate": rate, "bits per byte": statistics.fmean(bits),
        "difference": difference, "low": low, "high": high,
        "each seed": " ".join(f"{each:.4f}" for each in bits),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps of a tiny model")
    parser.add_argument("--dense", help="the model to begin from; default a tiny one, trained here")
    parser.add_argument("--sides", nargs="*", choices=list(SIDES)[1:], default=list(SIDES)[1:])
    parser.add_argument("--rates", nargs="*", type=float, default=[5e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", type=int, default=3, help="reported ones, 2 to 10")
    parser.add_argument("--pretrain", type=int, default=800, help="steps of the dense model")
    parser.add_argument("--steps", type=int, default=400, help="more, of the dense side")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=65_536, help="held out")
    parser.add_argument("--out", type=Path, default=measure.ROOT / "runs" / "upcycle")
    args = parser.parse_args()
    args.out = args.out.absolute()
    if args.quick:
        args.pretrain, args.steps, args.batch, args.seeds = 20, 20, 4, 2
        args.rates, args.sides, args.tokens = args.rates[:2], args.sides[:1], 4096
    lasting = ("quick", "dense", "pretrain", "steps", "batch", "tokens")  # alike in all runs
    measure.claim(args.out, {name: getattr(args, name) for name in lasting})
    write_texts(args.out / "text", 100_000 if args.quick else 3_000_000)
    held = DataConfig(
        sources=(str(args.out / "text" / "held"),), seq_len=SHORT_S, held_out=0.5,
        tokenizer=str(find_checkpoint(base_of(TUNING_SEED, args))),
    )  # fmt: skip
    study = Study(args, prepare(held, args.out / "held"))
    found: dict[str, list[float]] = {}
    best: dict[str, float] = {}
    for side in (DENSE, *args.sides):
        trials = {
            rate: trained_on(side, TUNING_SEED, rate, study, reported=False) for rate in args.rates
        }
        best[side] = min(trials, key=lambda rate: trials[rate])
        seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + args.seeds)
        found[side] = [trained_on(side, seed, best[side], study, reported=True) for seed in seeds]
    rows = [row_of(side, best[side], bits, found[DENSE]) for side, bits in found.items()]
    claims = {"seeds": args.seeds, "trials of each side": len(args.rates), "steps": args.steps}
    measure.report("upcycle" + "-quick" * args.quick, rows, claims)


if __name__ == "__main__":
    main()
