"""`moestro check` over every mixture there is: transformers' families, this project's, and others'.

    .venv/bin/python benchmarks/findings.py                   # all; also results/findings.json
    .venv/bin/python benchmarks/findings.py --only Mixtral    # names that contain this
    .venv/bin/python benchmarks/findings.py --kinds others

Families of transformers are those of tests/probe/foreign_zoo.py, tiny, under eager, grouped_mm,
batched_mm and moestro's plug. Mixtures of other packages are those of benchmarks/other_mixtures.py
that are installed. Each runs in a worker with limits of time and memory; one that exceeds them is
reported as unchecked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import measure
import other_mixtures
import torch

from moestro import MoE, MoEConfig
from moestro.check.checks.table import chosen
from moestro.check.report import Report
from moestro.check.running import begun, found
from moestro.check.subject import Subject
from moestro.check.targets import made_by, of_moe

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the table of families of the tests

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", "moestro")
TIME_S = 60  # of one target
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
BACKENDS = ("reference", "segments", "auto")


def targets(kinds: list[str]) -> Iterator[tuple[str, str, str]]:
    """Kind, name, and implementation or backend."""
    if "families" in kinds:
        from tests.probe import foreign_zoo

        for name in foreign_zoo.FAMILIES:
            for implementation in IMPLEMENTATIONS:
                yield "families", name, implementation
    if "ours" in kinds:
        for name in OURS:
            for backend in BACKENDS:
                yield "ours", name, backend
    if "others" in kinds:
        for name in other_mixtures.FACTORIES:
            yield "others", name, ""


def subjects(kind: str, name: str, how: str) -> list[Subject]:
    """What is checked under one name."""
    torch.manual_seed(0)
    if kind == "ours":
        sizes = {"dim": 16, "hidden_dim": 8, "num_experts": 4, "top_k": 2}
        layer = MoE(MoEConfig(**{**sizes, **OURS[name]}), how)
        return [of_moe(layer, f"MoE, {name}, {how}")]
    if kind == "others":
        return [made_by(other_mixtures.FACTORIES[name], name)]
    from tests.probe import foreign_zoo

    from moestro.check.foreign_models import subjects as of_model

    foreign_zoo.SIZES.update(FITTING)
    listed = isinstance(foreign_zoo.FAMILIES[name].get("moe_intermediate_size"), list)
    changes = {"moe_intermediate_size": [16, 16]} if listed else {}
    return of_model(foreign_zoo.build(name, **changes), how)


class TooLong(Exception):
    """The time of one target is over."""


def check_one(target: tuple[str, str, str], seed: int) -> dict[str, Any]:
    """One row: what was found under one name, in at most TIME_S."""

    def over(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, over)
    signal.alarm(TIME_S)
    start, row = time.perf_counter(), dict(zip(("kind", "name", "how"), target, strict=True))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reports = [found(begun(each, seed), chosen()) for each in subjects(*target)]
        row |= summary(reports)
    except TooLong:
        row["unchecked"] = {"all": f"more than {TIME_S} s"}
    except Exception as error:
        first = str(error).split("\n")[0][:300]
        row["unchecked"] = {"all": f"{type(error).__name__}: {first}"}
    finally:
        signal.alarm(0)
    return row | {"seconds": round(time.perf_counter() - start, 2)}


def summary(reports: list[Report]) -> dict[str, Any]:
    """Checks by outcome: what is wrong and could not be checked with words, the rest by name."""
    rows = [(report.title, each) for report in reports for each in report.found]
    return {
        "titles": [report.title for report in reports],
        **{
            outcome: {
                each.check: f"{title}: {each.finding.words}"
                for title, each in rows
                if each.finding.outcome == outcome
            }
            for outcome in ("wrong", "unchecked")
        },
        **{
            outcome: sorted({each.check for _, each in rows if each.finding.outcome == outcome})
            for outcome in ("ok", "skipped")
        },
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "findings.json")
    arguments = parser.parse_args()
    chosen_targets = [t for t in targets(arguments.kinds) if arguments.only.lower() in t[1].lower()]
    start, rows = time.perf_counter(), []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, context, limited) as pool:
        waiting = [pool.submit(check_one, t, arguments.seed) for t in chosen_targets]
        for target, future in zip(chosen_targets, waiting, strict=True):
            with contextlib.suppress(KeyboardInterrupt):
                try:
                    row = future.result()
                except Exception as error:  # the worker ended: memory
                    row = {"name": target[1], "how": target[2], "unchecked": {"all": repr(error)}}
                rows.append(row)
                print(line(row), flush=True)
    result = {
        "machine": measure.machine(), "seed": arguments.seed,
        "seconds": round(time.perf_counter() - start, 1), "rows": rows,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(rows)} targets in {result['seconds']} s; {arguments.out}")


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    wrong, unchecked = row.get("wrong", {}), row.get("unchecked", {})
    words = [f"✗ {name}: {each}" for name, each in wrong.items()]
    words += [f"? {name}: {each}" for name, each in unchecked.items()]
    head = f"{row['name']:34} {row['how']:10} {row.get('seconds', 0):6.1f} s  "
    return head + (f"✓ {len(row.get('ok', []))} checks" if not words else "; ".join(words))


if __name__ == "__main__":
    main()
