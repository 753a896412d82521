"""This machine as a device: its memory, and bandwidth and arithmetic measured in about a second."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from moestro.plan.devices import Device

# Read at once: far larger than any cache, far smaller than any memory.
ARRAY_BYTES = 512 * 2**20
CPU_SIDE, CUDA_SIDE = 2048, 8192
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def measure(
    seconds: float = 0.3, array_bytes: int = ARRAY_BYTES, side: int | None = None
) -> Device:
    """Measure the first CUDA device if there is one, else the processor with torch's threads.

    Bandwidth is that of summing one large array; arithmetic the better of square products in
    bfloat16 and float32. Both take the best of the repeats that fit the time, since what is asked
    for is what the machine can do.

    Args:
        seconds: for each of the three measurements, after one repeat to warm up.
        array_bytes: size of the array; at most an eighth of the memory is taken.
        side: rows and columns of the matrices; None chooses by the device.
    """
    cuda = torch.cuda.is_available()
    place = torch.device("cuda" if cuda else "cpu")
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        name, memory_bytes = properties.name, properties.total_memory
    else:
        name, memory_bytes = f"{torch.get_num_threads()} processor threads", _memory_bytes()
    numbers = max(1, min(array_bytes, memory_bytes // 8) // 4)
    array = torch.ones(numbers, device=place)
    read_s = _best(lambda: array.sum(), seconds, cuda)
    side = side or (CUDA_SIDE if cuda else CPU_SIDE)
    product_s = min(
        _best(_product(side, dtype, place), seconds, cuda)
        for dtype in (torch.bfloat16, torch.float32)
    )
    return Device(
        name="this machine",
        memory_bytes=memory_bytes,
        bytes_per_s=4 * numbers / read_s,
        flops_per_s=2 * side**3 / product_s,
        source=f"measured, {name}",
    )


def _product(side: int, dtype: torch.dtype, place: torch.device) -> Callable[[], object]:
    x_OI = torch.ones(side, side, device=place, dtype=dtype)
    return lambda: x_OI @ x_OI


def _best(call: Callable[[], object], seconds: float, cuda: bool) -> float:
    """Shortest time of one call, in seconds."""
    best, end = float("inf"), 0.0
    while True:
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if end:
            best = min(best, now - start)
            if now >= end:
                return max(best, 1e-9)
        else:
            end = now + seconds


def _memory_bytes() -> int:
    """The machine's memory, or the container's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total
