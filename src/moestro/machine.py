"""What the machine reports: processor, memory, peak memory, energy; and memory given back to it."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

POWERCAP = Path("/sys/class/powercap")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
# What is left to the system of the memory that is free now.
SPARED = 0.05
_CLEAR_PEAK = "5"
_WATCHED_S = 0.02


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """Memory this process may use: the machine's, or the container's limit where that is lower."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return min([total, *(limit for limit, _ in _limits())])


def free_bytes() -> int | None:
    """Memory that this process can have in all: what it has, and what is free in every limit.

    5 % of that remain for the system. What a limited group has of files in memory counts as free.
    """
    there = _fields(Path("/proc/meminfo")).get("MemAvailable")
    if there is None:
        return None
    room = [there * 1024, *(limit - used for limit, used in _limits())]
    return _held_bytes() + int(max(0, min(room)) * (1 - SPARED))


def _held_bytes() -> int:
    """The memory of this process that does not count as free: not its mapped files."""
    own = _fields(Path("/proc/self/status"))
    return sum(own.get(name, 0) for name in ("RssAnon", "RssShmem")) * 1024 or resident_bytes()


def resident_bytes() -> int:
    """The memory that this process holds now, files mapped included."""
    return _fields(Path("/proc/self/status")).get("VmRSS", 0) * 1024 or peak_bytes()


def return_freed() -> None:
    """Give memory that this process has freed back to the system, where its allocator can."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _limits() -> list[tuple[int, int]]:
    """(limit, bytes used but for files) of each control group that this process is in."""
    found = []
    lines = OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.is_file() else []
    for line in lines:
        _, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        root = CGROUPS / "memory" if "memory" in kinds.split(",") else CGROUPS
        if kinds and root == CGROUPS:
            continue  # another controller of version 1
        # In a container the path may be that of the host; its own limit is at the root.
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(root) and (limit := _limit(folder)) is not None:
                found.append(limit)
    return found


def _limit(group: Path) -> tuple[int, int] | None:
    """See `_limits`; of version 2 or 1. None: there is none.

    Above `memory.high` a group is slowed down until it stands still, so that is its limit too.
    """
    for most, now, files in (
        (("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file")),
        (
            ("memory.limit_in_bytes",),
            "memory.usage_in_bytes",
            ("total_active_file", "total_inactive_file"),
        ),
    ):
        limits = []
        for name in most:
            with suppress(OSError, ValueError):  # not there, or "max"
                limits.append(int((group / name).read_text()))
        with suppress(OSError, ValueError):
            used = int((group / now).read_text())
            fields = _fields(group / "memory.stat")
            if limits:
                return min(limits), used - sum(fields.get(name, 0) for name in files)
    return None


def _fields(path: Path) -> dict[str, int]:
    """Numbers by name, a line each; none of a file that cannot be read."""
    found = {}
    with suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, rest = line.replace(":", " ").partition(" ")
            if (words := rest.split()) and words[0].isdecimal():
                found[name] = int(words[0])
    return found


def forget_peak() -> None:
    """Let `peak_bytes` count from here, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)


def peak_bytes() -> int:
    """The most memory that this process has held, since `forget_peak` where the system can."""
    return _peak_of("self") or _largest(resource.RUSAGE_SELF)


def run_watched(
    words: Sequence[str], cwd: str, timeout_s: float
) -> tuple[subprocess.CompletedProcess[str], int]:
    """Run a program to its end; what it printed, and the most memory that it was seen to hold.

    Seen while it runs: of a process that has ended Linux tells no less than its parent held when it
    began.

    Raises:
        OSError, subprocess.TimeoutExpired: as `subprocess.run` does.
    """
    peak, ended = 0, Event()
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, cwd=cwd) as process:

        def watch() -> None:
            nonlocal peak
            while not ended.wait(_WATCHED_S):
                peak = max(peak, _peak_of(process.pid))

        watcher = Thread(target=watch)
        watcher.start()
        try:
            printed = process.communicate(timeout=timeout_s)
        except BaseException:
            process.kill()
            raise
        finally:
            ended.set()
            watcher.join()
    done = subprocess.CompletedProcess(words, process.returncode, *printed)
    return done, peak or _largest(resource.RUSAGE_CHILDREN)


def _peak_of(process: int | str) -> int:
    """The most memory that a process which runs has held, in bytes; 0 where none is told."""
    return _fields(Path(f"/proc/{process}/status")).get("VmHWM", 0) * 1024


def _largest(whose: int) -> int:
    peak = resource.getrusage(whose).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Energy:
    """The processors' energy counters under /sys/class/powercap, where readable."""

    def __init__(self, root: Path = POWERCAP) -> None:
        self._counters: list[tuple[Path, int]] = []
        for zone in sorted(root.glob("*:*")) if root.is_dir() else ():
            if zone.name.count(":") > 1:
                continue  # a part of a package, which is counted with it
            with suppress(OSError, ValueError):
                most = int((zone / "max_energy_range_uj").read_text())
                int((zone / "energy_uj").read_text())
                self._counters.append((zone / "energy_uj", most))

    def joules(self) -> list[int] | None:
        """The counters now, in microjoules; None without counters."""
        if not self._counters:
            return None
        return [int(path.read_text()) for path, _ in self._counters]

    def since(self, before: list[int] | None) -> float | None:
        """Joules since `joules` gave `before`; a counter that wrapped around is handled."""
        now = self.joules()
        if before is None or now is None:
            return None
        pairs = zip(now, before, self._counters, strict=True)
        return sum((new - old) % (most + 1) for new, old, (_, most) in pairs) / 1e6
