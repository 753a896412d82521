"""Rotary positions in config.json: `rope_parameters`, or `rope_theta` and `rope_scaling` before it.

Both forms are read. Written is the form that the original had, else the newer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moestro.checkpoints.families.table import Entry
from moestro.config import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    YarnScaling,
)
from moestro.errors import ConfigError

# Our setting → its name in theirs, if it has another.
_RENAMED = {
    "original_context": "original_max_position_embeddings",
    "short_scale": "short_mscale",
    "long_scale": "long_mscale",
}
# rope_type → {its field: our setting of that kind of scaling}
SCALINGS: Mapping[str, Mapping[str, str]] = {
    kind.model_fields["kind"].default: {
        _RENAMED.get(name, name): name for name in kind.model_fields if name != "kind"
    }
    for kind in (LinearScaling, Llama3Scaling, YarnScaling, LongRopeScaling)
}
_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings")
# What both forms may say besides, and older files repeat.
_PARTIAL = "partial_rotary_factor"
_BESIDE = {"rope_type", "type", "rope_theta", _PARTIAL, "finetuned"}


# longrope's magnitude is stated by Phi-3.5-MoE alone; elsewhere it would follow from the contexts.
_USUAL = ("linear", "llama3", "yarn")


def rope(
    theta: float = 10_000.0,
    *,
    scalings: tuple[str, ...] = _USUAL,
    required: bool = False,
    fraction: float | None = None,
    beside: frozenset[str] = frozenset(),
) -> Entry:
    """The entry of rotary positions.

    Args:
        theta: where config.json names none.
        scalings: the rope_types that the family has, beside default.
        required: config.json has to say them, since transformers' own default is a scaling.
        fraction: of a head that turns where `partial_rotary_factor` is missing; None: the family
            turns whole heads.
        beside: further fields without a meaning for text.
    """
    fields = _FIELDS if fraction is None else (*_FIELDS, _PARTIAL)

    def read(hf: Mapping[str, Any]) -> dict[str, Any]:
        given = _given(hf)
        if required and not given:
            raise ConfigError("rope_parameters are missing; this model_type needs them said")
        positions: dict[str, Any] = {
            "kind": "rope",
            "theta": given.get("rope_theta", hf.get("rope_theta") or theta),
        }
        kind = given.get("rope_type", given.get("type", "default"))
        if kind != "default":
            if kind not in scalings:
                known = ", ".join(("default", *scalings))
                raise ConfigError(f"rope_type is {kind!r}; known for this model_type: {known}")
            positions["scaling"] = _scaling(kind, given, hf)
        elif set(given) - _BESIDE - beside:
            raise ConfigError(f"rope_parameters of rope_type default have {sorted(given)}")
        if fraction is not None:
            positions["fraction"] = given.get(_PARTIAL, hf.get(_PARTIAL) or fraction)
        elif given.get(_PARTIAL, 1.0) != 1.0:
            raise ConfigError(f"{_PARTIAL} below 1 cannot be expressed here")
        return {"attention.positions": positions}

    def write(cfg: Any, original: Mapping[str, Any]) -> dict[str, Any]:
        positions = cfg.attention.positions
        if not isinstance(positions, RopeConfig):
            raise ConfigError(f"attention.positions are {positions.kind}; this layout has rotary")
        values = _written(positions)
        partial = {} if fraction is None else {_PARTIAL: positions.fraction}
        if not original or "rope_parameters" in original:
            return {"rope_parameters": {**values, "rope_theta": positions.theta, **partial}}
        scaled = values if positions.scaling is not None else None
        return {"rope_theta": positions.theta, "rope_scaling": scaled, **partial}

    return Entry(fields, read, write)


def _given(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary fields, of whichever form config.json has."""
    newer, older = (hf.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    if newer and older and newer != older:
        raise ConfigError(
            "rope_parameters and rope_scaling are both there and differ; keep the one that is "
            "meant (transformers reads rope_scaling, without rope_theta of the other)"
        )
    given = newer or older
    if not isinstance(given, Mapping) or any(isinstance(v, Mapping) for v in given.values()):
        raise ConfigError(
            "rope_parameters differ between kinds of layers; one set for all can be expressed"
        )
    return given


def _scaling(kind: str, given: Mapping[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    """Our scaling from their fields.

    The original context may also stand beside the rotary fields (Phi), and is the context itself
    where it is not said, as in transformers.
    """
    names = SCALINGS[kind]
    extra = set(given) - set(names) - _BESIDE
    if extra:
        raise ConfigError(f"rope_parameters has the unknown field {sorted(extra)[0]}")
    found = {key: value for key, value in given.items() if key in names and value is not None}
    if "original_max_position_embeddings" in names:
        beside = hf.get("original_max_position_embeddings")
        context = found.get("original_max_position_embeddings", hf.get("max_position_embeddings"))
        found["original_max_position_embeddings"] = beside or context
    missing = {"short_mscale", "long_mscale"} & set(names) - set(found)
    if missing:
        raise ConfigError(f"rope_parameters has no {sorted(missing)[0]}; longrope needs it")
    if kind == "yarn" and "factor" not in found:
        original = found["original_max_position_embeddings"]
        found["factor"] = hf["max_position_embeddings"] / original
    return {"kind": kind, **{names[key]: value for key, value in found.items()}}


def _written(positions: RopeConfig) -> dict[str, Any]:
    """Their fields of a scaling; optional ones only where they are not the default."""
    scaling = positions.scaling
    if scaling is None:
        return {"rope_type": "default"}
    values: dict[str, Any] = {"rope_type": scaling.kind}
    defaults = {name: info.default for name, info in type(scaling).model_fields.items()}
    always = {"beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"}
    for theirs, ours in SCALINGS[scaling.kind].items():
        value = getattr(scaling, ours)
        if value != defaults[ours] or theirs in always or scaling.kind == "longrope":
            values[theirs] = list(value) if isinstance(value, tuple) else value
    return values
