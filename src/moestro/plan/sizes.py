"""Amounts as people write them: `24GiB` to bytes, and bytes, parameters and FLOPs to few digits."""

from __future__ import annotations

import re

from moestro.errors import ConfigError
from moestro.machine import free_bytes

_UNITS = {"B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", 1)
    for suffix, base in (("B", 1000), ("IB", 1024), ("", 1024))
}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]+)\s*")


def parse_bytes(text: str) -> int:
    """Read an amount of memory, or of a file.

    Example:
        >>> parse_bytes("24GiB"), parse_bytes("80 GB"), parse_bytes("1.5g")
        (25769803776, 80000000000, 1610612736)

    Args:
        text: a number and a unit: B, kB, MB, GB, TB (thousands) or KiB, MiB, GiB, TiB (1024s);
            a letter alone (24G) means the latter.

    Raises:
        ConfigError: it is not such an amount, or zero.
    """
    match = _AMOUNT.fullmatch(text)
    unit = _UNITS.get(match[2].upper()) if match else None
    amount = int(float(match[1]) * unit) if match and unit else 0
    if amount < 1:
        raise ConfigError(
            f"{text!r} is not a number of bytes; write a number and a unit such as 24GiB or 80GB"
        )
    return amount


NO_LIMIT, FREE = "none", "auto"


def memory_of(text: str) -> int | None:
    """Bytes that a process may take: an amount, `auto` for what is free; `none` gives None.

    Raises:
        ConfigError: it cannot be read, or the system does not say what is free.
    """
    if text == NO_LIMIT:
        return None
    if text != FREE:
        try:
            return parse_bytes(text)
        except ConfigError as error:
            raise ConfigError(f"{error}, auto or none") from None
    amount = free_bytes()
    if amount is None:
        raise ConfigError("this system does not say how much memory is free; give --memory 6GiB")
    return amount


def bytes_text(count: float) -> str:
    """Bytes as `12.3 GiB`."""
    return _scaled(count, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"), 1024, " ")


def parameters_text(count: float) -> str:
    """Parameters as `46.7B`: K, M, B and T are thousands of the one before."""
    return _scaled(count, ("", "K", "M", "B", "T"), 1000, "")


def flops_text(count: float) -> str:
    """FLOPs as `25.6 GFLOP`."""
    names = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP")
    return _scaled(count, names, 1000, " ")


def number_text(count: float) -> str:
    """A rate or a price with three digits: `0.0123`, `4.56`, `1,230`."""
    if count >= 100:
        return f"{count:,.0f}"
    return f"{count:#.3g}"


def _scaled(count: float, units: tuple[str, ...], base: int, gap: str) -> str:
    place = 0
    while count >= 999.5 and place < len(units) - 1:
        count, place = count / base, place + 1
    if place == 0:
        return f"{count:.0f}{gap}{units[0]}"
    digits = 0 if count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:,.{digits}f}{gap}{units[place]}"
