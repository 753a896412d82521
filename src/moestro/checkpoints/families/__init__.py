"""The families that are read and written: by config.json's model_type, and this project's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moestro.checkpoints.families import (
    bailing,
    deepseek,
    dots,
    ernie,
    glm,
    gpt_oss,
    granite,
    hunyuan,
    lfm2,
    llama,
    llama4,
    minimax,
    mixtral,
    olmoe,
    phimoe,
    qwen_moe,
    qwen_next,
    switch,
)
from moestro.checkpoints.families.table import Family, Rule
from moestro.checkpoints.families.translate import QUANTISATION
from moestro.errors import ConfigError

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        llama.LLAMA,
        llama.MISTRAL,
        llama.QWEN3,
        llama4.LLAMA4,
        mixtral.MIXTRAL,
        olmoe.OLMOE,
        qwen_moe.QWEN2,
        qwen_moe.QWEN2_MOE,
        qwen_moe.QWEN3_MOE,
        qwen_next.QWEN3_NEXT,
        qwen_next.QWEN3_5_MOE,
        deepseek.DEEPSEEK,
        deepseek.DEEPSEEK_V2,
        deepseek.DEEPSEEK_V3,
        deepseek.DEEPSEEK_V32,
        deepseek.KIMI_K2,
        bailing.BAILING_MOE,
        dots.DOTS1,
        ernie.ERNIE4_5_MOE,
        glm.GLM4_MOE,
        glm.GLM4_MOE_LITE,
        minimax.MINIMAX_M2,
        gpt_oss.GPT_OSS,
        granite.GRANITE_MOE,
        hunyuan.HUNYUAN_V1_MOE,
        lfm2.LFM2,
        lfm2.LFM2_MOE,
        phimoe.PHIMOE,
        switch.SWITCH,
    )
}
# A model_type of text and images → that of its text part, which config.json holds in `text_config`.
TEXT_PARTS: Mapping[str, str] = {
    "llama4": llama4.LLAMA4.model_type,
    "qwen3_5_moe": qwen_next.QWEN3_5_MOE.model_type,
}
# What such a config.json says beside it of the files and the head.
_BESIDE_TEXT = (*QUANTISATION, "dtype", "torch_dtype", "tie_word_embeddings")
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


def text_part(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model's text part; of a model of text alone, all of it.

    Raises:
        ConfigError: `text_config` is not there.
    """
    part = TEXT_PARTS.get(hf["model_type"]) if isinstance(hf.get("model_type"), str) else None
    if part is None:
        return dict(hf)
    text = hf.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError(f"a config.json of model_type {hf['model_type']!r} needs a text_config")
    beside = {name: hf[name] for name in _BESIDE_TEXT if name in hf}
    architectures = {"architectures": [FAMILIES[part].architecture]}
    return {**text, **beside, **architectures, "model_type": part}


def names(found: Iterable[str]) -> str:
    """Names in a sentence."""
    return ", ".join(sorted(found))
