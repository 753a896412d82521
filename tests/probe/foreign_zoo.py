"""Tiny random models of every family of transformers that routes text through a mixture.

One table: the model's class and what its settings need beside `SIZES`, of which each takes what it
knows. Families whose mixtures are in a stack of their own are built without the other stacks.

Run as a program (`make test-latest`), it lists the mixtures that the installed transformers has and
the tables do not: each is built tiny and recorded where that works. They fail no test.
"""

import importlib
import re
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

from moestro.foreign.taps import taps
from moestro.probe.recording.passages import Passage
from moestro.probe.recording.record import record

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False, "num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6,
    "moe_num_experts": 6, "num_experts_per_tok": 3, "moe_k": 3, "moe_topk": 3, "top_k_experts": 3,
    "num_shared_experts": 1, "n_shared_experts": 1, "moe_num_shared_experts": 1,
    "moe_intermediate_size": 14, "shared_expert_intermediate_size": 10,
    "shared_intermediate_size": 10, "expert_ffn_hidden_size": 14, "ffn_hidden_size": 20,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "n_group": 2, "topk_group": 1,
    "kv_lora_rank": 14, "q_lora_rank": 18, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 10, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_head_dim": 8,
    "linear_num_heads": 2, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
    "moe_hidden_size": 16, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 8,
    "moe_shared_expert_intermediate_size": 10, "router_hidden_size": 12,
    "share_expert_dim": 10, "mamba_d_state": 8,
}  # fmt: skip
OUT = object()  # left out, though the settings know it
LATENT = {"num_key_value_heads": 4, "head_dim": OUT}
_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_NO_MLA = dict.fromkeys(
    ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), OUT
)
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4}

# Class of the model → settings.
_FAMILIES = {
    "AfmoeForCausalLM": {},
    "AriaTextForCausalLM": {},
    "AXK1ForCausalLM": LATENT,
    "AXK2ForCausalLM": LATENT,
    "BailingHybridForCausalLM": {},
    "BeamForCausalLM": _SPARSE,
    "Cohere2MoeForCausalLM": {},
    "DbrxForCausalLM": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 20, "moe_num_experts": 6, "moe_top_k": 3},
        **dict.fromkeys(
            ("num_attention_heads", "hidden_size", "num_hidden_layers",
             "max_position_embeddings", "num_key_value_heads"), OUT,
        ),
    },
    "DeepseekOcr2TextModel": {**_SPARSE, **_NO_MLA, "num_key_value_heads": 4},
    "DeepseekV2ForCausalLM": LATENT,
    "DeepseekV3ForCausalLM": LATENT,
    "DeepseekV32ForCausalLM": LATENT,
    "DeepseekV4ForCausalLM": {"num_key_value_heads": 1, "o_lora_rank": 8, "num_hidden_layers": 4,
                              "head_dim": 16, "o_groups": 2},
    "Dots1ForCausalLM": {},
    "Dots3NoteForCausalLM": {**LATENT, "layer_types": ["full_attention"] * 2, "pad_token_id": 0},
    "Ernie4_5_MoeForCausalLM": {},
    "Ernie4_5_VLMoeTextModel": {
        "moe_intermediate_size": [14, 14],
        "rope_parameters": {**_SECTIONS, "mrope_section": [1, 1, 2]},
    },
    "ExaoneMoeForCausalLM": {},
    "FlexOlmoForCausalLM": {},
    "FlintForCausalLM": {"num_hidden_layers": 3},
    "Gemma4ForCausalLM": {
        "enable_moe_block": True,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCABULARY,
        "pad_token_id": 0,
    },
    "Glm4MoeForCausalLM": {},
    "Glm4MoeLiteForCausalLM": LATENT,
    "Glm4vMoeTextModel": {
        "rope_parameters": {**_SECTIONS, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
    },
    "Glm5NextTextModel": {**LATENT, **_SPARSE, "qk_rope_head_dim": 0, "index_kpool": 1},
    "GlmMoeDsaForCausalLM": LATENT,
    "GptOssForCausalLM": {},
    "GraniteMoeForCausalLM": {},
    "GraniteMoeHybridForCausalLM": {
        "mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["mamba", "attention"],
    },
    "GraniteMoeSWAForCausalLM": {},
    "GraniteMoeSharedForCausalLM": {},
    "HunYuanMoEV1ForCausalLM": {},
    "HYV3ForCausalLM": {},
    "HYV4ForCausalLM": {},
    "HYV4VLTextModel": {"rope_parameters": {**_SECTIONS, "mrope_section": [2, 1, 1]}},
    "InklingForCausalLM": {},
    "Inkling2ForCausalLM": {},
    "Inkling2LoopForCausalLM": {},
    "JambaForCausalLM": {},
    "JetMoeForCausalLM": {},
    "KimiLinearForCausalLM": {},
    "Kolibri1ForCausalLM": {},
    "LagunaForCausalLM": {},
    "LaraMiniForCausalLM": {},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Llama4ForCausalLM": {},
    "LongcatFlashForCausalLM": {**LATENT, "num_layers": 2, "zero_expert_num": 2, "head_dim": 8},
    "MellumForCausalLM": {},
    "MiMoV2FlashForCausalLM": {},
    "MiniMaxForCausalLM": {},
    "MiniMaxM2ForCausalLM": {},
    "MiniMaxM3VLForCausalLM": {},
    "Mistral4ForCausalLM": LATENT,
    "MistralLarge4TextModel": LATENT,
    "MixtralForCausalLM": {},
    "MuseSparkTextModel": {},
    "NemotronHForCausalLM": {"n_groups": 2},
    "OlmoeForCausalLM": {},
    "OpenAIPrivacyFilterForTokenClassification": {},
    "PhimoeForCausalLM": {},
    "Qwen2MoeForCausalLM": {},
    "Qwen3MoeForCausalLM": {},
    "Qwen3NextForCausalLM": {},
    "Qwen3OmniMoeThinkerTextModel": {},
    "Qwen3VLMoeTextModel": {},
    "Qwen3_5MoeForCausalLM": {},
    "Qwen4ExpForCausalLM": {},
    "SolarOpenForCausalLM": {},
    "Step3p7TextModel": {**_SPARSE, "pad_token_id": 0, "sliding_window": 8},
    "UnlimitedOcrTextModel": LATENT,
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}  # fmt: skip
# One denoises a block of tokens beside the text and is refused; the other sees images.
_ELSEWHERE = {"DiffusionGemmaForBlockDiffusion", "VitPoseNaiveMoe"}
# A mixture is there, but its routing cannot be seen.
REFUSED = {
    "DogeForCausalLM": {"is_moe": True, "num_experts": 16},
    "NllbMoeForConditionalGeneration": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1},
    "SwitchTransformersForConditionalGeneration": {"d_model": 32, "num_layers": 2},
}


