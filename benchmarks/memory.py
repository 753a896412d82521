"""A mixture in less memory than it takes: tokens per second, peak use and what was foretold.

A trained checkpoint gives the routing. Its experts are widened with hidden units of zeros, so that
the model computes what it did and its experts are as large as wanted. Each variant runs in a
process of its own, in a control group of the budget's size where the system allows (cgroup v1,
root): all in memory, the file mapped, and the budget. They decode the same held-out text.

    .venv/bin/moestro train --out runs/memory --set model.attention.context=4096
    .venv/bin/python benchmarks/memory.py --run runs/memory --tokens 2000
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

GROUPS = Path("/sys/fs/cgroup/memory")
SHARES = (0.25, 0.5, 0.75)


def widen(run: Path, factor: int, to: Path) -> None:
    """The packed file of a checkpoint whose experts have `factor` times as many hidden units."""
    import torch

    from moestro.checkpoints import packed_files
    from moestro.checkpoints.opening import open_checkpoint
    from moestro.checkpoints.quantize import WEIGHTS, pack
    from moestro.models.decoder import Decoder

    model = open_checkpoint(run).model
    moe = model.cfg.moe
    moe = moe.model_copy(update={"hidden_dim": moe.hidden_dim * factor})
    cfg = model.cfg.model_copy(update={"moe": moe})
    wide, small = Decoder(cfg).eval(), model.state_dict()
    with torch.no_grad():
        for name, tensor in wide.state_dict().items():
            if tensor.shape == small[name].shape:
                tensor.copy_(small[name])
                continue
            tensor.zero_()
            if name.endswith("gate_up"):  # [E, 2F, D], gate first
                width = small[name].shape[1] // 2
                for half in (0, 1):
                    place = half * width * factor
                    tensor[:, place : place + width] = small[name][:, half * width :][:, :width]
            else:  # down [E, D, F]
                tensor[..., : small[name].shape[-1]] = small[name]
    pack(wide, WEIGHTS["int8"])
    packed_files.save(wide, to, WEIGHTS["int8"], {})


def child(given: dict[str, Any]) -> None:
    """One variant: open the file, decode the text, say how it went."""
    import numpy as np

    from moestro.checkpoints import packed_files, streamed
    from moestro.infer.native_decoder import NativeDecoder
    from moestro.machine import peak_bytes
    from moestro.models.budget import Use

    path, kept = Path(given["file"]), []
    text = np.load(given["text"])
    start = time.perf_counter()
    if given["memory"] is None:
        model = packed_files.load(path)
    else:
        use = Use(len(text), tokens=1)
        within = streamed.Within(given["memory"], use, lambda b, _: kept.extend(b.kept))
        model = streamed.load_within(path, within)
    opened_s = time.perf_counter() - start
    decoder, past = NativeDecoder(model), model.new_cache(1)
    half, times, digest = len(text) // 2, [], hashlib.sha256()
    residency = streamed.residency_of(model)
    before = None
    for place in range(len(text)):
        if place == half and residency is not None:
            before = residency.reads()
        if past.position == model.cfg.attention.context:
            past = model.new_cache(1)
        begun = time.perf_counter()
        made = decoder.step([[int(text[place])]], [past])
        times.append(time.perf_counter() - begun)
        digest.update(made.logits_BV.numpy().tobytes())
    steady = times[half:]  # the caches are full
    facts = {
        "opened_s": opened_s, "tokens_per_s": len(steady) / sum(steady),
        "first_half_per_s": half / sum(times[:half]), "worst_s": max(steady),
        "peak_bytes": peak_bytes(), "kept": kept, "logits": digest.hexdigest(),
    }  # fmt: skip
    if residency is not None and before is not None:
        reads = residency.reads().since(before)
        facts |= {"hit_rate": reads.hit_rate, "read_bytes": reads.bytes / len(steady)}
    print(json.dumps(facts))


def run_child(limit: int | None, **given: Any) -> dict[str, Any]:
    """A variant in a process of its own, at most `limit` bytes of memory where that can be held."""
    fd = os.open(given["file"], os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    group = GROUPS / f"moestro-{os.getpid()}"
    if limit is not None:
        try:
            group.mkdir()
            (group / "memory.limit_in_bytes").write_text(str(limit))
        except OSError:
            group = None
    join = (lambda: (group / "cgroup.procs").write_text("0")) if limit and group else None
    try:
        made = subprocess.run(
            [sys.executable, __file__, "--child", json.dumps(given)],
            stdout=subprocess.PIPE, preexec_fn=join, text=True,
        )  # fmt: skip
        if made.returncode:
            return {"failed": made.returncode}
        found = json.loads(made.stdout.splitlines()[-1])
        if join is not None:
            found["group_peak"] = int((group / "memory.max_usage_in_bytes").read_text())
            found["limit_hit"] = int((group / "memory.failcnt").read_text())
        return found
    finally:
        if limit is not None and group is not None:
            with suppress(OSError):
                group.rmdir()


def measure_file(path: Path, text: Path, trace: Path, length: int) -> list[dict[str, Any]]:
    """All variants of one file, a row for each budget, beside what was foretold of it."""
    from moestro.checkpoints import streamed
    from moestro.models import budget
    from moestro.probe.measures.caching import caching
    from moestro.probe.recording.tracefile import read_trace

    lru_LE = caching(read_trace(trace).end_to_end(), draws=1).lru.rate_LE.tolist()
    use = budget.Use(length, tokens=1)
    needs = budget.needs(*streamed.sizes(path), use)
    slab, files = needs.mixtures[0].slab_bytes, {"file": str(path), "text": str(text)}
    whole = run_child(None, **files, memory=None)
    rows = []
    for share in SHARES:
        memory = needs.fixed + int(share * needs.all_experts)
        own = run_child(memory, **files, memory=memory)
        # The same memory as was used: libraries' pages that others mapped before are not charged.
        mapped = run_child(own.get("group_peak", memory), **files, memory=None)
        disk = streamed.read_rate(path, slab, seconds=1.0)
        got = budget.Budget(memory, needs, tuple(own["kept"]))
        hit, compute_s = budget.mean_hit(got, lru_LE), 1 / whole["tokens_per_s"]
        least, most = budget.tokens_per_s(got, hit, compute_s, disk)
        expected = budget.expected_per_s(got, hit, compute_s, disk)
        peak = own.get("group_peak", own["peak_bytes"])
        rows.append({
            "model": path.stem, "experts MB": needs.all_experts / 1e6, "slab MB": slab / 1e6,
            "share": share, "kept": min(own["kept"]), "hits": own["hit_rate"], "foretold hits": hit,
            "MB/token": own["read_bytes"] / 1e6, "disk MB/s": disk / 1e6,
            "tokens/s": own["tokens_per_s"], "expected": expected, "least": least, "most": most,
            "in memory": whole["tokens_per_s"], "mapped": mapped.get("tokens_per_s", 0.0),
            "of bound": own["tokens_per_s"]
            / min(whole["tokens_per_s"], disk / max(1.0, own["read_bytes"])),
            "worst s": own["worst_s"], "opened s": own["opened_s"], "peak": peak / memory,
            "same bits": own["logits"] == whole["logits"],
        })  # fmt: skip
    return rows


def main() -> None:
    """See the top."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a trained mixture, whose text is bytes")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--factors", type=int, nargs="+", default=[32, 96])
    parser.add_argument("--work", type=Path, default=Path("runs/memory-work"))
    parser.add_argument("--name", default="", help="suffix of the result file")
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        return
    import measure
    import numpy as np

    from moestro.probe.recording.tracefile import read_trace

    args.work.mkdir(parents=True, exist_ok=True)
    trace, text = args.work / "trace.npz", args.work / "text.npy"
    if not trace.exists():
        moestro = Path(sys.executable).parent / "moestro"
        command = [moestro, "probe", args.run, "--trace", trace]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    tokens = read_trace(trace).tokens_T
    np.save(text, tokens[: args.tokens])
    rows = []
    for factor in args.factors:
        path = args.work / f"wide-{factor}.moestro"
        if not path.exists():
            widen(args.run, factor, path)
        rows += measure_file(path, text, trace, args.tokens)
    claims = {
        "same bits at every budget": all(row["same bits"] for row in rows),
        "largest peak / budget": max(row["peak"] for row in rows),
        "worst |measured / expected - 1|": max(
            abs(row["tokens/s"] / row["expected"] - 1) for row in rows
        ),
        "least of bound": min(row["of bound"] for row in rows),
        "least times the mapped file, at 25 %": min(
            row["tokens/s"] / max(row["mapped"], 1e-9) for row in rows if row["share"] == SHARES[0]
        ),
    }
    measure.report("memory" + (f"-{args.name}" if args.name else ""), rows, claims)


if __name__ == "__main__":
    main()
