"""The field's models by name: their settings, where these come from, and what they count.

The data is presets.toml beside this file. An entry may say `like = "other"` and give only what
differs. A model that our settings cannot express has counts (`[name.count]`) in their place.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from moestro.config import EncDecConfig, ModelConfig
from moestro.errors import ConfigError
from moestro.models.count import Count, Span, count
from moestro.plan.subject import PlannedModel

DATA = Path(__file__).with_name("presets.toml")


def names() -> list[str]:
    """Every preset's name, in the order of presets.toml."""
    return list(_entries())


def is_preset(name: str) -> bool:
    """Whether `preset` knows the name."""
    return _key(name) in _entries()


def preset(name: str) -> PlannedModel:
    """The preset of that name; capitals do not matter, and `/` may stand for `-`.

    Raises:
        ConfigError: no preset has that name; the message has the nearest ones.
    """
    known = _key(name)
    if known not in _entries():
        longer = [one for one in names() if known and one.startswith(known)][:3]
        near = longer or difflib.get_close_matches(known, names(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names())}"
        raise ConfigError(f"there is no preset {name!r}; {hint}")
    return _build(known)


def _key(name: str) -> str:
    return name.lower().replace("/", "-")


@cache
def _entries() -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = tomllib.loads(DATA.read_text(encoding="utf-8"))
    return entries


@cache
def _build(name: str) -> PlannedModel:
    entry = _resolved(name)
    counts, decoder, encdec = (entry.pop(key, None) for key in ("count", "model", "encdec"))
    if counts is not None:
        return PlannedModel(name, None, _given(**counts), **entry)
    cfg = EncDecConfig(**encdec) if decoder is None else ModelConfig(**decoder)
    return PlannedModel(name, cfg, count(cfg), **entry)


def _resolved(name: str) -> dict[str, Any]:
    """An entry with what it takes from the one that it is `like`."""
    entry = dict(_entries()[name])
    like = entry.pop("like", None)
    return entry if like is None else _merged(_resolved(like), entry)


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if nested else value
    return merged


def _given(attention: int = 0, **numbers: int) -> Count:
    """A count from its numbers; `attention` as in `Count.attention`, every layer causal."""
    return Count(**numbers, spans=(Span(attention, None, causal=True),))
