"""A mixture in less memory than it takes: tokens per second, peak use and what was foretold.

A trained checkpoint gives the routing. Its experts are widened with hidden units of zeros, so that
the model computes what it did, routes as it was trained to, and its experts are as large as wanted.
Each variant runs in a process of its own, in a control group of the budget's size where the system
allows (root): all in memory, the file mapped, and the budget. They decode the same held-out text,
then eight others as long together. What is foretold comes from half a second of measuring in that
process, and from the routing of other text than is decoded.

Two bounds: as fast as in memory, or as the disk reads what is missing (all reading passes while
something is computed); and both, one after the other (none does).

    .venv/bin/moestro train --out runs/memory --set model.attention.context=4096
    .venv/bin/python benchmarks/memory.py --run runs/memory
    .venv/bin/python benchmarks/memory.py --run runs/memory --quick --name quick  # 5 minutes
    .venv/bin/python benchmarks/memory.py --run runs/memory --compare "NAME=PROGRAM AND OPTIONS"

The last one runs llama.cpp on the same weights in Q8_0 in the same group: `llama_cpp.py` (see it)
over the same text, or a llama-bench, which decodes random tokens. Draws docs/figures/memory.png.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Version 1 of control groups, then 2: where they are, what limits one, and its most use until now.
GROUPS = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
)
FIGURE = Path(__file__).parent.parent / "docs/figures/memory.png"
SHARES = (0.25, 0.5, 0.75)
CONVERSATIONS = 8
# The file mapped in little memory is slow: some steps of seconds, and never another answer.
MAPPED_TOKENS = 200


def widen(run: Path, factor: int, to: Path) -> None:
    """A checkpoint whose experts have `factor` times as many hidden units: packed, and as GGUF.

    llama.cpp opens no file without a tokenizer, and the smallest that it knows has two tokens more
    than there are bytes; nothing ever asks for those.
    """
    import torch

    from moestro.checkpoints import packed_files
    from moestro.checkpoints.gguf.writing import write_gguf
    from moestro.checkpoints.opening import open_checkpoint
    from moestro.checkpoints.quantize import WEIGHTS, pack
    from moestro.errors import MoestroError
    from moestro.models.decoder import Decoder
    from moestro.text import train_bpe

    model = open_checkpoint(run).model
    tokenizer = train_bpe(["one pair, one pair"], 258)
    moe = model.cfg.moe.model_copy(update={"hidden_dim": model.cfg.moe.hidden_dim * factor})
    changes = {"moe": moe, "vocab_size": max(model.cfg.vocab_size, tokenizer.vocab_size)}
    wide = Decoder(model.cfg.model_copy(update=changes)).eval()
    small = model.state_dict()
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
            elif tensor.shape[1:] == small[name].shape[1:]:  # of a token each
                tensor[: len(small[name])] = small[name]
            else:  # down [E, D, F]
                tensor[..., : small[name].shape[-1]] = small[name]
    with suppress(MoestroError):  # a network that llama.cpp does not have is compared with nothing
        gguf = to.with_suffix(".gguf")
        with TemporaryDirectory() as folder:
            tokenizer.save(Path(folder))
            write_gguf(wide, gguf, family="mixtral", kind="q8_0", tokenizer=Path(folder))
    pack(wide, WEIGHTS["int8"])
    packed_files.save(wide, to, WEIGHTS["int8"], {})


class Decoding:
    """Decodes texts with an open model, keeping time."""

    def __init__(self, model: Any) -> None:
        from moestro.checkpoints import streamed
        from moestro.infer.native_decoder import NativeDecoder

        self.model, self._decoder = model, NativeDecoder(model)
        self._residency = streamed.residency_of(model)
        self._digest = hashlib.sha256()

    def texts(self, tokens_BS: Any) -> dict[str, float]:
        """Rates of the second half, when the caches are full, and the worst step."""
        half, times, before = tokens_BS.shape[1] // 2, [], self._reads()
        pasts = [self.model.new_cache(1) for _ in tokens_BS]
        for place in range(tokens_BS.shape[1]):
            if place == half:
                before = self._reads()
            begun = time.perf_counter()
            made = self._decoder.step([[int(token)] for token in tokens_BS[:, place]], pasts)
            times.append(time.perf_counter() - begun)
            self._digest.update(made.logits_NV.numpy().tobytes())
        steady, count = times[half:], len(tokens_BS) * (len(times) - half)
        facts = {"tokens_per_s": count / sum(steady), "worst_s": max(steady)}
        if before is not None:
            reads = self._reads().since(before)
            facts |= {
                "hit_rate": reads.hit_rate, "read_bytes": reads.bytes / count,
                "waited": reads.waited_s / sum(steady),
            }  # fmt: skip
        return facts

    def logits(self) -> str:
        """A sum of all logits' bits until now."""
        return self._digest.hexdigest()

    def _reads(self) -> Any:
        return None if self._residency is None else self._residency.reads()


