"""Fields of a GGUF header, each of one type, and rotary positions, as config.json would have them.

A file is not trusted: a field can be of any type, and each of these refuses all but its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from moestro.checkpoints.gguf.header import Header, TensorInfo
from moestro.errors import ConfigError

Fields = dict[str, Any]
_Value = TypeVar("_Value")
_LARGEST = float(np.finfo(np.float32).max)


def number(header: Header, key: str, default: float | None = None) -> Any:
    """A number among the fields; of a list with one for each layer, the one that all layers share.

    Raises:
        ConfigError: it is missing and has no default, is no finite number, or layers differ.
    """
    value = header.get(key, default)
    if value is None:
        raise ConfigError(f"{header.file} lacks the field {header.name(key)}")
    if isinstance(value, np.ndarray):
        same = set(value.tolist())
        if len(same) > 1:
            raise ConfigError(
                f"{header.file}: {header.name(key)} differs from layer to layer, which "
                "cannot be expressed here"
            )
        value = same.pop() if same else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(header, key, value, "a number")
    if isinstance(value, float) and not abs(value) <= _LARGEST:
        raise _wrong(header, key, value, "a finite number of fp32")
    return _shortest(value) if isinstance(value, float) else value


def whole(header: Header, key: str, default: int | None = None) -> int:
    """A whole number, of layers as `number` takes them.

    Raises:
        ConfigError: see `number`; or it is stored as a fraction, even one like 2.0.
    """
    value = number(header, key, default)
    if not isinstance(value, int):
        raise _wrong(header, key, value, "a whole number")
    return value


def flag(header: Header, key: str, default: bool) -> bool:
    """True or false.

    Raises:
        ConfigError: it is of another type.
    """
    value = header.get(key, default)
    if not isinstance(value, bool):
        raise _wrong(header, key, value, "true or false")
    return value


def text(header: Header, key: str) -> str | None:
    """A text, or None where the field is missing.

    Raises:
        ConfigError: it is of another type.
    """
    value = header.get(key)
    if not isinstance(value, str | None):
        raise _wrong(header, key, value, "a text")
    return value


def texts(header: Header, key: str) -> list[str] | None:
    """A list of texts, or None where the field is missing; see `header.read` for empty ones.

    Raises:
        ConfigError: it is of another type.
    """
    value = header.get(key)
    if not isinstance(value, list | None):
        raise _wrong(header, key, value, "a list of texts")
    return value


def numbers(header: Header, key: str) -> NDArray[Any] | None:
    """A list of numbers, or None where the field is missing.

    Raises:
        ConfigError: it is of another type.
    """
    value = header.get(key)
    if value is not None and (not isinstance(value, np.ndarray) or value.dtype == bool):
        raise _wrong(header, key, value, "a list of numbers")
    return value


def given(header: Header, key: str, read: Callable[[Header, str], _Value]) -> _Value | None:
    """A field as `read` gives it (`number` or `whole`), or None where it is missing."""
    return None if header.get(key) is None else read(header, key)


def _wrong(header: Header, key: str, value: object, wanted: str) -> ConfigError:
    found = f"{value!r:.80}".replace("\n", " ")
    return ConfigError(
        f"{header.file}: the field {header.name(key)} is {found}, and has to be {wanted}; convert "
        "the model again with a current llama.cpp"
    )


def _shortest(value: float) -> float:
    """A number that went through fp32 as it was written: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def rotary(header: Header, width: int) -> Fields:
    """`rope_parameters`, of heads that are `width` wide.

    Raises:
        ConfigError: the scaling is not known, or heads or what is turned of them have no width.
    """
    turned = whole(header, ".rope.dimension_count", width)
    base = number(header, ".rope.freq_base", 10_000.0)
    if min(width, turned) < 1 or base <= 0:
        raise ConfigError(
            f"{header.file} says that heads are {width} wide, of which {turned} are turned, with a "
            f"base of {base}; each has to be positive"
        )
    fields: Fields = {
        "rope_theta": base,
        "partial_rotary_factor": turned / width,
    }
    kind = text(header, ".rope.scaling.type") or "none"
    factor = given(header, ".rope.scaling.factor", number)
    if kind == "yarn":
        log = given(header, ".rope.scaling.yarn_log_multiplier", number)
        scale = None if log is None else _shortest(log * 10)
        yarn = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": given(
                header, ".rope.scaling.original_context_length", whole
            ),
            "beta_fast": given(header, ".rope.scaling.yarn_beta_fast", number),
            "beta_slow": given(header, ".rope.scaling.yarn_beta_slow", number),
            "mscale": scale,
            "mscale_all_dim": scale,
        }
        fields |= {key: value for key, value in yarn.items() if value is not None}
    elif kind == "linear" and factor not in (None, 1.0):
        fields |= {"rope_type": "linear", "factor": factor}
    elif kind not in ("none", "linear"):
        raise ConfigError(
            f"{header.file}: rotary positions are scaled by {kind!r}, which is not read from GGUF; "
            "read are linear and yarn"
        )
    else:
        fields["rope_type"] = "default"
    return fields | _llama3(header, turned, base) | _longrope(header, turned)


# factor, low_freq_factor, high_freq_factor, original context (Llama 3.1 to 3.3's config.json).
_LLAMA3 = tuple((factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0, 16.0, 4.0))


def _llama3(header: Header, width: int, base: float) -> Fields:
    """Llama 3's scaling, of which a file has only what it divides each frequency by."""
    stated = _factors(header, "rope_freqs.weight", width)
    if stated is None:
        return {}
    waves = 2 * np.pi * base ** (np.arange(0, width, 2) / width)
    for factor, low, high, context in _LLAMA3:
        smooth = np.clip((context / waves - low) / (high - low), 0, 1)
        if len(stated) == len(waves) and np.allclose(
            stated, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3
        ):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
    raise ConfigError(
        f"{header.file}: rope_freqs.weight is not the scaling of any Llama 3, and no other is read"
    )


def _longrope(header: Header, width: int) -> Fields:
    """Phi's scaling: factors of short and of long texts, and one magnitude, stated or 1."""
    factors = {
        f"{name}_factor": _factors(header, f"rope_factors_{name}.weight", width)
        for name in ("short", "long")
    }
    if any(each is None for each in factors.values()):
        return {}
    magnitude = number(header, ".rope.scaling.attn_factor", 1.0)
    return {
        "rope_type": "longrope",
        **{
            name: [_shortest(one) for one in each]
            for name, each in factors.items()
            if each is not None
        },
        "short_mscale": magnitude,
        "long_mscale": magnitude,
        "original_max_position_embeddings": whole(header, ".rope.scaling.original_context_length"),
    }


def _factors(header: Header, name: str, width: int) -> NDArray[np.float32] | None:
    """What a file divides each frequency by; None: nothing."""
    found: list[TensorInfo] = [info for info in header.tensors if info.name == name]
    if not found:
        return None
    info = found[0]
    if info.shape != (width // 2,) or info.kind.name != "F32":
        raise ConfigError(f"{header.file}: {name} is {list(info.shape)}")
    with header.file.open("rb") as file:
        file.seek(info.offset)
        return np.frombuffer(file.read(info.bytes), "<f4")
