"""What the machine reports: processor, memory, peak memory, energy."""

from __future__ import annotations

import os
import platform
import resource
import sys
from contextlib import suppress
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CLEAR_PEAK = "5"


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
    text = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def forget_peak() -> None:
    """Let `peak_bytes` count from here, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)


def peak_bytes() -> int:
    """The most memory that this process has held, since `forget_peak` where the system can."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return _largest(resource.RUSAGE_SELF)


def resident_bytes() -> int:
    """Memory that this process holds now; 0 where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


def children_peak_bytes() -> int:
    """The most memory that any child of this process held."""
    return _largest(resource.RUSAGE_CHILDREN)


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