def child(given: dict[str, Any]) -> None:
    """One variant: open the file, measure, decode, say how it went."""
    import numpy as np

    from moestro.checkpoints import packed_files, streamed
    from moestro.infer.pacing import measure_pace
    from moestro.machine import peak_bytes, resident_bytes
    from moestro.models.budget import Use

    path, kept = Path(given["file"]), []
    streamed.sizes(path)  # loads what opening needs
    facts = {"process": resident_bytes()}
    one, *others = np.load(given["text"])[:, : given["tokens"]]
    start = time.perf_counter()
    if given["memory"] is None:
        model = packed_files.load(path)
    else:
        use = Use(len(one), texts=CONVERSATIONS, tokens=CONVERSATIONS)
        within = streamed.Within(given["memory"], use, lambda b, _: kept.extend(b.kept))
        model = streamed.load_within(path, within)
    facts |= {"opened_s": time.perf_counter() - start, "kept": kept}
    residency = streamed.residency_of(model)
    if residency is not None:
        pace = measure_pace(model, residency)
        facts |= {"compute_s": pace.compute_s, "missed_M": pace.missed_M}
    facts["ready_s"] = time.time() - given["began"]
    decoding = Decoding(model)
    facts["one"] = decoding.texts(one[None])
    if given["eight"]:
        facts["eight"] = decoding.texts(np.stack(others))
    facts |= {"logits": decoding.logits(), "peak_bytes": peak_bytes()}
    print(json.dumps(facts))


def in_group(limit: int | None, file: Path, command: list[str]) -> tuple[str | None, int | None]:
    """What a program prints within at most `limit` bytes, where that can be held; and its peak.

    None: it was killed or failed. The file is not in memory when it starts.
    """
    fd = os.open(file, os.O_RDONLY)
    os.fsync(
        fd
    )  # pages that are to be written would stay, at the cost of the group that wrote them
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    for root, most, peak in GROUPS if limit is not None else ():
        group = root / f"moestro-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if not (group / most).exists():
                continue  # this version counts no memory here
            (group / most).write_text(str(limit))
            join = lambda group=group: (group / "cgroup.procs").write_text("0")  # noqa: E731
            return _printed(command, join), int((group / peak).read_text())
        finally:
            with suppress(OSError):
                group.rmdir()
    return _printed(command, None), None


def _printed(command: list[str], join: Callable[[], object] | None) -> str | None:
    made = subprocess.run(command, stdout=subprocess.PIPE, preexec_fn=join, text=True)
    return None if made.returncode else made.stdout


def run_child(limit: int | None, **given: Any) -> dict[str, Any]:
    """A variant in a process of its own."""
    given["began"] = time.time()
    command = [sys.executable, __file__, "--child", json.dumps(given)]
    printed, peak = in_group(limit, Path(given["file"]), command)
    if printed is None:
        raise SystemExit(f"a variant failed or was killed: {given}")
    return {**json.loads(printed.splitlines()[-1]), "group_peak": peak}


