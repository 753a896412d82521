"""Which experts to keep: hit rates of policies on a trace of trained routing.

    .venv/bin/moestro probe runs/memory --trace runs/memory-work/trace.npz
    .venv/bin/python benchmarks/expert_caches.py runs/memory-work/trace.npz

All sequences follow each other, as texts do in a process. Policies that must know something of the
routing beforehand (the most used experts, how many each layer keeps) know the first half of the
trace; all are judged on the second. Each row has the same number of experts in all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np
from numpy.typing import NDArray

from moestro.probe.measures.caching import caching
from moestro.probe.measures.misses import misses
from moestro.probe.recording.tracefile import read_trace
from moestro.probe.recording.traces import Trace

SHARES = (0.125, 0.25, 0.5, 0.75)


def split(trace: Trace) -> tuple[Trace, Trace]:
    """Two halves of the sequences, of all domains alike."""
    even_T = trace.sequence_T % 2 == 0
    even, odd = (
        trace._replace(
            experts_TLK=trace.experts_TLK[half_T], tokens_T=trace.tokens_T[half_T],
            length_N=np.array([half_T.sum()]), domain_N=trace.domain_N[:1],
            document_N=trace.document_N[:1],
        )
        for half_T in (even_T, ~even_T)
    )  # fmt: skip
    return even, odd


def lru(trace: Trace, kept_L: Sequence[int]) -> float:
    """Each layer keeps those that were used last."""
    share_LM = misses(trace, kept_L, most_work=10**9, filling=0)
    top_k = trace.experts_TLK.shape[2]
    return float(1 - (share_LM @ np.arange(top_k + 1)).mean() / top_k)


def together(trace: Trace, total: int) -> float:
    """One cache over all layers keeps those that were used last."""
    held: dict[tuple[int, int], None] = {}
    hits = wanted = 0
    for experts_LK in trace.experts_TLK.tolist():
        for layer, experts_K in enumerate(experts_LK):
            for expert in reversed(experts_K):
                key, wanted = (layer, expert), wanted + 1
                hits += key in held
                held.pop(key, None)
                held[key] = None
            while len(held) > total:
                del held[next(iter(held))]
    return hits / wanted


def pinned(before: Trace, trace: Trace, kept: int) -> float:
    """Each layer keeps those that were most used before, for good."""
    found = []
    for layer in range(trace.experts_TLK.shape[1]):
        counts_E = np.bincount(before.experts_TLK[:, layer].ravel())
        found.append(np.isin(trace.experts_TLK[:, layer], np.argsort(-counts_E)[:kept]).mean())
    return float(np.mean(found))


def by_gain(rate_LE: NDArray[Any], total: int) -> list[int]:
    """Sizes of the layers' caches: each place goes where it gave most hits before."""
    kept_L = [1] * len(rate_LE)
    while sum(kept_L) < total:
        gains = [
            rate[kept] - rate[kept - 1] if kept < len(rate) else -1.0
            for rate, kept in zip(rate_LE, kept_L, strict=True)
        ]
        kept_L[int(np.argmax(gains))] += 1
    return kept_L


def main() -> None:
    """See the top."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    before, trace = split(read_trace(parser.parse_args().trace))
    layers, experts = trace.experts_TLK.shape[1], trace.subject.num_experts
    rate_LE = caching(before, draws=1, most_work=10**12).lru.rate_LE
    found = caching(trace, draws=1, most_work=10**12)
    rows = []
    for share in SHARES:
        kept = max(1, round(share * experts))
        policies: dict[str, Callable[[], float]] = {
            "lru of each layer": lambda kept=kept: lru(trace, [kept] * layers),
            "lru, sizes by gain": lambda kept=kept: lru(trace, by_gain(rate_LE, kept * layers)),
            "lru over all layers": lambda kept=kept: together(trace, kept * layers),
            "lfu of each layer": lambda kept=kept: float(found.lfu.mean_E[kept - 1]),
            "most used before": lambda kept=kept: pinned(before, trace, kept),
            "oracle": lambda kept=kept: float(found.oracle.mean_E[kept - 1]),
        }
        hits = {name: policy() for name, policy in policies.items()}
        rows.append({"kept": kept, "of": experts, "random routing": kept / experts, **hits})
    best = {
        name: max(row[name] - row["lru of each layer"] for row in rows)
        for name in rows[0]
        if name not in ("kept", "of", "lru of each layer", "oracle", "random routing")
    }
    measure.report("expert_caches", rows, {f"most that {n} gains": v for n, v in best.items()})


if __name__ == "__main__":
    main()
