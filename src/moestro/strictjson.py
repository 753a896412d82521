"""The one reader of JSON that may come from someone else: bounded, and strict where JSON is vague.

Refused in addition to invalid JSON: a file that is not UTF-8 or too large, values nested too deep,
numbers of too many digits or beyond float64, NaN and Infinity unless asked for, a key that comes
twice with different values, and characters that no text can hold (lone surrogates).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# An index of a checkpoint with 200,000 tensors has 20 MiB, the header of a safetensors file at
# most 100 MB.
MOST_BYTES = 2**27
MOST_DEPTH = 100
# Fewer digits than overflow a float64. Published files hold 10**30 ("no limit") as a whole number.
MOST_DIGITS = 300
_LONG = re.compile(rf"(?<![0-9])[0-9]{{{MOST_DIGITS + 1}}}")


def parse(text: str | bytes, *, finite: bool = True, surrogates: bool = False) -> Any:
    """The value that JSON text spells.

    Args:
        text: bytes are UTF-8.
        finite: refuse NaN, Infinity and numbers beyond float64.
        surrogates: accept lone ones, which names of files can hold.

    Raises:
        ValueError: says what is wrong, and where JSON can say that.
    """
    try:
        text = text if isinstance(text, str) else text.decode()
        value = json.loads(
            text,
            object_pairs_hook=_object,
            # A call for each number takes most of the time of a list of them.
            parse_int=(lambda digits: int(_short(digits))) if _LONG.search(text) else int,
            parse_float=lambda digits: _number(_short(digits), finite),
            parse_constant=lambda name: _number(name, finite),
        )
        _check(value, surrogates)
    except UnicodeError as error:
        raise ValueError(f"it is not UTF-8 text: {error}") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    return value


def read_object(
    path: Path, refuse: Callable[[str], Exception], advice: str, *, finite: bool = True
) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: the file; where it is missing, damaged, or holds no object, `refuse` says so.
        refuse: makes the error of a message, such as `DataError`.
        advice: ends the message: what to do about a file that cannot be read.
        finite: as in `parse`.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        value = parse(content, finite=finite)
        if not isinstance(value, dict):
            raise ValueError(f"it holds {type(value).__name__} instead of an object")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise refuse(f"{path} cannot be read ({reason}); {advice}") from None
    return value


_TOO_DEEP = f"it nests values more than {MOST_DEPTH} deep"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for name, value in pairs:
            if found[name] != value:
                raise ValueError(f"the key {name[:100]!r} comes twice with different values")
    return found


def _short(digits: str) -> str:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"it holds a number of {len(digits):,} digits")
    return digits


def _number(digits: str, finite: bool) -> float:
    number = float(digits)
    if finite and not math.isfinite(number):
        raise ValueError(f"it holds the number {digits}, which is not finite")
    return number


def _check(value: Any, surrogates: bool) -> None:
    """Refuse values that are nested too deep, and text that cannot be written."""
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += one
                inner += one.values()
            elif isinstance(one, list):
                inner += one
            elif isinstance(one, str) and not surrogates:
                one.encode()
        if not inner:
            return
        level = inner
    raise ValueError(_TOO_DEEP)