def peer(words: list[str], limit: int, gguf: Path, text: Path, threads: int) -> float:
    """Tokens per second of another engine in the same group; 0: it was killed or failed.

    `llama_cpp.py` decodes the text; a llama-bench decodes random tokens.
    """
    command = [*words, "-m", str(gguf), "-t", str(threads)]
    own = any(word.endswith("llama_cpp.py") for word in words)
    if own:
        tokens = text.with_suffix(".json")
        command += ["--tokens", str(tokens)]
    else:
        command += ["-p", "0", "-n", "128", "-r", "2", "-o", "json"]
    printed, _ = in_group(limit, gguf, command)
    if printed is None:
        return 0.0
    if own:
        return float(json.loads(printed.splitlines()[-1])["tokens_per_s"])
    (row,) = (each for each in json.loads(printed) if each.get("n_gen"))
    return float(min(row["samples_ts"][1:] or row["samples_ts"]))


def measure_file(
    path: Path, text: Path, foretell: Callable[[list[int]], Any], peers: dict[str, list[str]]
) -> list[dict[str, Any]]:
    """All variants of one file, a row for each budget, beside what was foretold of it."""
    import numpy as np
    import torch

    from moestro.checkpoints import streamed
    from moestro.kernels.residency import READERS
    from moestro.models import budget, pace

    tokens = np.load(text).shape[1]
    files = {"file": str(path), "text": str(text), "tokens": tokens, "eight": True}
    whole = run_child(None, **files, memory=None)
    use = budget.Use(tokens, texts=CONVERSATIONS, tokens=CONVERSATIONS)
    needs = budget.needs(*streamed.sizes(path), use, whole["process"])
    slab = needs.mixtures[0].slab_bytes
    rows = []
    for share in SHARES:
        memory = needs.fixed + int(share * needs.all_experts)
        disk = max(streamed.read_rate(path, slab, threads, 0.5) for threads in (1, READERS))
        own = run_child(memory, **files, memory=memory)
        # The same memory as was used: libraries' pages that others mapped before are not charged.
        fewer = {**files, "tokens": min(tokens, MAPPED_TOKENS), "eight": False}
        mapped = run_child(own["group_peak"] or memory, **fewer, memory=None)
        got, found = budget.Budget(memory, needs, tuple(own["kept"])), own["one"]
        share_LM = foretell(own["kept"])
        expected = pace.tokens_per_s(got, pace.Pace(own["compute_s"], own["missed_M"]), share_LM)
        fastest, read_s = whole["one"]["tokens_per_s"], found["read_bytes"] / disk
        bound, serial = min(fastest, 1 / max(1e-9, read_s)), 1 / (1 / fastest + read_s)
        row = {
            "model": path.stem, "experts MB": needs.all_experts / 1e6, "slab MB": slab / 1e6,
            "share": share, "experts": needs.mixtures[0].experts, "kept": min(own["kept"]),
            "hits": found["hit_rate"],
            "foretold hits": pace.hit_rate(share_LM), "MB/token": found["read_bytes"] / 1e6,
            "disk MB/s": disk / 1e6, "tokens/s": found["tokens_per_s"], "expected": expected,
            "in memory": fastest, "mapped": mapped["one"]["tokens_per_s"],
            "bound": bound, "of bound": found["tokens_per_s"] / bound, "waited": found["waited"],
            "serial": serial, "of serial": found["tokens_per_s"] / serial,
            "compute ms": 1e3 * own["compute_s"], "miss ms": 1e3 * own["missed_M"][1],
            "worst s": found["worst_s"], "opened s": own["opened_s"], "ready s": own["ready_s"],
            "eight/s": own["eight"]["tokens_per_s"],
            "eight in memory": whole["eight"]["tokens_per_s"],
            "peak": own["peak_bytes"] / memory, "limited": own["group_peak"] is not None,
            "same bits": own["logits"] == whole["logits"],
        }  # fmt: skip
        for name, words in peers.items():
            limit = own["group_peak"] or memory
            gguf = path.with_suffix(".gguf")
            row[name] = peer(words, limit, gguf, text, torch.get_num_threads())
            row[f"times {name}"] = found["tokens_per_s"] / row[name] if row[name] else None
        rows.append(row)
    return rows