@cache
def classes() -> dict[str, Path]:
    """Every class in the modeling files of the installed transformers, and its file."""
    return {
        name: path
        for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"))
        for name in re.findall(r"^class (\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }


# Those that the installed version has.
FAMILIES = {name: settings for name, settings in _FAMILIES.items() if name in classes()}


def unknown() -> dict[Path, list[str]]:
    """Modeling files with experts but no class of the tables above, and the classes of each."""
    by_file: dict[Path, list[str]] = {}
    for name, path in classes().items():
        by_file.setdefault(path, []).append(name)
    known = {*FAMILIES, *REFUSED, *_ELSEWHERE}
    return {
        path: names
        for path, names in by_file.items()
        if not known.intersection(names)
        and any(re.search(r"(Experts|MoE|Moe)$", name) for name in names)
    }


def build(name: str, **changes):
    """The model of that class, in fp32 and evaluation mode."""
    kind = _class(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = kind.config_class
        if hasattr(settings(), "text_config") and "ForConditional" not in name:
            settings = type(settings().text_config)
        known = settings()
        given = {
            **{key: value for key, value in SIZES.items() if _knows(known, key)},
            **{**FAMILIES, **REFUSED}.get(name, {}),
            **changes,
        }
        config = settings(**{key: value for key, value in given.items() if value is not OUT})
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"
        torch.manual_seed(0)
        model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Routers that tell tokens apart, and experts that can be told apart.
            if parameter.dim() > 1 and ("gate" in name or "router" in name or "expert" in name):
                parameter.normal_(0, 0.3)
    return model


def _class(name: str):
    found = getattr(transformers, name, None)
    if found is not None:
        return found
    path = classes()[name]
    place = f"transformers.models.{path.parent.name}.{path.stem}"
    return getattr(importlib.import_module(place), name)


def _knows(settings, key: str) -> bool:
    try:
        return hasattr(settings, key)
    except Exception:  # settings that differ by layer
        return True


def outcome(names: list[str]) -> str:
    """What becomes of the first class for text among `names`."""
    text = [name for name in names if name.endswith(("ForCausalLM", "TextModel"))]
    if not text:
        return "no class for text alone"
    try:
        model = build(text[0])
        found = taps(model)
        record(model, [Passage(torch.randint(3, VOCABULARY, (7,)))])
    except Exception as error:
        return f"{text[0]} cannot be built or recorded: {type(error).__name__}: {error}"
    unscored = sorted({type(tap.router).__name__ for tap in found if tap.scoring is None})
    return f"{text[0]} is recorded" + (f"; routers not in ROUTERS: {unscored}" if unscored else "")


def main() -> None:
    """One line a family."""
    warnings.simplefilter("ignore")
    families = unknown()
    print(f"transformers {transformers.__version__}: {len(families)} families new to the tests")
    for path, names in families.items():
        print(f"  {path.parent.name}: {outcome(names)}")


if __name__ == "__main__":
    main()
