"""A packed file opened within a memory budget: experts stay in the file, all else is read.

Nothing of the file is mapped, so that what the process holds is what the budget says.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from torch import Tensor, nn

from moestro.checkpoints import packed_header
from moestro.checkpoints.packed_files import at, checked, fill
from moestro.checkpoints.packed_header import Section
from moestro.config import NetworkConfig
from moestro.errors import CheckpointError
from moestro.kernels.native_packing import private_memory
from moestro.kernels.packing import PAGE, ExpertSlabs
from moestro.kernels.residency import Residency, Slabs, Stored, open_direct
from moestro.machine import resident_bytes, return_freed
from moestro.models.budget import Budget, Mixture, Needs, Use, fit, needs, packing_bytes
from moestro.models.build import Model
from moestro.models.decoder import Decoder
from moestro.moe.layer import MoE
from moestro.moe.packed import PackedExperts

# Read at once: a file system may refuse more.
_PIECE = 1 << 28
_HUGE = 2 << 20


def sizes(path: Path) -> tuple[NetworkConfig, int, int, tuple[Mixture, ...]]:
    """What `budget.needs` takes first: settings, bytes of a plain number, dense bytes, experts.

    Raises:
        CheckpointError: see `packed_files.load`.
    """
    return sizes_of(*_opened(path, None)[:2])


def sizes_of(
    model: Model, sections: dict[str, Section]
) -> tuple[NetworkConfig, int, int, tuple[Mixture, ...]]:
    """See `sizes`, of a file that may not be written yet."""
    experts = _experts(model)
    dense = sum(_whole(each) for name, each in sections.items() if name not in experts)
    mixtures = []
    for name, moe in experts.items():
        count = moe.cfg.num_experts
        mixtures.append(Mixture(sections[name].tensor.numel() // count, count, moe.cfg.top_k))
    return model.cfg, sections["embed.weight"].tensor.element_size(), dense, tuple(mixtures)


class Within(NamedTuple):
    """The memory that a process may take."""

    memory: int  # bytes
    use: Use
    told: Callable[[Budget, Path], None] | None = None  # what the budget gives, before it is used
    process: int | None = None  # bytes that it has besides a model; None: what it holds now

    def needs(self, model: Model, sections: dict[str, Section]) -> Needs:
        """Of a file that may not be written yet."""
        process = resident_bytes() if self.process is None else self.process
        return needs(*sizes_of(model, sections), self.use, process)

    def needs_of_packing(self, model: Model, sections: dict[str, Section]) -> Needs:
        """The same where the file will be written first."""
        found = self.needs(model, sections)
        return found._replace(packing=packing_bytes(model.cfg, found.mixtures))


def refuse_too_small(within: Within, model: Model, sections: dict[str, Section]) -> None:
    """Before a packed form is written: whether it will open.

    Raises:
        ConfigError: the memory is too small; see `budget.fit`.
    """
    fit(within.needs_of_packing(model, sections), within.memory)


def needs_of(path: Path, within: Within) -> Needs:
    """What a file's model takes; raises as `sizes` does."""
    return within.needs(*_opened(path, None)[:2])


def load_within(path: Path, within: Within, source: dict[str, str] | None = None) -> Model:
    """`load` with as many experts as the memory holds.

    Raises:
        ConfigError: the memory is too small; see `budget.fit`.
        CheckpointError, MemoryError: see `load`.
    """
    opened = _opened(path, source)
    return_freed()  # what writing the file took
    budget = fit(within.needs(*opened[:2]), within.memory)
    if within.told is not None:
        within.told(budget, path)
    model = _filled(path, opened, budget.kept)
    if isinstance(model, Decoder):
        model.together = budget.together
    return model


def load(path: Path, kept: Sequence[int], source: dict[str, str] | None = None) -> Model:
    """Open a packed model, of which some experts of each mixture are in memory at a time.

    Args:
        path: from `packed_files.save`. It must not be written to while the model lives: reading
            an expert afterwards is an error.
        kept: how many experts of each mixture.
        source: see `packed_files.load`.

    Raises:
        CheckpointError: see `packed_files.load`.
        MemoryError: there is no memory for so many experts.
    """
    return _filled(path, _opened(path, source), kept)


def stored_experts(
    path: Path, kept: Sequence[int], source: dict[str, str] | None = None
) -> tuple[ExpertSlabs, ...]:
    """The experts of each mixture alone; raises as `load` does. Their biases are read."""
    opened = _opened(path, source)
    model, sections, _, _ = opened
    prefixes = {name.removesuffix("packed"): moe for name, moe in _experts(model).items()}
    own = {n: each for n, each in sections.items() if n.startswith(tuple(prefixes))}
    biases = _read(path, opened, [name for name in own if not name.endswith(".packed")])
    for prefix, moe in prefixes.items():
        experts: Any = moe.experts
        names = {f"{prefix}{part}": part for part in experts.parts() if part != "packed"}
        given = {part: biases[name] for name, part in names.items()}
        experts.use({"packed": own[f"{prefix}packed"].tensor, **given})
    _keep(path, opened, kept)
    return tuple(
        moe.experts.weights for moe in prefixes.values() if isinstance(moe.experts, PackedExperts)
    )