def draw(rows: list[dict[str, Any]], to: Path) -> None:
    """Tokens per second against the budget, a panel for each model."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(4.2 * len(models), 3.2), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        own = [row for row in rows if row["model"] == model]
        shares = [100 * row["kept"] / row["experts"] for row in own]
        lines = (
            ("bound", "--", "#8a8a8a", "bound: in memory, or the disk"),
            ("serial", ":", "#8a8a8a", "one after the other"),
            ("tokens/s", "o-", "#0072b2", "measured"),
            ("expected", "x", "#d55e00", "foretold"),
            ("mapped", "s:", "#009e73", "file mapped"),
        )
        for key, style, colour, label in lines:
            axes.plot(shares, [row[key] for row in own], style, color=colour, label=label)
        size = f"{own[0]['experts MB']:,.0f} MB of experts, {own[0]['slab MB']:.1f} MB each"
        axes.set(title=size, xlabel="experts kept in memory, %", ylabel="tokens per second")
        axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.savefig(to, dpi=90)


def prepared(args: argparse.Namespace) -> tuple[Path, Callable[[list[int]], Any]]:
    """The text to decode, and what says of caches how many experts tokens of other text miss."""
    import numpy as np

    from moestro.probe.measures.misses import misses
    from moestro.probe.recording.tracefile import read_trace

    args.work.mkdir(parents=True, exist_ok=True)
    path, text = args.work / "trace.npz", args.work / "text.npy"
    if not path.exists():
        moestro = Path(sys.executable).parent / "moestro"
        command = [moestro, "probe", args.run, "--trace", path]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    trace = read_trace(path)
    order_T = (
        np.random.default_rng(0)
        .permutation(len(trace.length_N))[trace.sequence_T]
        .argsort(kind="stable")
    )  # sequences in random order, so that both parts are of every domain
    count = (1 + CONVERSATIONS) * args.tokens
    if count > len(order_T) * 3 // 4:
        raise SystemExit(f"the trace has {len(order_T):,} tokens, too few for {args.tokens}")
    texts = trace.tokens_T[order_T[:count]].reshape(-1, args.tokens)
    np.save(text, texts)
    text.with_suffix(".json").write_text(json.dumps(texts[0].tolist()))
    other = trace._replace(experts_TLK=trace.experts_TLK[order_T[count:]])
    return text, lambda kept: misses(other, kept).tolist()


def claims_of(rows: list[dict[str, Any]], peers: dict[str, list[str]]) -> dict[str, Any]:
    """What the aims are about."""
    least = [row for row in rows if row["share"] == SHARES[0]]
    claims = {
        "same bits at every budget": all(row["same bits"] for row in rows),
        "largest peak / budget": max(row["peak"] for row in rows),
        "worst |measured / expected - 1|": max(
            abs(row["tokens/s"] / row["expected"] - 1) for row in rows
        ),
        "least of bound": min(row["of bound"] for row in rows),
        "least of one after the other": min(row["of serial"] for row in rows),
        "least times the mapped file, at 25 %": min(
            row["tokens/s"] / row["mapped"] for row in least
        ),
    }
    for name in peers:
        times = [row[f"times {name}"] for row in rows]
        claims[f"least times {name}"] = min((each for each in times if each), default=None)
        claims[f"budgets at which {name} was killed"] = times.count(None)
    return claims


def main() -> None:
    """See the top."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a trained mixture, whose text is bytes")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--factors", type=int, nargs="+", help="times as many hidden units")
    parser.add_argument("--quick", action="store_true", help="600 tokens instead of 2000")
    parser.add_argument("--work", type=Path, default=Path("runs/memory-work"))
    parser.add_argument("--compare", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("--name", default="", help="suffix of the result file")
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        return
    import measure

    args.tokens = args.tokens or (600 if args.quick else 2000)
    pairs = (each.partition("=") for each in args.compare)
    peers = {name: shlex.split(command) for name, _, command in pairs}
    text, foretell = prepared(args)
    rows = []
    for factor in args.factors or (32, 96):
        path = args.work / f"wide-{factor}.moestro"
        if not path.exists():
            widen(args.run, factor, path)
        rows += measure_file(path, text, foretell, peers)
    draw(rows, args.figure)
    name = "memory" + (f"-{args.name}" if args.name else "")
    measure.report(name, rows, claims_of(rows, peers))


if __name__ == "__main__":
    main()
