"""--memory: a budget for the whole process, what it will give, and what it gave."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moestro.infer.writing import Piece
    from moestro.kernels.residency import Reads
    from moestro.models.budget import Budget, Use
    from moestro.models.build import Model
    from moestro.models.pace import Rates

    Shares = Sequence[Sequence[float]]

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
Chunk = Annotated[
    int | None,
    typer.Option(
        min=512,
        metavar="TOKENS",
        help="With --memory, the most tokens of a prompt that pass at once; 512 unless given, and "
        "where all experts are kept. More reads experts fewer times for a long prompt, takes up to "
        "an eighth of what is left, and makes other texts wait.",
    ),
]
NONE = "none"
# What `moestro probe --trace` of this model wrote, if it lies beside the checkpoint.
TRACE = "trace.npz"
_READ_BYTES = 1 << 25


def within(
    memory: str,
    folder: Path,
    use: Use | None,
    told: Callable[[Budget], object] | None = None,
    process: int | None = None,
) -> dict[str, Any]:
    """What `open_checkpoint` takes for a budget; nothing without one.

    Args:
        memory: what --memory says.
        folder: of the checkpoint.
        use: how the model will be used; None: one text as long as it can.
        told: also called with what the budget gives.
        process: see `Within.process`.

    Raises:
        ConfigError: the amount cannot be read, or the system does not say what is free.
    """
    from moestro.checkpoints.streamed import Within
    from moestro.models.budget import Use

    amount = amount_of(memory)
    if amount is None:
        return {}
    return {"within": Within(amount, use or Use(), Teller(folder, told), process)}


def refuse_chunk(chunk: int | None, memory: str) -> None:
    """--chunk without a budget, which alone it is for."""
    from moestro.errors import ConfigError

    if chunk is not None and memory == NONE:
        raise ConfigError(
            f"--chunk {chunk} is for experts that are read from the file; give --memory too"
        )


def amount_of(memory: str) -> int | None:
    """Bytes that --memory says; None: no limit. Raises as `plan.sizes.memory_of` does."""
    from moestro.plan.sizes import memory_of

    return memory_of(memory)


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
                f"{reads.bytes / 1e6:,.1f} MB were read, {reads.waited_s:.2f} of {seconds:.2f} s "
                "were spent waiting for them",
                err=True,
            )


class Teller:
    """Says on stderr what a budget gives: before anything is loaded, and measured after that."""

    def __init__(self, folder: Path, told: Callable[[Budget], object] | None = None) -> None:
        from rich.console import Console

        self._folder, self._console = folder, Console(stderr=True, highlight=False)
        self._told = told
        self._known: tuple[Budget, list[Shares], str] | None = None

    def __call__(self, budget: Budget, path: Path) -> None:
        """The table, before anything is loaded."""
        from moestro.cli.tables import new_table
        from moestro.plan.sizes import bytes_text

        if self._told is not None:
            self._told(budget)
        needs = budget.needs
        table = new_table("memory", bytes_text(budget.memory))
        for name in ("process", "dense", "cache", "buffers"):
            label = "weights of every token" if name == "dense" else name
            table.add_row(label, bytes_text(getattr(needs, name)))
        if needs.token:
            table.add_row("of a prompt at once", f"{budget.together:,} tokens")
        if needs.mixtures:
            least, most = min(budget.kept), max(budget.kept)
            kept = f"{least}" if least == most else f"{least} to {most}"
            kept += f" of {needs.mixtures[0].experts} of each of {len(needs.mixtures)} mixtures"
            table.add_row("experts", f"{bytes_text(budget.kept_bytes)}, {kept}")
            shares, whence = expected_misses(self._folder, budget)
            self._known = budget, shares, whence
            for row in _speed(budget, shares, whence, path):
                table.add_row(*row)
        self._console.print(table)
        if needs.mixtures and budget.below_cycle:
            self._console.print(
                "moestro: a mixture keeps fewer experts than one token wants, so most of "
                f"{needs.cycle / 1e6:,.0f} MB are read for every token"
            )

    def measure(self, model: Model) -> None:
        """One line, after a few tokens that are not shown: what may be expected now."""
        from moestro.checkpoints.streamed import residency_of
        from moestro.infer.pacing import measure_pace
        from moestro.models.decoder import Decoder
        from moestro.models.pace import tokens_per_s

        residency = residency_of(model)
        if self._known is None or residency is None or not isinstance(model, Decoder):
            return
        budget, shares, whence = self._known
        pace, missing = measure_pace(model, residency), ""
        if any(pace.missed_M):
            missing = (
                f", {pace.missed_M[1] * 1e3:,.2f} ms more where one expert of a mixture is missing"
            )
        rates = _range([tokens_per_s(budget, pace, each) for each in shares], "{:,.1f}")
        self._console.print(
            f"moestro: measured on this model: {pace.compute_s * 1e3:,.2f} ms for a token"
            f"{missing}; {rates} tokens/s expected ({whence})",
            soft_wrap=True,
        )


def _speed(budget: Budget, shares: list[Shares], whence: str, path: Path) -> list[tuple[str, str]]:
    """What will be read for a token, and about how long that takes."""
    from moestro.models.pace import estimate, hit_rate, missed_bytes, tokens_per_s

    rates, cycle = _rates(budget, path), budget.needs.cycle
    slow, fast = estimate(budget, rates)
    speeds = (tokens_per_s(budget, slow, shares[0]), tokens_per_s(budget, fast, shares[-1]))
    missed = sorted(missed_bytes(budget, each) / 1e6 for each in shares)
    disk = sorted({round(rates.alone / 1e6), round(rates.together / 1e6)})
    return [
        ("in memory when wanted", f"{_range(map(hit_rate, shares), '{:.0%}')} ({whence})"),
        ("read for a token", f"{_range(missed, '{:,.1f}')} of {cycle / 1e6:,.1f} MB"),
        ("the disk reads", f"{_range(disk, '{:,}')} MB/s, measured on this file"),
        ("tokens/s, about", f"{speeds[0]:,.1f} to {speeds[1]:,.1f}"),
    ]


def _range(values: Iterable[float], form: str) -> str:
    """A number, or the least and the most of several."""
    texts = list(dict.fromkeys(form.format(value) for value in values))
    return texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}"


def _rates(budget: Budget, path: Path) -> Rates:
    """What this machine does."""
    from moestro.checkpoints.streamed import read_rate, read_room
    from moestro.kernels.packing import PAGE
    from moestro.kernels.residency import READERS
    from moestro.models.pace import Rates

    slab = max(each.slab_bytes for each in budget.needs.mixtures)
    # Of what is not loaded yet: as many slabs as will be read at once, if there is room for them.
    room = (budget.memory - budget.needs.process) // read_room(slab)
    return Rates(
        memory=_READ_BYTES / _fastest_s(_READ_BYTES),
        call_s=_fastest_s(PAGE),
        alone=read_rate(path, slab, seconds=0.15),
        together=read_rate(path, slab, max(1, min(READERS, room)), seconds=0.15),
    )


def _fastest_s(size: int) -> float:
    """Seconds of reading so many bytes of memory, the best of three."""
    from moestro.kernels import native_cpu

    memory, best = native_cpu.aligned(size).fill_(1), float("inf")
    for _ in range(3):
        start = time.perf_counter()
        native_cpu.read(memory)
        best = min(best, time.perf_counter() - start)
    return best


def expected_misses(folder: Path, budget: Budget) -> tuple[list[Shares], str]:
    """How many experts of each mixture tokens miss [L, M], at least hits first; how that is known.

    Raises:
        DataError: there is a trace that cannot be read.
    """
    from moestro.models.budget import hit_bounds
    from moestro.models.pace import independent
    from moestro.probe.measures.misses import misses
    from moestro.probe.recording.tracefile import read_trace

    if all(kept == m.experts for kept, m in zip(budget.kept, budget.needs.mixtures, strict=True)):
        return [independent(budget, 1.0)], "all are kept, once they were read"
    bounds: list[Shares] = [independent(budget, hit) for hit in hit_bounds(budget)]
    path = folder / TRACE
    if not path.is_file():
        return bounds, "random routing, best published"
    trace, mixtures = read_trace(path), budget.needs.mixtures
    wanted = [(each.experts, each.top_k) for each in mixtures]
    top_k = trace.experts_TLK.shape[2]
    if [(trace.subject.num_experts, top_k)] * len(trace.subject.moe_layers) != wanted:
        return bounds, f"bounds; {TRACE} is of another model"
    shares: Shares = misses(trace, budget.kept).tolist()
    return [shares], f"simulated on {TRACE}"
