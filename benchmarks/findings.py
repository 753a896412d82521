"""`moestro check` over every mixture there is: transformers' families, this project's, and others'.

    .venv/bin/python benchmarks/findings.py                   # all; also results/findings.json
    .venv/bin/python benchmarks/findings.py --only Mixtral    # names that contain this
    .venv/bin/python benchmarks/findings.py --kinds others
    .venv/bin/python benchmarks/findings.py --seeds 5 --workers 1

Families of transformers are those of tests/probe/foreign_zoo.py, tiny, under eager, grouped_mm,
batched_mm and moestro's plug: at seed 0 under all of them, at each further seed under the next.
This project's layers run under every backend of this machine, packed, and streamed from a file.
Mixtures of other packages are those of benchmarks/other_mixtures.py that are installed. Each runs
in a worker with limits of time and memory; one that exceeds them is reported as unchecked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import measure
import other_mixtures
import torch

from moestro import MoE, MoEConfig
from moestro.check.checks.table import chosen
from moestro.check.packed import of_packed
from moestro.check.report import Report
from moestro.check.running import all_found
from moestro.check.subject import Subject
from moestro.check.targets import made_by, of_moe
from moestro.checkpoints import packed_files, streamed
from moestro.checkpoints.quantize import WEIGHTS, pack
from moestro.config import ModelConfig
from moestro.models.decoder import Decoder

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the table of families of the tests

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", "moestro")
CPU_S = 60  # of one target
MEMORY_BYTES = 8 << 30  # of address space of a worker
# Widths that grouped_mm takes in bf16; what a family does not know, it is not given.
FITTING = {
    "moe_intermediate_size": 16, "intermediate_size": 24, "shared_expert_intermediate_size": 8,
    "shared_intermediate_size": 8, "expert_ffn_hidden_size": 16, "ffn_hidden_size": 24,
    "moe_shared_expert_intermediate_size": 8, "share_expert_dim": 8, "router_hidden_size": 16,
}  # fmt: skip
OURS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "switch": {"top_k": 1, "activation": "relu"},
    "deepseek": {
        "num_experts": 8, "top_k": 3, "shared": {"hidden_dim": 6, "gate": True},
        "router": {"kind": "sigmoid", "selection_bias": True, "num_groups": 2, "top_groups": 1,
                   "scale": 2.5},
    },
    "biased": {"experts": {"bias": True}, "router": {"bias": True}},
    "capacity": {"capacity": {"factor": 0.75}},
}  # fmt: skip
# How this project's layers run: backends, weights that are packed, trained through, and streamed.
OWN_WAYS = ("reference", "segments", "auto", "packed fp32", "packed bf16",
            "packed int8", "packed int4", "through int8", "streamed int8")  # fmt: skip

Target = tuple[str, str, str, int]


def targets(kinds: list[str], seeds: int) -> Iterator[Target]:
    """Kind, name, implementation or way to run, and seed."""
    if "families" in kinds:
        from tests.probe import foreign_zoo

        for name in foreign_zoo.FAMILIES:
            for implementation in IMPLEMENTATIONS:
                yield "families", name, implementation, 0
            for seed in range(1, seeds):
                yield "families", name, IMPLEMENTATIONS[seed % len(IMPLEMENTATIONS)], seed
    if "ours" in kinds:
        for name in OURS:
            for way in OWN_WAYS:
                yield from (("ours", name, way, seed) for seed in range(seeds))
    if "others" in kinds:
        for name in other_mixtures.FACTORIES:
            yield from (("others", name, "", seed) for seed in range(seeds))


def own(name: str, way: str) -> Subject:
    """A layer of this project, as `OWN_WAYS` says."""
    sizes = {"dim": 32, "hidden_dim": 16, "num_experts": 4, "top_k": 2, **OURS[name]}
    how, _, weights = way.partition(" ")
    layer, title = MoE(MoEConfig(**sizes), "auto" if weights else how), f"MoE, {name}, {way}"
    if not weights:
        return of_moe(layer, title)
    layer.eval()
    for each in ("experts", "shared"):
        if getattr(layer, each) is not None:
            setattr(layer, each, getattr(layer, each).to_packed(WEIGHTS[weights]))
            getattr(layer, each).passes_gradients = how == "through"
    if how != "streamed":
        return of_packed(layer, title)
    with tempfile.TemporaryDirectory() as folder:
        whole = {"vocab_size": 64, "num_layers": 1, "attention": {"num_heads": 2, "context": 16}}
        mixture = {key: value for key, value in sizes.items() if key != "dim"}
        model = Decoder(ModelConfig(**whole, dim=sizes["dim"], moe=mixture)).eval()
        pack(model, WEIGHTS[weights])
        packed_files.save(model, Path(folder) / "packed", WEIGHTS[weights], {})
        (resident,) = model.mixtures()
        (layer,) = streamed.load(Path(folder) / "packed", [2]).mixtures()
        return of_packed(layer, title, resident)


def subjects(kind: str, name: str, how: str, seed: int) -> list[Subject]:
    """What is checked under one name."""
    torch.manual_seed(seed)
    if kind == "ours":
        return [own(name, how)]
    if kind == "others":
        return [made_by(other_mixtures.FACTORIES[name], name)]
    from tests.probe import foreign_zoo

    from moestro.check.foreign_models import subjects as of_model

    foreign_zoo.SIZES.update(FITTING)
    listed = isinstance(foreign_zoo.FAMILIES[name].get("moe_intermediate_size"), list)
    changes = {"moe_intermediate_size": [16, 16]} if listed else {}
    return of_model(foreign_zoo.build(name, **changes), how)


class TooLong(Exception):
    """The processor time of one target is over."""


def check_one(target: Target) -> dict[str, Any]:
    """One row: what was found under one name, in at most CPU_S."""

    def over(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    start, cpu = time.perf_counter(), time.process_time()
    row: dict[str, Any] = dict(zip(("kind", "name", "how", "seed"), target, strict=True))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reports = all_found(subjects(*target), chosen(), row["seed"])
        row |= summary(reports)
    except TooLong:
        row["unchecked"] = {f"more than {CPU_S} s": "all"}
    except Exception as error:
        first = str(error).split("\n")[0][:300]
        row["unchecked"] = {f"{type(error).__name__}: {first}": "all"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    took = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    return row | {name: round(each, 2) for name, each in took.items()}


def summary(reports: list[Report]) -> dict[str, Any]:
    """What is wrong and could not be checked, with words; how many of the others there are."""
    rows = [(report.title, each) for report in reports for each in report.found]
    counts = Counter(each.finding.outcome for _, each in rows)
    return {
        "titles": [report.title for report in reports],
        "wrong": {
            each.check: f"{title}: {each.finding.words}"
            for title, each in rows
            if each.finding.outcome == "wrong"
        },
        "unchecked": {  # one reason for all is said once
            each.finding.words: each.check
            for _, each in rows
            if each.finding.outcome == "unchecked"
        },
        "ok": counts["ok"],
        "skipped": counts["skipped"],
    }


def limited() -> None:
    """A worker: one thread, and no more memory than it may have."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--kinds", nargs="*", default=["families", "ours", "others"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1, help="seed 0 and how many in all")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "findings.json")
    arguments = parser.parse_args()
    listed = targets(arguments.kinds, arguments.seeds)
    chosen_targets = [each for each in listed if arguments.only.lower() in each[1].lower()]
    start, rows = time.perf_counter(), []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, context, limited) as pool:
        waiting = [pool.submit(check_one, each) for each in chosen_targets]
        for target, future in zip(chosen_targets, waiting, strict=True):
            with contextlib.suppress(KeyboardInterrupt):
                try:
                    row = future.result()
                except Exception as error:  # the worker ended: memory
                    row = dict(zip(("kind", "name", "how", "seed"), target, strict=True))
                    row |= {"unchecked": {repr(error): "all"}}
                rows.append(row)
                print(line(row), flush=True)
    result = {
        "machine": measure.machine(), "seeds": arguments.seeds, "workers": arguments.workers,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(sum(row.get("cpu_seconds", 0) for row in rows), 1), "rows": rows,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(rows)} targets in {result['seconds']} s; {arguments.out}")


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    wrong, unchecked = row.get("wrong", {}), row.get("unchecked", {})
    words = [f"✗ {name}: {each}" for name, each in wrong.items()]
    words += [f"? {each}" for each in unchecked]
    head = f"{row['name']:30} {row['how']:13} {row['seed']} {row.get('cpu_seconds', 0):6.1f} s  "
    return head + (f"✓ {row['ok']} checks" if not words else "; ".join(words))


if __name__ == "__main__":
    main()