def _filled(path: Path, opened: _Opened, kept: Sequence[int]) -> Model:
    model, sections, _, _ = opened
    experts = _experts(model)
    tensors = _read(path, opened, [name for name in sections if name not in experts])
    tensors |= {name: sections[name].tensor for name in experts}
    fill(model, tensors)
    _keep(path, opened, kept)
    return model


def _keep(path: Path, opened: _Opened, kept: Sequence[int]) -> None:
    """Let experts be read as they are wanted, of each mixture so many in memory."""
    model, sections, begin, file = opened
    experts, slabs = _experts(model), []
    for (name, moe), most in zip(experts.items(), kept, strict=True):
        count, section = moe.cfg.num_experts, sections[name]
        size = section.tensor.numel() // count
        slabs.append(Slabs(begin + section.offset, size, count, min(most, count)))
    if slabs:
        residency = Residency(path, slabs, file)
        for number, moe in enumerate(experts.values()):
            own: Any = moe.experts
            own.weights = own.weights._replace(stored=Stored(residency, number))


def residency_of(model: nn.Module) -> Residency | None:
    """What reads a model's experts; None: they are in memory."""
    for module in model.modules():
        stored = module.weights.stored if isinstance(module, PackedExperts) else None
        if stored is not None:
            return stored.residency
    return None


class _Opened(NamedTuple):
    """A packed file whose header is read: its model without memory, and where tensors lie."""

    model: Model
    sections: dict[str, Section]  # places from `begin` on
    begin: int
    file: os.stat_result  # each later opening must find this one


def _opened(path: Path, source: dict[str, str] | None) -> _Opened:
    try:
        file = path.stat()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    header, begin = checked(path, source)
    return _Opened(*packed_header.unfilled(path, header, file.st_size - begin), begin, file)


def _experts(model: Model) -> dict[str, MoE]:
    """The mixtures by the names that their experts' tensors have in the file."""
    return {
        f"{path}.experts.packed": module
        for path, module in model.named_modules()
        if isinstance(module, MoE) and isinstance(module.experts, PackedExperts)
    }


def _whole(section: Section) -> int:
    """Bytes of a section, to the end of its last page."""
    return -(-section.tensor.nbytes // PAGE) * PAGE


def _read(path: Path, opened: _Opened, names: Sequence[str]) -> dict[str, Tensor]:
    """Some of the tensors, side by side in memory of their own."""
    sections = {name: opened.sections[name] for name in names}
    memory, place, tensors = private_memory(sum(map(_whole, sections.values())) or PAGE), 0, {}
    fd = open_direct(path, opened.file)
    try:
        for name, section in sections.items():
            start = opened.begin + section.offset
            _read_into(fd, path, memory, place, start, _whole(section))
            tensors[name] = at(memory, place, section)
            place += _whole(section)
        if hasattr(os, "posix_fadvise"):  # what came through the page cache need not stay there
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return tensors


def _read_into(fd: int, path: Path, memory: mmap.mmap, to: int, place: int, size: int) -> None:
    with memoryview(memory) as view:
        while size:
            with view[to : to + min(size, _PIECE)] as piece:
                got = _read_once(fd, path, piece, place)
            to, place, size = to + got, place + got, size - got


def _read_once(fd: int, path: Path, piece: memoryview, place: int) -> int:
    """Bytes read at a place, at least one."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)  # before the read: another thread may change them
    try:
        got = os.preadv(fd, [piece], place)
    except OSError as error:
        if error.errno == errno.EINVAL and flags & os.O_DIRECT:  # only through the cache
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            return os.preadv(fd, [piece], place)
        raise CheckpointError(f"cannot read {path} at byte {place}: {error.strerror}") from None
    if not got:
        raise CheckpointError(f"cannot read {path} at byte {place}: it ends there")
    return got


def read_room(piece: int) -> int:
    """Bytes that `read_rate` takes for each thread: whole large pages, as experts lie."""
    return -(-piece // _HUGE) * _HUGE


def read_rate(path: Path, piece: int, threads: int = 1, seconds: float = 0.3) -> float:
    """Bytes per second of reading pieces at random places of a file, past the page cache.

    Args:
        path: of the file.
        piece: bytes of each, rounded up to whole pages.
        threads: that read at once.
        seconds: how long.
    """
    piece = min(-(-piece // PAGE) * PAGE, path.stat().st_size // PAGE * PAGE)
    places = range(0, path.stat().st_size - piece + 1, PAGE)
    end, fd = time.perf_counter() + seconds, open_direct(path)

    def read(seed: int) -> int:
        random, done = Random(seed), 0
        with (
            private_memory(read_room(piece)) as memory,
            memoryview(memory) as whole,
            whole[:piece] as view,
        ):
            while not done or time.perf_counter() < end:
                done += _read_once(fd, path, view, random.choice(places))
        return done

    start = time.perf_counter()
    try:
        with ThreadPoolExecutor(threads) as pool:
            total = sum(pool.map(read, range(threads)))
    finally:
        os.close(fd)
    return total / (time.perf_counter() - start)
