"""The most tokens per second that a device's bandwidth and arithmetic allow, and their price.

A step cannot be faster than its bytes over the bandwidth, nor than its FLOPs over the FLOP/s.
"""

from __future__ import annotations

from typing import NamedTuple

from moestro.plan.devices import Device
from moestro.plan.work import Work


class Bound(NamedTuple):
    """An upper bound on speed, and so a lower one on price.

    Attributes:
        tokens_per_s: of all sequences together.
        limit: "bandwidth" or "arithmetic", whichever is the narrower.
        read_bytes: of one step.
        flops: of one step.
        usd_per_million: price of a million tokens at that speed; None without a price per hour.
    """

    tokens_per_s: float
    limit: str
    read_bytes: float
    flops: float
    usd_per_million: float | None


def bound(work: Work, device: Device, usd_per_hour: float | None) -> Bound:
    """The bound on `work` repeated over and over.

    Args:
        work: one step.
        device: what it runs on.
        usd_per_hour: what that costs, in any currency.
    """
    read_s = work.read_bytes / device.bytes_per_s
    compute_s = work.flops / device.flops_per_s
    speed = work.tokens / max(read_s, compute_s)
    price = None if usd_per_hour is None else 1e6 * usd_per_hour / (3600 * speed)
    limit = "bandwidth" if read_s > compute_s else "arithmetic"
    return Bound(speed, limit, work.read_bytes, work.flops, price)
