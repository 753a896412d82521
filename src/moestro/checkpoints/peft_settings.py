"""adapter_config.json: what PEFT says of a set of adapters, and of each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from moestro.checkpoints.folders import read_json
from moestro.errors import ConfigError

Number = TypeVar("Number", int, float)

PEFT_CONFIG = "adapter_config.json"
# What else PEFT's adapters can be → the values at which they are not.
_PLAIN = {
    "use_dora": (False, None), "bias": ("none", None), "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None), "lora_bias": (False, None), "layer_replication": (None,),
    "trainable_token_indices": (None,), "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    # The others begin from a base that they have changed (pissa, olora, loftq, corda).
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}  # fmt: skip


class PeftSettings(NamedTuple):
    """How adapters are scaled. A key is what PEFT matches patterns with.

    It is the name of a module, or of a parameter where `target_parameters` names it.

    Attributes:
        r: the rank.
        alpha: over which the product is scaled by alpha / rank.
        ranks: patterns of keys → other ranks.
        alphas: patterns of keys → other alphas.
        rooted: by alpha / sqrt(rank) instead (rsLoRA).
        parameters: ends of the names of parameters that are adapted.
    """

    r: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rooted: bool
    parameters: tuple[str, ...]

    def key(self, name: str) -> str:
        """The key of a parameter."""
        return name if self.is_named(name) else name.removesuffix(".weight")

    def is_named(self, name: str) -> bool:
        """Whether `target_parameters` has a parameter."""
        return any(name == end or name.endswith(f".{end}") for end in self.parameters)

    def rank(self, key: str) -> int:
        """The rank of an adapter."""
        return _by_pattern(self.ranks, key, self.r)

    def scale(self, key: str) -> float:
        """What the product of an adapter is multiplied by."""
        rank = self.rank(key)
        return _by_pattern(self.alphas, key, self.alpha) / (
            math.sqrt(rank) if self.rooted else rank
        )


def _by_pattern(patterns: Mapping[str, Number], key: str, default: Number) -> Number:
    """The value of the first pattern that fits, as peft's `get_pattern_key` finds it."""
    fits = (value for each, value in patterns.items() if re.match(rf"(.*\.)?({each})$", key))
    return next(fits, default)


def read_peft_settings(folder: Path) -> PeftSettings:
    """The settings of a folder of PEFT's.

    Raises:
        CheckpointError: there are none, or they are no JSON.
        ConfigError: the adapters are of a kind that is not read, or a value is not what it must be.
    """
    config = read_json(folder / PEFT_CONFIG)
    odd = [
        name for name, plain in _PLAIN.items() if config.get(name) not in plain and name in config
    ]
    if config.get("peft_type") != "LORA":
        odd = ["peft_type"]
    if odd:
        raise ConfigError(
            f"{folder}: {odd[0]} = {config.get(odd[0])!r} is not read; plain LoRA adapters are"
        )
    for name, (fits, what) in _FIELDS.items():
        if not fits(config.get(name)):
            raise ConfigError(
                f"{folder / PEFT_CONFIG}: {name} = {config.get(name)!r}, which must be {what}"
            )
    return PeftSettings(
        config["r"], config["lora_alpha"], config.get("rank_pattern") or {},
        config.get("alpha_pattern") or {}, bool(config.get("use_rslora")),
        tuple(config.get("target_parameters") or ()),
    )  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_number(value) and isinstance(value, int) and value > 0


def _is_pattern(text: str) -> bool:
    try:
        re.compile(rf"(.*\.)?({text})$")
    except re.error:
        return False
    return True


def _patterns(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value is unset, or patterns of names with values of their own."""

    def fits(value: Any) -> bool:
        known = isinstance(value, dict) and all(map(_is_pattern, value))
        return value is None or (known and all(map(of, value.values())))

    return fits


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(x, str) for x in value))


# Field → whether a value will do, None where it is not there, and what will.
_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number of 1 or more"),
    "lora_alpha": (_is_number, "a number"),
    "rank_pattern": (
        _patterns(_is_rank), "regular expressions of names, with whole numbers of 1 or more",
    ),
    "alpha_pattern": (_patterns(_is_number), "regular expressions of names, with numbers"),
    "use_rslora": (lambda value: value in (None, True, False), "true or false"),
    "target_parameters": (_is_names, "a list of names"),
}  # fmt: skip
