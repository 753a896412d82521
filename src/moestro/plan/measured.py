"""This machine as a device: its memory, and bandwidth and arithmetic measured in about a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from moestro.errors import MoestroError
from moestro.machine import memory_bytes
from moestro.plan.devices import Device

# Read in one go: far larger than any cache, far smaller than any memory.
ARRAY_BYTES = 512 * 2**20
CPU_SIDE, CUDA_SIDE = 2048, 8192


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
    memory: int | None
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = f"{torch.get_num_threads()} processor threads", memory_bytes()
        if memory is None:
            raise MoestroError("the system does not say how much memory it has; name a device")
    numbers = max(1, min(array_bytes, memory // 8) // 4)
    array = torch.ones(numbers, dtype=torch.float32, device=place)
    read_s = _best(lambda: array.sum(), seconds, cuda)
    side = side or (CUDA_SIDE if cuda else CPU_SIDE)
    product_s = min(
        _best(_product(side, dtype, place), seconds, cuda)
        for dtype in (torch.bfloat16, torch.float32)
    )
    return Device(
        name="this machine",
        memory_bytes=memory,
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
