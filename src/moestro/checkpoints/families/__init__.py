"""The families that are read and written in Hugging Face's layout, by config.json's model_type."""

from __future__ import annotations

from collections.abc import Mapping

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
from moestro.checkpoints.families.table import Family

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        llama.LLAMA,
        llama.MISTRAL,
        llama.QWEN3,
        mixtral.MIXTRAL,
        olmoe.OLMOE,
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
