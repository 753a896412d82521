"""Lay out the text of docs/evidence.md: training and held-out folders, one sub-folder a domain.

    python benchmarks/evidence_corpus.py GRID OUT

GRID holds <domain>/{train,valid,test}.txt, documents ended by one NUL byte. OUT gets train/<domain>
and held_out/<domain> (valid and test together). A domain `code-python` is added from this Python's
own library, split by top-level module, so that no package is on both sides.
"""

from __future__ import annotations

import argparse
import shutil
import sysconfig
import zlib
from pathlib import Path

CODE_BYTES = {"train": 2_200_000, "held_out": 380_000}
HELD_OUT_SHARE = 6  # One module in so many is held out.


def main() -> None:
    """Read the two folders from the command line and write the corpus."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("grid", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    domains = sorted(path.name for path in given.grid.iterdir() if path.is_dir())
    for domain in domains:
        for side, files in (("train", ["train"]), ("held_out", ["valid", "test"])):
            folder = given.out / side / domain
            folder.mkdir(parents=True, exist_ok=True)
            for name in files:
                shutil.copy(given.grid / domain / f"{name}.txt", folder / f"{name}.txt")
    for side, size in write_code(given.out).items():
        print(f"code-python {side}: {size:,} bytes")
    print(f"{len(domains) + 1} domains in {given.out}")


def write_code(out: Path) -> dict[str, int]:
    """Copy modules of the standard library, in an order that depends on their names alone."""
    library = Path(sysconfig.get_paths()["stdlib"])
    taken = {"train": 0, "held_out": 0}
    sources = [path for path in library.rglob("*.py") if "site-packages" not in path.parts]
    for path in sorted(
        sources, key=lambda path: zlib.crc32(str(path.relative_to(library)).encode())
    ):
        inside = path.relative_to(library)
        top = zlib.crc32(inside.parts[0].removesuffix(".py").encode())
        side = "train" if top % HELD_OUT_SHARE else "held_out"
        size = path.stat().st_size
        if inside.parts[0] in ("test", "idlelib") or not 400 < size < 40_000:
            continue
        if taken[side] + size <= CODE_BYTES[side]:
            target = out / side / "code-python" / inside.as_posix().replace("/", "__")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
            taken[side] += size
    return taken


if __name__ == "__main__":
    main()
