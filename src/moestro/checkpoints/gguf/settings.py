"""What a GGUF file says of its network, as the config.json that the model was made from would.

llama.cpp's names of fields: gguf-py, constants.py. A network of its own there is a `model_type`
here, and what the file leaves out is what llama.cpp takes instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from moestro.checkpoints.gguf.header import Header
from moestro.errors import ConfigError

_SIGMOID = 2  # of expert_gating_func
# Whose config.json has no such field.
_WITHOUT_HEAD_DIM = ("qwen2", "qwen2_moe", "olmoe", "deepseek", "deepseek_v2", "deepseek_v3")
Fields = dict[str, Any]


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
            f"{header.file}: the network {name!r} is not read from GGUF; read are "
            f"{', '.join(sorted(NETWORKS))}. Give the model that it was made from, in Hugging "
            "Face's layout, or run the file with llama.cpp"
        )
    network = NETWORKS[name]
    model_type = network.model_type(header)
    fields = _common(header) | network.fields(header)
    if model_type in _WITHOUT_HEAD_DIM:
        del fields["head_dim"]
    return {"model_type": model_type, **fields}


def number(header: Header, key: str, default: Any = None) -> Any:
    """A number among the fields; of a list with one for each layer, the one that all layers share.

    Raises:
        ConfigError: it is missing and has no default, is no number, or layers differ.
    """
    value = header.get(key, default)
    if isinstance(value, np.ndarray):
        same = set(value.tolist())
        if len(same) != 1:
            raise ConfigError(
                f"{header.file}: {header.architecture}{key} differs from layer to layer, which "
                "cannot be expressed here"
            )
        value = same.pop()
    if value is None and default is None:
        raise ConfigError(f"{header.file} lacks the field {header.architecture}{key}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{header.file}: {header.architecture}{key} is {value!r:.80}")
    return _shortest(value) if isinstance(value, float) else value


def given(header: Header, key: str) -> Any:
    """A number as `number` gives it, or None where the field is missing."""
    return None if header.get(key) is None else number(header, key)


def _shortest(value: float) -> float:
    """A number that went through fp32 as it was written: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _common(header: Header) -> Fields:
    dim, heads = number(header, ".embedding_length"), number(header, ".attention.head_count")
    kv_heads = number(header, ".attention.head_count_kv", heads)
    if not heads or not dim:
        raise ConfigError(f"{header.file} says that it has {heads} heads and a width of {dim}")
    head_dim = number(header, ".attention.key_length", dim // heads)
    turned = head_dim  # of latent attention only the part that has positions
    if header.get(".attention.kv_lora_rank") is not None:
        turned = number(header, ".rope.dimension_count")
    rows = {info.name: info.shape for info in header.tensors}
    vocab = rows.get("token_embd.weight", (len(header.get("tokenizer.ggml.tokens", ())),))[0]
    return {
        "vocab_size": vocab,
        "hidden_size": dim,
        "num_hidden_layers": number(header, ".block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": number(header, ".feed_forward_length", 0),
        "max_position_embeddings": number(header, ".context_length"),
        "rms_norm_eps": number(header, ".attention.layer_norm_rms_epsilon", 0.0),
        "tie_word_embeddings": "output.weight" not in rows and "token_embd.weight" in rows,
        "rope_parameters": rotary(header, turned),
        "torch_dtype": "bfloat16",
    }


def rotary(header: Header, width: int) -> Fields:
    """`rope_parameters`, of heads that are `width` wide.

    Raises:
        ConfigError: only a part of each head turns, or the scaling is not known.
    """
    turned = number(header, ".rope.dimension_count", width)
    if turned != width:
        raise ConfigError(
            f"{header.file}: {turned} of {width} numbers of each head have rotary positions, "
            "which cannot be expressed here"
        )
    fields: Fields = {"rope_theta": number(header, ".rope.freq_base", 10_000.0)}
    kind = header.get(".rope.scaling.type", "none")
    factor = given(header, ".rope.scaling.factor")
    if kind == "yarn":
        log = given(header, ".rope.scaling.yarn_log_multiplier")
        scale = None if log is None else _shortest(log * 10)
        yarn = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": given(
                header, ".rope.scaling.original_context_length"
            ),
            "beta_fast": given(header, ".rope.scaling.yarn_beta_fast"),
            "beta_slow": given(header, ".rope.scaling.yarn_beta_slow"),
            "mscale": scale,
            "mscale_all_dim": scale,
        }
        fields |= {key: value for key, value in yarn.items() if value is not None}
    elif kind == "linear" and factor not in (None, 1.0):
        fields |= {"rope_type": "linear", "factor": factor}
    elif kind not in ("none", "linear"):
        raise ConfigError(
            f"{header.file}: rotary positions are scaled by {kind!r}, which is not read from GGUF; "
            "read are linear and yarn"
        )
    else:
        fields["rope_type"] = "default"
    return fields | _llama3(header, width)


# factor, low_freq_factor, high_freq_factor, original context (Llama 3.1 to 3.3's config.json).
_LLAMA3 = tuple((factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0, 16.0, 4.0))


