"""What a GGUF file says of its network, as the config.json that the model was made from would.

llama.cpp's names of fields: gguf-py, constants.py. A network of its own there is a `model_type`
here, and what the file leaves out is what llama.cpp takes instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from moestro.checkpoints.gguf.fields import Fields, flag, given, number, rotary, texts, whole
from moestro.checkpoints.gguf.header import Header
from moestro.errors import ConfigError

_SIGMOID = 2  # of expert_gating_func
# Whose config.json has no such field.
_WITHOUT_HEAD_DIM = (
    "qwen2", "qwen2_moe", "olmoe", "deepseek", "deepseek_v2", "deepseek_v3", "phimoe"
)  # fmt: skip


class Network(NamedTuple):
    """One of llama.cpp's networks.

    Attributes:
        model_type: of transformers, given the header.
        fields: header → the fields of config.json that are not `_common`.
    """

    model_type: Callable[[Header], str]
    fields: Callable[[Header], Fields]


def config_json(header: Header) -> Fields:
    """The fields of config.json.

    Raises:
        ConfigError: the network is not known, or a field is missing or says what cannot be.
    """
    name = header.architecture
    if name not in NETWORKS:
        raise ConfigError(
            f"{header.file}: the network {name!r:.80} is not read from GGUF; read are "
            f"{', '.join(sorted(NETWORKS))}. Give the model that it was made from, in Hugging "
            "Face's layout, or run the file with llama.cpp"
        )
    network = NETWORKS[name]
    model_type = network.model_type(header)
    fields = _common(header) | network.fields(header)
    if model_type in _WITHOUT_HEAD_DIM:
        del fields["head_dim"]
    return {"model_type": model_type, **fields}


def _common(header: Header) -> Fields:
    dim, heads = whole(header, ".embedding_length"), whole(header, ".attention.head_count")
    kv_heads = whole(header, ".attention.head_count_kv", heads)
    if not heads or not dim:
        raise ConfigError(f"{header.file} says that it has {heads} heads and a width of {dim}")
    head_dim = whole(header, ".attention.key_length", dim // heads)
    turned = head_dim  # of latent attention only the part that has positions
    if header.get(".attention.kv_lora_rank") is not None:
        turned = whole(header, ".rope.dimension_count")
    rows = {info.name: info.shape for info in header.tensors}
    # Layers for multi-token prediction follow the others, and are not run here.
    layers = whole(header, ".block_count") - whole(header, ".nextn_predict_layers", 0)
    vocab = rows.get("token_embd.weight", (len(texts(header, "tokenizer.ggml.tokens") or ()),))[0]
    return {
        "vocab_size": vocab,
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": whole(header, ".feed_forward_length", 0),
        "max_position_embeddings": whole(header, ".context_length"),
        "rms_norm_eps": number(header, ".attention.layer_norm_rms_epsilon", 0.0),
        "tie_word_embeddings": "output.weight" not in rows and "token_embd.weight" in rows,
        "rope_parameters": rotary(header, turned),
        "torch_dtype": "bfloat16",
    }


def _experts(header: Header, count: str, width: str) -> Fields:
    hidden = given(header, ".expert_feed_forward_length", whole)
    if hidden is None:
        hidden = whole(header, ".feed_forward_length")
    return {
        count: whole(header, ".expert_count"),
        "num_experts_per_tok": whole(header, ".expert_used_count"),
        width: hidden,
    }


def _llama(header: Header) -> Fields:
    window = given(header, ".attention.sliding_window", whole)
    names = {info.name for info in header.tensors}
    if whole(header, ".expert_count", 0):
        return _experts(header, "num_local_experts", "intermediate_size") | {
            "sliding_window": window
        }
    return {"attention_bias": "blk.0.attn_output.bias" in names}


def _qwen3_moe(header: Header) -> Fields:
    # Qwen3's files do not say that weights are divided by their sum; llama.cpp does it always.
    norm = flag(header, ".expert_weights_norm", True)
    return _experts(header, "num_experts", "moe_intermediate_size") | {"norm_topk_prob": norm}


def _qwen2_moe(header: Header) -> Fields:
    shared = given(header, ".expert_shared_feed_forward_length", whole)
    shapes = {info.name: info.shape for info in header.tensors}
    if shared is None and "blk.0.ffn_up_shexp.weight" in shapes:
        shared = shapes["blk.0.ffn_up_shexp.weight"][0]
    return _experts(header, "num_experts", "moe_intermediate_size") | {
        "norm_topk_prob": flag(header, ".expert_weights_norm", False),
        "shared_expert_intermediate_size": shared,
    }


def _olmoe(header: Header) -> Fields:
    return _experts(header, "num_experts", "intermediate_size") | {
        "norm_topk_prob": flag(header, ".expert_weights_norm", False),
    }


def _deepseek(header: Header) -> Fields:
    return _experts(header, "n_routed_experts", "moe_intermediate_size") | {
        "first_k_dense_replace": whole(header, ".leading_dense_block_count", 0),
        "n_shared_experts": whole(header, ".expert_shared_count", 0),
        "norm_topk_prob": flag(header, ".expert_weights_norm", False),
    }


def _biased(header: Header, name: str) -> bool:
    """Whether a module of the first layer has a bias."""
    return _has(header, f"blk.0.{name}.bias")


def _has(header: Header, name: str) -> bool:
    return any(info.name == name for info in header.tensors)


def _groups(header: Header) -> Fields:
    return {
        "n_group": whole(header, ".expert_group_count", 1),
        "topk_group": whole(header, ".expert_group_used_count", 1),
        "routed_scaling_factor": number(header, ".expert_weights_scale", 1.0) or 1.0,
    }


def _glm4_moe(header: Header) -> Fields:
    return (
        _deepseek(header)
        | _groups(header)
        | {
            "attention_bias": _biased(header, "attn_q"),
            "use_qk_norm": _has(header, "blk.0.attn_q_norm.weight"),
        }
    )


def _dots1(header: Header) -> Fields:
    # Windows, which no published model has, are not said.
    bias = _biased(header, "attn_q")
    return _deepseek(header) | _groups(header) | {"attention_bias": bias, "sliding_window": None}


def _minimax_m2(header: Header) -> Fields:
    return _experts(header, "num_local_experts", "intermediate_size")


def _ernie4_5_moe(header: Header) -> Fields:
    return {
        "moe_num_experts": whole(header, ".expert_count"),
        "moe_k": whole(header, ".expert_used_count"),
        "moe_intermediate_size": whole(header, ".expert_feed_forward_length"),
        "moe_num_shared_experts": whole(header, ".expert_shared_count", 0),
        "moe_layer_start_index": whole(header, ".leading_dense_block_count", 0),
        "moe_layer_end_index": -1,
        "moe_layer_interval": whole(header, ".interleave_moe_layer_step", 1),
    }


def _granite_moe(header: Header) -> Fields:
    width = _common(header)["head_dim"]
    return _experts(header, "num_local_experts", "intermediate_size") | {
        "attention_bias": _biased(header, "attn_q"),
        "embedding_multiplier": number(header, ".embedding_scale", 1.0),
        "residual_multiplier": number(header, ".residual_scale", 1.0),
        "logits_scaling": number(header, ".logit_scale", 1.0),
        "attention_multiplier": number(header, ".attention.scale", width**-0.5),
    }


def _hunyuan_moe(header: Header) -> Fields:
    found = _experts(header, "num_experts", "intermediate_size")
    return found | {
        "moe_topk": found.pop("num_experts_per_tok"),
        "num_shared_expert": whole(header, ".expert_shared_count", 1),
        "attention_bias": _biased(header, "attn_q"),
    }


def _bailing_moe(header: Header) -> Fields:
    return (
        _experts(header, "num_experts", "moe_intermediate_size")
        | _groups(header)
        | {
            "first_k_dense_replace": whole(header, ".leading_dense_block_count", 0),
            "num_shared_experts": whole(header, ".expert_shared_count", 0),
            "norm_topk_prob": flag(header, ".expert_weights_norm", False),
            "score_function": "sigmoid" if _gates(header) == _SIGMOID else "softmax",
            "use_qkv_bias": _biased(header, "attn_qkv"),
        }
    )


def _phimoe(header: Header) -> Fields:
    return _experts(header, "num_local_experts", "intermediate_size") | {
        "attention_bias": _biased(header, "attn_q"),
        "lm_head_bias": _has(header, "output.bias"),
        "sliding_window": given(header, ".attention.sliding_window", whole) or None,
    }


def _qwen3_next(header: Header) -> Fields:
    heads = whole(header, ".ssm.time_step_rank")
    return _qwen3_moe(header) | {
        "shared_expert_intermediate_size": whole(header, ".expert_shared_feed_forward_length"),
        "full_attention_interval": whole(header, ".full_attention_interval", 4),
        "linear_conv_kernel_dim": whole(header, ".ssm.conv_kernel"),
        "linear_key_head_dim": whole(header, ".ssm.state_size"),
        "linear_num_key_heads": whole(header, ".ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_value_head_dim": whole(header, ".ssm.inner_size") // max(heads, 1),
    }


def _gates(header: Header) -> int:
    return whole(header, ".expert_gating_func", 0)


def _deepseek2(header: Header) -> Fields:
    rope = whole(header, ".rope.dimension_count")
    width = given(header, ".attention.key_length_mla", whole) or whole(
        header, ".attention.key_length"
    )
    value = given(header, ".attention.value_length_mla", whole) or whole(
        header, ".attention.value_length"
    )
    found = (
        _deepseek(header)
        | _groups(header)
        | {
            "q_lora_rank": given(header, ".attention.q_lora_rank", whole),
            "kv_lora_rank": whole(header, ".attention.kv_lora_rank"),
            "qk_rope_head_dim": rope,
            "qk_nope_head_dim": width - rope,
            "v_head_dim": value,
            "num_key_value_heads": whole(header, ".attention.head_count"),
        }
    )
    if _deepseek_type(header) == "deepseek_v3":
        return found
    method = "greedy" if found["n_group"] == 1 else "group_limited_greedy"
    return found | {"topk_method": method}


def _deepseek_type(header: Header) -> str:
    return "deepseek_v3" if _gates(header) == _SIGMOID else "deepseek_v2"


def _gpt_oss(header: Header) -> Fields:
    layers = whole(header, ".block_count")
    kinds = ("sliding_attention", "full_attention")
    positions = rotary(header, whole(header, ".attention.key_length"))
    if positions["rope_type"] == "yarn":
        positions["truncate"] = False
    return (
        {"rope_parameters": positions}
        | _experts(header, "num_local_experts", "intermediate_size")
        | {
            "sliding_window": whole(header, ".attention.sliding_window", 128),
            "layer_types": [kinds[layer % 2] for layer in range(min(layers, 1 << 12))],
        }
    )


def _nothing(header: Header) -> Fields:
    return {}


def _called(name: str) -> Callable[[Header], str]:
    return lambda header: name


def _llama_type(header: Header) -> str:
    return "mixtral" if whole(header, ".expert_count", 0) else "llama"


NETWORKS: Mapping[str, Network] = {
    "llama": Network(_llama_type, _llama),
    "qwen2": Network(_called("qwen2"), _nothing),
    "qwen3": Network(_called("qwen3"), _nothing),
    "qwen2moe": Network(_called("qwen2_moe"), _qwen2_moe),
    "qwen3moe": Network(_called("qwen3_moe"), _qwen3_moe),
    "olmoe": Network(_called("olmoe"), _olmoe),
    "deepseek": Network(_called("deepseek"), _deepseek),
    "deepseek2": Network(_deepseek_type, _deepseek2),
    "gpt-oss": Network(_called("gpt_oss"), _gpt_oss),
    "glm4moe": Network(_called("glm4_moe"), _glm4_moe),
    "dots1": Network(_called("dots1"), _dots1),
    "minimax-m2": Network(_called("minimax_m2"), _minimax_m2),
    "ernie4_5-moe": Network(_called("ernie4_5_moe"), _ernie4_5_moe),
    "granitemoe": Network(_called("granitemoe"), _granite_moe),
    "hunyuan-moe": Network(_called("hunyuan_v1_moe"), _hunyuan_moe),
    "bailingmoe2": Network(_called("bailing_moe"), _bailing_moe),
    "phimoe": Network(_called("phimoe"), _phimoe),
    "qwen3next": Network(_called("qwen3_next"), _qwen3_next),
}
