"""`moestro bench`: how fast a model runs, for each weight format, compared with other programs."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from moestro.cli.budget import NONE, Memory, within
from moestro.cli.doctor import GIB
from moestro.cli.opening import AcceptField, CacheName
from moestro.cli.options import AsJson
from moestro.errors import ConfigError
from moestro.machine import (
    cpu_name,
    forget_peak,
    memory_bytes,
    peak_bytes,
    resident_bytes,
)

if TYPE_CHECKING:
    from moestro.bench.speed import Speed, Variant
    from moestro.config import CacheKind, ModelConfig

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A checkpoint as for generate; or, with random weights, a preset of `moestro plan` or "
        "a .toml or .json of settings.",
    ),
]
Kinds = Annotated[
    list[str] | None,
    typer.Option(
        "--weights",
        help="as-is, fp32, bf16, int8, int8-64, int4 or int4-64; may be repeated; default as-is.",
    ),
]
Compare = Annotated[
    list[str] | None,
    typer.Option(
        help="transformers, or NAME=PROGRAM: the path of a llama-bench, of llama.cpp or made from "
        "it, and options of its own; may be repeated. It gets random weights of the same "
        "shape."
    ),
]


TRANSFORMERS = "transformers"


class Peer(NamedTuple):
    """What is compared with: a program and options of its own, none for transformers."""

    name: str
    words: tuple[str, ...] = ()


class Timing(NamedTuple):
    """One line of the table: what ran, its weights, how fast."""

    name: str
    weights: str
    speed: Speed


class BenchPlan(NamedTuple):
    """What is measured: settings, a checkpoint's folder and fields to accept, tokens, rounds."""

    name: str
    cfg: ModelConfig
    folder: Path | None
    accept_fields: tuple[str, ...]
    prompt: int
    tokens: int
    rounds: int
    memory: str = NONE
    cache: CacheKind = "as-is"


def bench(
    model: ModelName,
    weights: Kinds = None,
    cache: CacheName = "as-is",
    compare: Compare = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after it.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count; medians are shown.")] = 3,
    memory: Memory = NONE,
    as_json: AsJson = False,
    accept_field: AcceptField = None,
) -> None:
    """Measure how fast a model runs on this machine's processor.

    Tokens per second of prefill and decoding, time to the first token, bytes of weights read per
    token, share of the memory bandwidth measured in the same run, peak memory, and energy where
    the machine reports it. Tokens are random, so that experts rotate. All that is measured takes
    turns, round by round.
    """
    from moestro.checkpoints.quantize import format_of

    kinds = weights or ["as-is"]
    for kind in kinds:
        format_of(kind)
    peers = [_peer(each) for each in compare or ()]
    plan = _plan(model, tuple(accept_field or ()), prompt, tokens, rounds)
    plan = plan._replace(memory=memory, cache=cache)
    if memory != NONE and plan.folder is None:
        raise ConfigError(
            f"--memory keeps experts in a checkpoint's packed file, and {model} has none; name a "
            "checkpoint"
        )
    if memory != NONE and len(kinds) > 1:
        raise ConfigError("--memory is what the process takes; measure one of --weights at a time")
    with ExitStack() as stack:
        rows = _rows(plan, [*_ours(plan, kinds), *_theirs(plan, kinds, peers, stack)])
    if as_json:
        typer.echo(json.dumps(_facts(plan, rows), indent=2))
    else:
        _print(plan, rows)


def _peer(text: str) -> Peer:
    name, _, command = text.partition("=")
    if text == TRANSFORMERS:
        return Peer(name)
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise ConfigError(f"--compare {text}: {error}") from None
    if not (name and words):
        raise ConfigError(
            f"--compare {text} is unknown; choose transformers, or NAME=PROGRAM with the path of "
            "a llama-bench, as llama.cpp=build/bin/llama-bench"
        )
    if not os.access(words[0], os.X_OK) or Path(words[0]).is_dir():
        raise ConfigError(
            f"--compare {text}: {words[0]} is not a program; give the path of llama-bench"
        )
    return Peer(name, words)


