"""How benchmarks measure: variants interleaved, commands in their processes, a table and JSON."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moestro.machine import cpu_name

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def interleave(
    variants: dict[str, Callable[[], Any]], repeats: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of each call, the variants taking turns so that drift of the machine hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + repeats):
        for name, run in variants.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times `fast` is as fast, by the medians, as the rates beside it are."""
    return statistics.median(slow) / statistics.median(fast)


def claim(out: Path, given: dict[str, Any]) -> None:
    """Take a folder for a study of these arguments, or go on with one of the same."""
    begun = out / "args.json"
    if out.exists() and not (begun.exists() and json.loads(begun.read_text()) == given):
        raise SystemExit(f"{out} is of other arguments; remove it, or give another --out")
    out.mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(given))


class Done(NamedTuple):
    """What a command printed, and its peak resident set."""

    text: str
    peak_bytes: int


# What the system tells of a child that has ended is at least the peak of its parent until then.
_WITH_PEAK = """
import sys
from pathlib import Path
from moestro.cli.main import main
from moestro.machine import peak_bytes
status = main(sys.argv[2:])
Path(sys.argv[1]).write_text(str(peak_bytes()))
sys.exit(status)
"""


def moestro(*words: object) -> Done:
    """Run the command line in a process of its own."""
    given = [str(word) for word in words]
    with tempfile.NamedTemporaryFile("r") as peak:
        command = [sys.executable, "-c", _WITH_PEAK, peak.name, *given]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False)
        if done.returncode:
            raise SystemExit(f"moestro {' '.join(given)} failed")
        return Done(done.stdout, int(peak.read()))


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    commit = _git("rev-parse", "--short", "HEAD")
    if _git("status", "--porcelain", "--", "src", "benchmarks/*.py"):
        commit += "-dirty"  # the code measured is not the commit's
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "device": device,
        "cpu": cpu_name(),
        "amx": bool(torch.cpu._is_amx_tile_supported()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def _git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def report(name: str, rows: list[dict[str, Any]], claims: dict[str, Any]) -> None:
    """Print a table and write `results/NAME.json`."""
    keys = list(rows[0])
    cells = [[_cell(row.get(key, "")) for key in keys] for row in rows]
    widths = [max(len(key), *(len(row[i]) for row in cells)) for i, key in enumerate(keys)]
    print("  ".join(key.ljust(width) for key, width in zip(keys, widths, strict=True)))
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    for claim, value in claims.items():
        print(f"{claim}: {_cell(value)}")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    result = {"benchmark": name, "machine": machine(), "claims": claims, "rows": rows}
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    print(f"written to {path.relative_to(ROOT)}")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def arguments(description: str, repeats: int) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--name", default="", help="suffix of the result file")
    return parser
