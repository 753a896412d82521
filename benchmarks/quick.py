"""The speed of decoding and prefill on this machine within three minutes, as README's table has it.

The 1.7B mixture with random weights, packed. What is compared takes turns in the same rounds, and
a ratio is of the rates beside it. `of reading` is the share of plain reading: of weights once a
step, of experts those that the steps' routing hits, and of all keys and values.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import measure
import torch

from moestro.bench.speed import ReadBandwidth, weight_bytes
from moestro.checkpoints.quantize import format_of, random_model
from moestro.config import CacheKind, ModelConfig
from moestro.infer.decoding import NativeDecoding, Passed
from moestro.models.blocks import cache_as
from moestro.models.budget import cache_bytes
from moestro.models.cache import KVCache
from moestro.moe.layer import MoE
from moestro.settings import load_settings

CONTEXTS, MANY, TOKENS, PROMPT = (16, 512, 2048, 3900), (4, 16), 8, 512
CACHES: tuple[CacheKind, ...] = ("as-is", "int8")


class Line(NamedTuple):
    """What takes turns with others: how much it makes of tokens, and reads at least."""

    run: Callable[[], Any]
    tokens: int
    read_bytes: float = 0.0


class Subject:
    """A model of one kind of weights, and texts of every length for each kind of cache."""

    def __init__(self, cfg: ModelConfig, kind: str, contexts: tuple[int, ...]) -> None:
        self.cfg, self.kind = cfg, kind
        self.model: Any = random_model(cfg, format_of(kind))
        self.ids = torch.randint(0, cfg.vocab_size, (cfg.attention.context,)).tolist()
        self.ways: dict[CacheKind, NativeDecoding] = {}
        self.pasts: dict[tuple[CacheKind, int], KVCache] = {}
        for cache in CACHES:
            cache_as(self.model, cache)
            way = self.ways[cache] = NativeDecoding(self.model)
            past = way.new()
            for before, context in zip((0, *contexts), contexts, strict=False):
                way.read(past, self.ids[before:context])
                self.pasts[cache, context] = past.fork()

    def read_bytes(self, hit: float, kept: int) -> float:
        """Bytes that a step reads at least: `hit` experts of a layer, `kept` of all caches."""
        mixtures = [each for each in self.model.modules() if isinstance(each, MoE)]
        experts = sum(each.experts.parts()["packed"].numel() for each in mixtures)
        more = (hit - self.cfg.moe.top_k) / self.cfg.moe.num_experts
        return weight_bytes(self.model) + experts * more + kept

    def decoding(self, sequences: int, context: int, cache: CacheKind) -> Line:
        """Tokens after texts of one length."""
        made = iter(self.ids * 100)
        pasts, counted = (
            [self.pasts[cache, context].fork() for _ in range(sequences)] for _ in range(2)
        )

        def step(pasts: list[KVCache]) -> list[Passed]:
            return self.ways[cache].step([[next(made)] for _ in pasts], pasts)

        def run() -> None:
            for _ in range(TOKENS):
                step(pasts)

        hits = []
        for _ in range(TOKENS):
            chosen = torch.cat([each.routed().experts_TLK for each in step(counted)])
            hits += [len(layer.unique()) for layer in chosen.unbind(1)]
        hit = statistics.mean(hits)
        size = self.read_bytes(hit, cache_bytes(self.cfg, context, sequences, 2, cache))
        return Line(run, sequences * TOKENS, TOKENS * size)

    def prefill(self, tokens: int) -> Line:
        """A whole prompt."""
        return Line(partial(self.ways["as-is"].begin, self.ids[:tokens]), tokens)


def measured(
    lines: dict[str, Line], args: argparse.Namespace, rows: list[dict[str, Any]]
) -> dict[str, float]:
    """Tokens per second of each line, which becomes a row."""
    runs = {name: line.run for name, line in lines.items()}
    read = ReadBandwidth()
    rates = [read()]
    seconds = measure.interleave(runs, args.repeats, args.warmup)
    reading = statistics.median([*rates, read()])
    made = {}
    for name, line in lines.items():
        took = statistics.median(seconds[name])
        made[name] = line.tokens / took
        share: Any = line.read_bytes / took / reading if line.read_bytes else ""
        rows.append({"what": name, "tokens/s": made[name], "of reading": share})
    return made


def main() -> None:
    parser = measure.arguments(__doc__ or "", repeats=3)
    parser.set_defaults(warmup=1)
    parser.add_argument("--weights", nargs="+", default=["int4", "int8"])
    parser.add_argument(
        "--settings", type=Path, default=Path(__file__).parent / "mixture_1.7b.toml"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    cfg = load_settings(ModelConfig, args.settings)
    rows: list[dict[str, Any]] = []
    claims: dict[str, Any] = {}
    contexts = tuple(sorted({min(each, cfg.attention.context - 100) for each in CONTEXTS}))
    for kind in args.weights:
        subject = Subject(cfg, kind, contexts)
        lines = {
            f"{kind}, after {context}, cache {cache}": subject.decoding(1, context, cache)
            for cache in CACHES
            for context in contexts
        }
        rates = measured(lines, args, rows)
        for cache in CACHES:
            first, last = (
                rates[f"{kind}, after {n}, cache {cache}"] for n in contexts[:: len(contexts) - 1]
            )
            claims[f"{kind}: decode after {contexts[-1]} over after 16, cache {cache}"] = (
                last / first
            )
        together = {f"{kind}, {n} at once": subject.decoding(n, 16, "as-is") for n in (1, *MANY)}
        rates = measured(together, args, rows)
        for count in MANY:
            ratio = rates[f"{kind}, {count} at once"] / rates[f"{kind}, 1 at once"]
            claims[f"{kind}: {count} sequences at once over 1"] = ratio
        measured({f"{kind}, prefill of {PROMPT}": subject.prefill(PROMPT)}, args, rows)
        del subject
    measure.report(f"quick{args.name}", rows, claims)


if __name__ == "__main__":
    main()