def _plan(
    name: str, accept_fields: tuple[str, ...], prompt: int, tokens: int, rounds: int
) -> BenchPlan:
    """The model's settings, and its folder if it has weights."""
    from moestro.checkpoints.hub import find_checkpoint
    from moestro.checkpoints.reading import read_settings
    from moestro.cli.subjects import open_subject
    from moestro.config import ModelConfig
    from moestro.plan.presets import is_preset

    path, folder = Path(name), None
    if path.suffix in (".toml", ".json") or (is_preset(name) and not path.exists()):
        cfg = open_subject(name, accept_fields).cfg
        if cfg is None:
            raise ConfigError(f"{name}'s settings are not known or cannot be expressed")
    else:
        folder = find_checkpoint(name)
        cfg = read_settings(folder, accept_fields).cfg
    if not isinstance(cfg, ModelConfig):
        raise ConfigError(f"{name} is an encoder-decoder; bench measures decoders")
    if prompt + tokens > cfg.attention.context:
        raise ConfigError(
            f"{prompt} tokens of prompt and {tokens} after it exceed the model's context of "
            f"{cfg.attention.context}; lower --prompt or --tokens"
        )
    return BenchPlan(name, cfg, folder, accept_fields, prompt, tokens, rounds)


def _ours(plan: BenchPlan, kinds: list[str]) -> Iterator[Variant]:
    """A variant for each kind of weights."""
    from moestro.bench.speed import Variant, rounds_of, weight_bytes
    from moestro.infer.native_decoder import supports

    whole = plan.memory == NONE
    if whole:
        _check_memory(plan, kinds)
    for kind in kinds:
        before = resident_bytes() if whole else 0  # a budget is of the whole process
        forget_peak()
        model = _open(plan, kind)
        run = rounds_of(model, plan.prompt, plan.tokens)
        run()
        peak = peak_bytes() - before
        how = "moestro" if supports(model) is None else "moestro in Python"
        yield Variant(how, kind, run, weight_bytes(model), peak, reads=whole)


def _rows(plan: BenchPlan, variants: list[Variant]) -> list[Timing]:
    """Measure them."""
    from moestro.bench.speed import ReadBandwidth, by_turns

    # What measures the bandwidth takes memory of its own.
    read = ReadBandwidth() if any(variant.reads for variant in variants) else float
    speeds = by_turns(variants, plan.prompt, plan.tokens, plan.rounds, read)
    pairs = zip(variants, speeds, strict=True)
    return [Timing(variant.name, variant.weights, speed) for variant, speed in pairs]


def _open(plan: BenchPlan, kind: str) -> Any:
    """The model with its weights, or with random ones."""
    from moestro.checkpoints.opening import open_checkpoint
    from moestro.checkpoints.quantize import format_of, random_model
    from moestro.models.blocks import cache_as
    from moestro.models.budget import Use

    if plan.folder is None:
        model: Any = random_model(plan.cfg, format_of(kind))
    else:
        use = Use(plan.prompt + plan.tokens, prompt=plan.prompt, cache=plan.cache)
        options = within(plan.memory, plan.folder, use)
        options |= {"weights": kind, "keep": False, "accept_fields": plan.accept_fields}
        model = open_checkpoint(plan.folder, verified=True, **options).model
    cache_as(model, plan.cache)
    return model


def _check_memory(plan: BenchPlan, kinds: list[str]) -> None:
    """Refuse what cannot be in memory side by side, before anything is built."""
    from moestro.checkpoints.quantize import format_of
    from moestro.models.count import count

    counted, there, needed = count(plan.cfg), memory_bytes(), 0.0
    for kind in kinds:
        format = format_of(kind)
        bits = 16.0 if format is None else format.bits
        needed += (counted.total - counted.input_embedding) * bits / 8 + 2 * counted.input_embedding
    if there is not None and needed > there:
        more = " or fewer of them" if len(kinds) > 1 else ""
        raise ConfigError(
            f"{plan.name} in {' and '.join(kinds)} takes {needed / GIB:.1f} GiB, and this machine "
            f"has {there / GIB:.1f} GiB; choose smaller --weights{more}, or another model"
        )


