"""Devices by name: memory, bandwidth and dense bfloat16 arithmetic, as their makers give them.

A sheet's GB of memory is 2³⁰ bytes, as the devices report it, of which a driver keeps a part; its
GB/s are thousands. 2:4 sparsity is left out of the FLOP/s. Sheets: NVIDIA H100 and H200 (SXM5),
A100 80GB (SXM4), L40S; NVIDIA's Ada whitepaper (RTX 4090) and GA102 whitepaper (RTX 3090), both
with fp32 accumulation; AMD Instinct MI300X.
"""

from __future__ import annotations

import difflib
from typing import NamedTuple

from moestro.errors import ConfigError


class Device(NamedTuple):
    """What bounds a model's speed."""

    name: str  # for people
    memory_bytes: int
    bytes_per_s: float  # peak read bandwidth of that memory
    flops_per_s: float  # peak dense products of bfloat16, a multiply and an add being two
    source: str


THIS = "this"
GIB = 2**30
_NVIDIA, _AMD = "NVIDIA data sheet", "AMD data sheet"

DEVICES = {
    "h100": Device("H100 SXM", 80 * GIB, 3.35e12, 989.4e12, _NVIDIA),
    "h200": Device("H200 SXM", 141 * GIB, 4.8e12, 989.4e12, _NVIDIA),
    "a100": Device("A100 80GB SXM", 80 * GIB, 2.039e12, 312e12, _NVIDIA),
    "l40s": Device("L40S", 48 * GIB, 864e9, 362.05e12, _NVIDIA),
    "rtx4090": Device("RTX 4090", 24 * GIB, 1.008e12, 165.2e12, "NVIDIA Ada whitepaper"),
    "rtx3090": Device("RTX 3090", 24 * GIB, 936e9, 71e12, "NVIDIA GA102 whitepaper"),
    "mi300x": Device("MI300X", 192 * GIB, 5.3e12, 1307.4e12, _AMD),
}


def device(name: str) -> Device:
    """The device called `name`, whatever its case, spaces and dashes.

    Raises:
        ConfigError: there is none; the message names those there are.
    """
    key = "".join(letter for letter in name.lower() if letter.isalnum())
    if key in DEVICES:
        return DEVICES[key]
    near = difflib.get_close_matches(key, DEVICES, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    known = ", ".join([*DEVICES, THIS])
    raise ConfigError(f"no device is called {name!r}: {hint}known are {known} (this machine)")