def _llama3(header: Header, width: int) -> Fields:
    """Llama 3's scaling, of which a file has only what it divides each frequency by."""
    found = [info for info in header.tensors if info.name == "rope_freqs.weight"]
    if not found:
        return {}
    info = found[0]
    if info.shape != (width // 2,) or info.kind.name != "F32":
        raise ConfigError(f"{header.file}: rope_freqs.weight is {list(info.shape)}")
    with header.file.open("rb") as file:
        file.seek(info.offset)
        stated = np.frombuffer(file.read(info.bytes), "<f4")
    base = number(header, ".rope.freq_base", 10_000.0)
    waves = 2 * np.pi * base ** (np.arange(0, width, 2) / width)
    for factor, low, high, context in _LLAMA3:
        smooth = np.clip((context / waves - low) / (high - low), 0, 1)
        if len(stated) == len(waves) and np.allclose(
            stated, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3
        ):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
    raise ConfigError(
        f"{header.file}: rope_freqs.weight is not the scaling of any Llama 3, and no other is read"
    )


def _experts(header: Header, count: str, width: str) -> Fields:
    hidden = given(header, ".expert_feed_forward_length")
    if hidden is None:
        hidden = number(header, ".feed_forward_length")
    return {
        count: number(header, ".expert_count"),
        "num_experts_per_tok": number(header, ".expert_used_count"),
        width: hidden,
    }


def _llama(header: Header) -> Fields:
    window = given(header, ".attention.sliding_window")
    names = {info.name for info in header.tensors}
    if header.get(".expert_count", 0):
        return _experts(header, "num_local_experts", "intermediate_size") | {
            "sliding_window": window
        }
    return {"attention_bias": "blk.0.attn_output.bias" in names}


def _qwen3_moe(header: Header) -> Fields:
    # Qwen3's files do not say that weights are divided by their sum; llama.cpp does it always.
    norm = bool(header.get(".expert_weights_norm", True))
    return _experts(header, "num_experts", "moe_intermediate_size") | {"norm_topk_prob": norm}


def _qwen2_moe(header: Header) -> Fields:
    shared = given(header, ".expert_shared_feed_forward_length")
    shapes = {info.name: info.shape for info in header.tensors}
    if shared is None and "blk.0.ffn_up_shexp.weight" in shapes:
        shared = shapes["blk.0.ffn_up_shexp.weight"][0]
    return _experts(header, "num_experts", "moe_intermediate_size") | {
        "norm_topk_prob": bool(header.get(".expert_weights_norm", False)),
        "shared_expert_intermediate_size": shared,
    }


def _olmoe(header: Header) -> Fields:
    return _experts(header, "num_experts", "intermediate_size") | {
        "norm_topk_prob": bool(header.get(".expert_weights_norm", False)),
    }


def _deepseek(header: Header) -> Fields:
    return _experts(header, "n_routed_experts", "moe_intermediate_size") | {
        "first_k_dense_replace": number(header, ".leading_dense_block_count", 0),
        "n_shared_experts": number(header, ".expert_shared_count", 0),
        "norm_topk_prob": bool(header.get(".expert_weights_norm", False)),
    }


def _deepseek2(header: Header) -> Fields:
    rope = number(header, ".rope.dimension_count")
    width = given(header, ".attention.key_length_mla") or number(header, ".attention.key_length")
    value = given(header, ".attention.value_length_mla") or number(
        header, ".attention.value_length"
    )
    groups = number(header, ".expert_group_count", 1)
    found = _deepseek(header) | {
        "q_lora_rank": given(header, ".attention.q_lora_rank"),
        "kv_lora_rank": number(header, ".attention.kv_lora_rank"),
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": width - rope,
        "v_head_dim": value,
        "num_key_value_heads": number(header, ".attention.head_count"),
        "routed_scaling_factor": number(header, ".expert_weights_scale", 1.0) or 1.0,
    }
    if _deepseek_type(header) == "deepseek_v3":
        return found | {
            "n_group": groups,
            "topk_group": number(header, ".expert_group_used_count", 1),
        }
    method = "greedy" if groups == 1 else "group_limited_greedy"
    return found | {
        "topk_method": method,
        "n_group": groups,
        "topk_group": number(header, ".expert_group_used_count", 1),
    }


def _deepseek_type(header: Header) -> str:
    sigmoid = header.get(".expert_gating_func") == _SIGMOID
    return "deepseek_v3" if sigmoid else "deepseek_v2"


def _gpt_oss(header: Header) -> Fields:
    layers = number(header, ".block_count")
    kinds = ("sliding_attention", "full_attention")
    positions = rotary(header, number(header, ".attention.key_length"))
    if positions["rope_type"] == "yarn":
        positions["truncate"] = False
    return (
        {"rope_parameters": positions}
        | _experts(header, "num_local_experts", "intermediate_size")
        | {
            "sliding_window": number(header, ".attention.sliding_window", 128),
            "layer_types": [kinds[layer % 2] for layer in range(min(layers, 1 << 12))],
        }
    )


def _nothing(header: Header) -> Fields:
    return {}


def _called(name: str) -> Callable[[Header], str]:
    return lambda header: name


def _llama_type(header: Header) -> str:
    return "mixtral" if header.get(".expert_count", 0) else "llama"


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
}
