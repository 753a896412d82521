"""The most tokens per second that a device's bandwidth and arithmetic allow, and their price.

A step cannot be faster than its bytes over the bandwidth, nor than its FLOPs over the FLOP/s.
"""

from __future__ import annotations

from typing import NamedTuple

from moestro.plan.devices import Device
from moestro.plan.work import StepWork


class Bound(NamedTuple):
    """An upper bound on speed, and so a lower one on price."""

    tokens_per_s: float  # of all sequences together
    limit: str  # "bandwidth" or "arithmetic", whichever is the narrower
    read_bytes: float  # of one step
    flops: float
    usd_per_million: float | None  # price of a million tokens; None without a price per hour


def bound(work: StepWork, device: Device, usd_per_hour: float | None) -> Bound:
    """The bound on one step, repeated over and over; a price is in any currency."""
    read_s = work.read_bytes / device.bytes_per_s
    compute_s = work.flops / device.flops_per_s
    speed = work.tokens / max(read_s, compute_s)
    price = None if usd_per_hour is None else 1e6 * usd_per_hour / (3600 * speed)
    limit = "bandwidth" if read_s > compute_s else "arithmetic"
    return Bound(speed, limit, work.read_bytes, work.flops, price)
