"""The families that are read and written: by config.json's model_type, and this project's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moestro.checkpoints.families import (
    deepseek,
    gpt_oss,
    llama,
    mixtral,
    olmoe,
    phimoe,
    qwen_moe,
    switch,
)
from moestro.checkpoints.families.table import Family, Rule
from moestro.errors import ConfigError

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        llama.LLAMA,
        llama.MISTRAL,
        llama.QWEN3,
        mixtral.MIXTRAL,
        olmoe.OLMOE,
        qwen_moe.QWEN2,
        qwen_moe.QWEN2_MOE,
        qwen_moe.QWEN3_MOE,
        deepseek.DEEPSEEK,
        deepseek.DEEPSEEK_V2,
        deepseek.DEEPSEEK_V3,
        gpt_oss.GPT_OSS,
        phimoe.PHIMOE,
        switch.SWITCH,
    )
}
# This project's own layout: every tensor under its own name.
OWN = Family("moestro", "", (), (Rule(("{name}",), "{name}"),))


def family_of(model_type: Any, where: str) -> Family:
    """The family of a `model_type`.

    Raises:
        ConfigError: it is not known; begins with `where`.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"{where}: model_type {model_type!r} is not known; known: {names(FAMILIES)}. "
            "transformers runs others: load it there, and moestro.hf.install() speeds up its "
            "experts"
        )
    return FAMILIES[model_type]


def names(found: Iterable[str]) -> str:
    """Names in a sentence."""
    return ", ".join(sorted(found))
