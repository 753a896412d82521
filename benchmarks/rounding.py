"""What int4 costs, and how much of it calibrated rounding takes back; with each of its parts.

Bits per byte of text that a run held out, in bf16, packed as it is, and rounded by `moestro round`
on the text that it was trained on. Every number is of packed weights as `generate` reads them.

    moestro train --config benchmarks/evidence.toml --source corpus/train --out run
    .venv/bin/python benchmarks/rounding.py run
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import measure
from measure import moestro

# What each step adds to the one before.
STEPS = {
    "blocks, clipped by least error": ["--no-importance", "--no-feedback", "--no-head"],
    "and weighed by the inputs": ["--no-feedback", "--no-head"],
    "and errors fed back": ["--no-head"],
    "and the head": [],
}


def rounded(run: Path, weights: str, options: list[str], args: argparse.Namespace) -> list[Any]:
    """The rows of `round`: bf16, packed as it is, rounded."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--weights", weights, "--calibration", args.calibration, "--tokens", args.tokens]
        done = moestro("round", run, Path(folder) / "rounded", *words, *options, "--json")
    rows: list[Any] = json.loads(done.text)["rows"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of `moestro train`")
    parser.add_argument("--weights", nargs="*", default=["int4", "int4-64"])
    parser.add_argument("--calibration", type=int, default=65_536, help="tokens")
    parser.add_argument("--tokens", type=int, default=65_536, help="held out")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for weights in args.weights:
        for name, options in STEPS.items():
            found = [
                each["bits_per_byte"]["all"] for each in rounded(args.run, weights, options, args)
            ]
            names = ("bf16", "as it is", name)
            for what, bits in zip(names, found, strict=True):
                row = {
                    "weights": weights, "rounding": what, "bits per byte": bits,
                    "over bf16, %": 100 * (bits / found[0] - 1),
                }  # fmt: skip
                if row not in rows:
                    rows.append(row)
    claims = {"calibration tokens": args.calibration, "held-out tokens, at most": args.tokens}
    measure.report("rounding", rows, claims)


if __name__ == "__main__":
    main()
