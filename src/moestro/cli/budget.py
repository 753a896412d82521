"""--memory: a budget for the whole process, what it will give, and what it gave."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moestro.errors import ConfigError

if TYPE_CHECKING:
    from moestro.infer.writing import Piece
    from moestro.kernels.residency import Reads
    from moestro.models.budget import Budget, Use
    from moestro.models.build import Model

Memory = Annotated[
    str,
    typer.Option(
        "--memory",
        metavar="AMOUNT",
        help="Most memory that the process may take, such as 6GiB: experts that do not fit are "
        "read from the packed file as they are wanted. auto: what is free; none: no limit, the "
        "file is mapped.",
    ),
]
NONE, AUTO = "none", "auto"
# What `moestro probe --trace` of this model wrote, if it lies beside the checkpoint.
TRACE = "trace.npz"
_READ_BYTES = 1 << 27


def within(memory: str, folder: Path, use: Use | None) -> dict[str, Any]:
    """What `open_checkpoint` takes for a budget; nothing without one.

    Args:
        memory: what --memory says.
        folder: of the checkpoint.
        use: how the model will be used; None: one text as long as it can.

    Raises:
        ConfigError: the amount cannot be read, or the system does not say what is free.
    """
    from moestro.checkpoints.streamed import Within
    from moestro.models.budget import Use

    amount = amount_of(memory)
    if amount is None:
        return {}
    return {"within": Within(amount, use or Use(), partial(_tell, folder))}


def amount_of(memory: str) -> int | None:
    """Bytes that --memory says; None: no limit.

    Raises:
        ConfigError: it cannot be read, or the system does not say what is free.
    """
    from moestro.machine import free_bytes
    from moestro.plan.sizes import parse_bytes

    if memory == NONE:
        return None
    amount = free_bytes() if memory == AUTO else parse_bytes(memory)
    if amount is None:
        raise ConfigError("this system does not say how much memory is free; give --memory 6GiB")
    return amount


def reads_of(model: Model) -> Reads | None:
    """What was read for a model's tokens until now; None: all of it is in memory."""
    from moestro.checkpoints.streamed import residency_of

    residency = residency_of(model)
    return None if residency is None else residency.reads()


def telling(model: Model, pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces, and at their end, on stderr, what they took where experts are in a file."""
    start, count, before = time.perf_counter(), 0, reads_of(model)
    try:
        for piece in pieces:
            count += 1
            yield piece
    finally:
        reads = reads_of(model)
        if reads is not None and before is not None and count:
            seconds, reads = time.perf_counter() - start, reads.since(before)
            typer.echo(
                f"moestro: {count} tokens, {count / seconds:.1f} tokens/s with the prompt; "
                f"{reads.hit_rate:.1%} of the experts wanted were in memory, "
                f"{reads.bytes / 1e6:,.1f} MB were read",
                err=True,
            )


def _tell(folder: Path, budget: Budget, path: Path) -> None:
    """The table, on stderr, before anything is loaded."""
    from rich.console import Console

    from moestro.cli.tables import new_table
    from moestro.plan.sizes import bytes_text

    needs, console = budget.needs, Console(stderr=True, highlight=False)
    table = new_table("memory", bytes_text(budget.memory))
    for name in ("process", "dense", "cache", "buffers"):
        label = "weights of every token" if name == "dense" else name
        table.add_row(label, bytes_text(getattr(needs, name)))
    if needs.mixtures:
        least, most = min(budget.kept), max(budget.kept)
        kept = f"{least}" if least == most else f"{least} to {most}"
        kept += f" of {needs.mixtures[0].experts} of each of {len(needs.mixtures)} mixtures"
        table.add_row("experts", f"{bytes_text(budget.kept_bytes)}, {kept}")
        for row in _speed(folder, budget, path):
            table.add_row(*row)
    console.print(table)
    if needs.mixtures and budget.below_cycle:
        console.print(
            "moestro: a mixture keeps fewer experts than one token wants, so most of "
            f"{needs.cycle / 1e6:,.0f} MB are read for every token"
        )


def _speed(folder: Path, budget: Budget, path: Path) -> list[tuple[str, str]]:
    """What will be read for a token, and how long that takes."""
    from moestro.checkpoints.streamed import read_rate
    from moestro.kernels import native_cpu
    from moestro.models.budget import tokens_per_s

    (low, high), whence = hits(folder, budget)
    cycle, reads = budget.needs.cycle, [budget.read_bytes(hit) / 1e6 for hit in (high, low)]
    buffer = native_cpu.aligned(_READ_BYTES).fill_(1)
    compute_s = (budget.needs.dense + cycle) / _fastest(lambda: native_cpu.read(buffer))
    wanted = [each.slab_bytes for each in budget.needs.mixtures]
    disk = read_rate(path, max(wanted))
    # Weights pass at half to all of the rate of plain reading: the share that bench shows.
    slowest = tokens_per_s(budget, low, 2 * compute_s, disk)[0]
    fastest = tokens_per_s(budget, high, compute_s, disk)[1]
    rates = f"{low:.0%}" if low == high else f"{low:.0%} to {high:.0%}"
    return [
        ("in memory when wanted", f"{rates} ({whence})"),
        ("read for a token", f"{reads[0]:,.1f} to {reads[1]:,.1f} of {cycle / 1e6:,.1f} MB"),
        ("the disk reads", f"{disk / 1e6:,.0f} MB/s, measured on this file"),
        ("tokens/s expected", f"{slowest:.1f} to {fastest:.1f}"),
    ]


def _fastest(read: Callable[[], object]) -> float:
    """Bytes per second of reading memory, the best of three."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        read()
        best = min(best, time.perf_counter() - start)
    return _READ_BYTES / best


def hits(folder: Path, budget: Budget) -> tuple[tuple[float, float], str]:
    """The least and the most that is found in memory, and how that is known.

    Raises:
        DataError: there is a trace that cannot be read.
    """
    from moestro.models.budget import hit_bounds, mean_hit
    from moestro.probe.measures.caching import caching
    from moestro.probe.recording.tracefile import read_trace

    path = folder / TRACE
    if not path.is_file():
        return hit_bounds(budget), "random routing, best published"
    trace = read_trace(path)
    experts = [each.experts for each in budget.needs.mixtures]
    if [trace.subject.num_experts] * len(trace.subject.moe_layers) != experts:
        return hit_bounds(budget), f"bounds; {TRACE} is of another model"
    rate = mean_hit(budget, caching(trace.end_to_end(), draws=1).lru.rate_LE.tolist())
    return (rate, rate), f"simulated on {TRACE}"
