"""Tiny random models of transformers, one for each form that a family takes."""

import copy
import warnings

import pytest
import torch

from .tiny_newer import LATENT, LEFT_OUT, NEWER, PLAIN_ROPE, YARN

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

VOCABULARY = 61
BODY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": PLAIN_ROPE,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
QWEN_MOE = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 14,
    "decoder_sparse_step": 1,
}

# The norm of a delta layer's outputs lets small ones grow, and their rounding: hence large `eps`.
DELTA = {
    "num_hidden_layers": 4,
    "head_dim": 12,
    "num_key_value_heads": 2,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 14,
    "shared_expert_intermediate_size": 18,
    "rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 0.5},
}

# name → (class of the settings in transformers, settings beside BODY).
TINY = {
    "llama": ("Llama", {"head_dim": 10, "num_key_value_heads": 3}),
    "llama_scaled": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5_000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 7, "head_dim": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 6, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5},
    ),
    "mixtral_window": (
        "Mixtral",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "sliding_window": 7,
            "num_key_value_heads": 3,
        },
    ),
    "olmoe": (
        "Olmoe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "rms_norm_eps": 1e-5,
        },
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            **QWEN_MOE,
            "shared_expert_intermediate_size": 18,
            "norm_topk_prob": False,
            "num_key_value_heads": 3,
        },
    ),
    "qwen2_moe_mixed": (
        "Qwen2Moe",
        {
            **QWEN_MOE,
            "shared_expert_intermediate_size": 18,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
    "qwen3_moe": ("Qwen3Moe", {**QWEN_MOE, "norm_topk_prob": True, "head_dim": 12}),
    "qwen3_moe_sparse": (
        "Qwen3Moe",
        {**QWEN_MOE, "norm_topk_prob": False, "decoder_sparse_step": 2, "head_dim": 8},
    ),
    "qwen3_next": (
        "Qwen3Next",
        {
            **DELTA,
            "rms_norm_eps": 1e-2,
            "norm_topk_prob": True,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
    "qwen3_next_mixed": (
        "Qwen3Next",
        {
            **DELTA,
            "norm_topk_prob": False,
            "mlp_only_layers": [0],
            "attention_bias": True,
            "linear_conv_kernel_dim": 3,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "rms_norm_eps": 1e-3,
            "rope_parameters": {**YARN, "partial_rotary_factor": 0.34},
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeText",
        {
            **DELTA,
            "num_hidden_layers": 5,
            "rms_norm_eps": 1e-2,
            "rope_parameters": {
                **DELTA["rope_parameters"],
                "mrope_section": [1, 1, 1],
                "mrope_interleaved": True,
            },
            "mtp_num_hidden_layers": 0,
        },
    ),
    "deepseek_v2_lite": (
        "DeepseekV2",
        {**LATENT, "topk_method": "greedy", "rope_parameters": {**YARN, "mscale": 0.707,
                                                               "mscale_all_dim": 0.707}},
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {
            **LATENT,
            "q_lora_rank": 18,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 4.0,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **LATENT,
            "q_lora_rank": 18,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "num_nextn_predict_layers": 0,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "deepseek_v3_plain": (
        "DeepseekV3",
        {
            **LATENT,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "rms_norm_eps": 1e-3,
            "routed_scaling_factor": 1.5,
            "num_nextn_predict_layers": 0,
            "rope_parameters": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.4},
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "head_dim": 10,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "sliding_window": 7,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    # Widths that MXFP4's groups of 32 divide.
    "gpt_oss_even": (
        "GptOss",
        {
            "hidden_size": 64,
            "intermediate_size": 32,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "phimoe": (
        "Phimoe",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "lm_head_bias": True,
            "router_jitter_noise": 0.3,
            "sliding_window": 11,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "short_factor": [1.0, 1.1, 1.3, 1.7],
                "long_factor": [1.0, 2.0, 3.0, 4.0],
                "short_mscale": 1.2,
                "long_mscale": 1.3,
                "original_max_position_embeddings": 40,
            },
        },
    ),
    **NEWER,
}  # fmt: skip
SWITCH = {
    "vocab_size": VOCABULARY,
    "d_model": 40,
    "d_kv": 12,
    "d_ff": 22,
    "num_heads": 5,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "num_experts": 6,
    "expert_capacity": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
}


def randomise(model, seed: int = 0):
    """Fill all parameters and selection biases: nothing keeps a start value of 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kind = type(model).__name__
    with torch.no_grad():
        for name, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                tensor.copy_(0.3 * noise)
            elif name not in dict(model.named_parameters()):
                continue
            elif "norm" in name and name.endswith("weight"):
                zero_centred = "Qwen3Next" in kind or "Qwen3_5" in kind
                zero_centred &= "linear_attn" not in name
                tensor.copy_(0.3 * noise if zero_centred else 1 + 0.3 * noise)
            elif tensor.dim() == 1 or name.endswith("_bias"):
                tensor.copy_(0.5 * noise)
            elif "embed_tokens" in name or "shared.weight" in name or "bias" in name:
                tensor.copy_(noise)
            elif "GptOss" in kind and tensor.dim() == 3:
                # [.., I, O]; wide enough for the clamp at 7 to be met.
                wide = 4.0 if "gate_up" in name else 1.5
                tensor.copy_(wide * noise / tensor.shape[-2] ** 0.5)
            else:
                # T5 leaves scores as they are, and starts with its queries small instead.
                wide = 0.4 if name.endswith("Attention.q.weight") else 1.5
                tensor.copy_(wide * noise / tensor.shape[-1] ** 0.5)
    return model.eval()


def config_of(name: str):
    """The settings, in transformers, of the model of `TINY` of that name."""
    kind, changes = TINY[name]
    given = {key: value for key, value in {**BODY, **changes}.items() if value != LEFT_OUT}
    return getattr(transformers, f"{kind}Config")(**given)


def build(name: str):
    """The model of `TINY` of that name, in fp32, all of its numbers random."""
    kind, _ = TINY[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = config_of(name)
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"
        model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
    return randomise(model)


def build_switch(**changes):
    """A tiny Switch Transformer, in fp32, all of its numbers random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.SwitchTransformersConfig(**{**SWITCH, **changes})
        config._attn_implementation = "eager"
        model = transformers.SwitchTransformersForConditionalGeneration(config)
    randomise(model)
    # With an untied head transformers unties these too; the paper's model has one embedding.
    with torch.no_grad():
        for stack in (model.encoder, model.decoder):
            stack.embed_tokens.weight.copy_(model.shared.weight)
    return model


def build_deepseek():
    """The first DeepSeekMoE, which transformers lacks: Llama with mixtures of DeepSeek-V2.

    Its attention is Llama's, its mixture that of DeepSeek-V2 without groups (Dai et al. 2024).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.LlamaConfig(**{**BODY, "num_key_value_heads": 6})
        config._attn_implementation = "eager"
        model = transformers.LlamaForCausalLM(config)
        mixture = transformers.DeepseekV2Config(
            **{**BODY, **LATENT, "topk_method": "greedy", "routed_scaling_factor": 1.0}
        )
        mixture._experts_implementation = "eager"
        for layer in model.model.layers[1:]:
            layer.mlp = DeepseekV2Moe(mixture)
    return randomise(model)


def save(model, folder) -> None:
    """What `save_pretrained` writes, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)


def load(folder, **changes):
    """The model that transformers makes of a folder, in evaluation mode.

    Copied into memory of its own: products may give other bits where a mapped file lies askew.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        auto = transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, auto.architectures[0])
        eager = {} if kind.__name__.startswith("Switch") else {"experts_implementation": "eager"}
        mapped = kind.from_pretrained(folder, attn_implementation="eager", **{**eager, **changes})
        return copy.deepcopy(mapped).eval()
