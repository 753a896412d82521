"""Tiny models of the mixtures of 2025 and 2026, and what they share with older ones in tiny.py."""

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
}
SMALL_EXPERTS = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 14,
    "first_k_dense_replace": 1,
}
LATENT = {
    "num_key_value_heads": 6,
    "q_lora_rank": None,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    **SMALL_EXPERTS,
}
ERNIE = {
    "moe_num_experts": 8,
    "moe_k": 3,
    "moe_intermediate_size": 14,
    "num_nextn_predict_layers": 0,
}
# In place of a setting of BODY that a class does not have.
LEFT_OUT = "left out"
CONV = {"num_hidden_layers": 4, "norm_eps": 1e-4, "rms_norm_eps": LEFT_OUT}
# name → (class of the settings in transformers, settings beside BODY).
NEWER = {
    "lfm2": (
        "Lfm2",
        {
            **CONV,
            "layer_types": ["conv", "full_attention", "full_attention", "conv"],
            "block_multiple_of": 8,
            "tie_word_embeddings": True,
        },
    ),
    "lfm2_moe": (
        "Lfm2Moe",
        {
            **CONV,
            "layer_types": ["conv", "conv", "full_attention", "conv"],
            "num_dense_layers": 1,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 14,
        },
    ),
    "lfm2_moe_plain": (
        "Lfm2Moe",
        {
            **CONV,
            "layer_types": ["full_attention", "conv", "conv", "conv"],
            "num_dense_layers": 0,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 14,
            "conv_L_cache": 5,
            "use_expert_bias": False,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
        },
    ),
    "deepseek_v32": (
        "DeepseekV32",
        {
            **LATENT,
            "q_lora_rank": 18,
            "n_group": 2,
            "topk_group": 1,
            "index_topk": 5,
            "index_n_heads": 12,
            "index_head_dim": 14,
            "num_nextn_predict_layers": 0,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
        },
    ),
    "deepseek_v32_dense": (
        "DeepseekV32",
        {
            **LATENT,
            "q_lora_rank": 18,
            "n_group": 1,
            "topk_group": 1,
            "index_head_dim": 8,
            "num_nextn_predict_layers": 0,
        },
    ),
    "glm4_moe_lite": (
        "Glm4MoeLite",
        {
            **LATENT,
            "q_lora_rank": 18,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": True,
            "num_nextn_predict_layers": 0,
            "rms_norm_eps": 1e-5,
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            **SMALL_EXPERTS,
            "n_shared_experts": 1,
            "head_dim": 12,
            "attention_bias": True,
            "use_qk_norm": True,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "num_nextn_predict_layers": 0,
            "rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 0.5},
        },
    ),
    "glm4_moe_air": (
        "Glm4Moe",
        {
            **SMALL_EXPERTS,
            "n_group": 2,
            "topk_group": 1,
            "num_nextn_predict_layers": 0,
            "rope_parameters": {**YARN, "partial_rotary_factor": 0.25},
        },
    ),
    "minimax_m2": (
        "MiniMaxM2",
        {
            "head_dim": 12,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 0.5},
        },
    ),
    "ernie4_5_moe": ("Ernie4_5_Moe", {**ERNIE, "tie_word_embeddings": True}),
    "ernie4_5_moe_mixed": (
        "Ernie4_5_Moe",
        {
            **ERNIE,
            "num_hidden_layers": 5,
            "moe_layer_start_index": 2,
            "moe_layer_interval": 2,
            "moe_layer_end_index": 3,
            "moe_num_shared_experts": 1,
            "head_dim": 10,
        },
    ),
    "llama4": (
        "Llama4Text",
        {
            "num_hidden_layers": 5,
            "intermediate_size_mlp": 26,
            "head_dim": 8,
            "num_local_experts": 6,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 7,
            "no_rope_layer_interval": 3,
            "floor_scale": 4,
            "attn_scale": 0.7,
            "rms_norm_eps": 1e-3,
        },
    ),
    "llama4_plain": (
        "Llama4Text",
        {
            "intermediate_size_mlp": 26,
            "head_dim": 10,
            "num_local_experts": 4,
            "attention_chunk_size": None,
            "no_rope_layer_interval": 2,
            "attn_temperature_tuning": False,
            "use_qk_norm": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "dots1": (
        "Dots1",
        {
            **SMALL_EXPERTS,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "attention_bias": True,
        },
    ),
    "dots1_window": (
        "Dots1",
        {
            **SMALL_EXPERTS,
            "n_group": 4,
            "topk_group": 2,
            "head_dim": 10,
            "sliding_window": 7,
            "max_window_layers": 0,
        },
    ),
    "granitemoe": (
        "GraniteMoe",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "embedding_multiplier": 1.7,
            "attention_multiplier": 0.25,
            "residual_multiplier": 0.6,
            "logits_scaling": 0.5,
            "tie_word_embeddings": True,
        },
    ),
    "granitemoe_plain": (
        "GraniteMoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True, "head_dim": 10},
    ),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1",
        {
            "num_experts": 6,
            "moe_topk": 3,
            "head_dim": 12,
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 10_000.0,
                "factor": 1.0,
                "alpha": 50.0,
            },
        },
    ),
    "hunyuan_v1_moe_plain": (
        "HunYuanMoEV1",
        {
            "num_experts": 4,
            "moe_topk": [2, 2, 2],
            "attention_bias": True,
            "tie_word_embeddings": True,
            "head_dim": 8,
        },
    ),
}