def _theirs(
    plan: BenchPlan, kinds: list[str], peers: list[Peer], stack: ExitStack
) -> Iterator[Variant]:
    """Variants of the programs compared with; the stack removes their files in the end."""
    import torch

    from moestro.bench.peers import llama_bench, llama_kinds
    from moestro.bench.speed import Variant
    from moestro.models.count import count

    for name, words in peers:
        if not words:
            yield from _transformers(plan)
            continue
        # Their groups have 32 weights; as-is is compared with bf16.
        wanted = dict.fromkeys(
            kind.partition("-")[0] if kind != "as-is" else "bf16" for kind in kinds
        )
        known = llama_kinds()
        for kind in (known[each] for each in wanted if each in known):
            sizes = plan.prompt, plan.tokens, torch.get_num_threads()
            run = stack.enter_context(llama_bench(words, plan.cfg, kind, *sizes))
            size = count(plan.cfg).matmul * kind.bytes / kind.length
            yield Variant(name, kind.name, run, size, peak=None, reads=False)


def _transformers(plan: BenchPlan) -> Iterator[Variant]:
    """A variant for each of its experts implementations."""
    from moestro.bench.peers import IMPLEMENTATIONS, transformers_model, transformers_rounds
    from moestro.bench.speed import Variant
    from moestro.models.count import count

    before = resident_bytes()
    forget_peak()
    model = transformers_model(plan.cfg, plan.folder)
    size = 2.0 * count(plan.cfg).matmul
    for implementation in IMPLEMENTATIONS if plan.cfg.moe is not None else ("",):
        run = transformers_rounds(model, implementation, plan.prompt, plan.tokens)
        run()
        peak = peak_bytes() - before
        name = f"{TRANSFORMERS} {implementation}".rstrip()
        yield Variant(name, "bf16", run, size, peak)


def _facts(plan: BenchPlan, rows: list[Timing]) -> dict[str, Any]:
    """Everything as JSON; rates per second, sizes in bytes."""
    import torch

    from moestro.kernels import native_cpu
    from moestro.models.count import count

    counted = count(plan.cfg)
    return {
        "model": plan.name,
        "random_weights": plan.folder is None,
        "parameters": {"total": counted.total, "active": counted.active},
        "prompt": plan.prompt,
        "tokens": plan.tokens,
        "rounds": plan.rounds,
        "cache": plan.cache,
        "machine": {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "native_path": native_cpu.path() if native_cpu.available() is None else None,
        },
        "rows": [{"name": row.name, "weights": row.weights, **row.speed._asdict()} for row in rows],
    }


def _print(plan: BenchPlan, rows: list[Timing]) -> None:
    """The table, for a person."""
    from rich.console import Console

    from moestro.cli.tables import new_table

    facts = _facts(plan, rows)
    machine, size = facts["machine"], facts["parameters"]
    random = "random weights, " if facts["random_weights"] else ""
    console = Console(highlight=False)
    console.print(
        f"{plan.name}: {size['total'] / 1e6:,.1f}M parameters, {size['active'] / 1e6:,.1f}M "
        f"active; {random}{plan.tokens} tokens after a prompt of {plan.prompt}, "
        f"cache {plan.cache}\n{machine['cpu']}, "
        f"{machine['threads']} threads, native path: {machine['native_path'] or 'none'}",
        markup=False,
        soft_wrap=True,
    )
    titles = ["weights", "prompt/s", "decode/s", "first ms", "MB/token", "of read", "GiB"]
    energy = any(row.speed.joules is not None for row in rows)
    streamed = any(row.speed.hit_rate is not None for row in rows)
    more = (*(("J/token",) if energy else ()), *(("hits", "MB read") if streamed else ()))
    table = new_table("", *titles, *more)
    for column in table.columns[1:]:
        column.no_wrap = True
    for name, weights, speed in rows:
        cells = [
            weights,
            f"{speed.prefill_per_s:.1f}",
            f"{speed.decode_per_s:.1f}",
            f"{speed.first_s * 1e3:.1f}",
            f"{speed.weight_bytes / 1e6:.1f}",
            "" if speed.share is None else f"{speed.share:.0%}",
            f"{speed.peak_bytes / GIB:.2f}",
        ]
        if energy:
            cells.append("" if speed.joules is None else f"{speed.joules:.2f}")
        if speed.hit_rate is not None:
            cells += [f"{speed.hit_rate:.1%}", f"{(speed.file_bytes or 0) / 1e6:.1f}"]
        table.add_row(name, *cells)
    console.print(table)
    console.print(
        "tokens per second of the prompt and after it; time to the first token; weights that a "
        "token reads, and their share of plain reading in the same run; most memory held"
        + ("; experts found in memory, and what a token reads of the file" if streamed else ""),
        soft_wrap=True,
    )
