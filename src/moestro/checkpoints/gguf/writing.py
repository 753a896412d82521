"""A model as a GGUF file that llama.cpp opens: settings, tokenizer, template and weights in one.

The file is read back before it takes its name: what it then says of the model must be what was
written, else the file is refused and not kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from numpy.typing import NDArray

from moestro.chat import load_chat
from moestro.checkpoints.families import family_of
from moestro.checkpoints.families.table import Config, Family
from moestro.checkpoints.families.translate import canonical, to_settings
from moestro.checkpoints.gguf import header, settings
from moestro.checkpoints.gguf.names import with_names
from moestro.checkpoints.gguf.tokenizer import RULES, rule_of
from moestro.checkpoints.tensor_files import Written
from moestro.checkpoints.transfer import outgoing
from moestro.config import ModelConfig, RopeConfig
from moestro.config.attention import LinearScaling, LongRopeScaling, YarnScaling
from moestro.errors import ConfigError, DataError
from moestro.files import UNFINISHED
from moestro.models.build import Model
from moestro.models.rotary import turning_width
from moestro.text import HF_FILE, HF_SETTINGS, load_tokenizer, optional_json

# How matrices may be stored, and ggml's numbers of that.
KINDS = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
    "q4_0": GGMLQuantizationType.Q4_0,
}
# model_type → llama.cpp's network.
NETWORKS = {
    "llama": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "olmoe": "olmoe", "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2", "deepseek": "deepseek", "gpt_oss": "gpt-oss",
    "glm4_moe": "glm4moe", "dots1": "dots1", "minimax_m2": "minimax-m2",
    "ernie4_5_moe": "ernie4_5-moe", "granitemoe": "granitemoe", "hunyuan_v1_moe": "hunyuan-moe",
    "bailing_moe": "bailingmoe2", "phimoe": "phimoe", "qwen3_next": "qwen3next",
}  # fmt: skip
# Kept in fp32 there: routers, convolutions, and all vectors.
_FP32 = re.compile(
    r".*(_norm|ffn_gate_inp|_shexp_gate|attn_sinks|ssm_conv1d)\.weight|.*\.bias|.*\.ssm_a"
)
_ENTRY = re.compile(r"(.*)\[(\d+)\]")


class Tensor(NamedTuple):
    """One tensor to write; `make` gives its blocks, an entry of the first axis at a time."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    make: Callable[[], Iterator[NDArray[Any]]]


def write_gguf(
    model: Model,
    path: Path,
    *,
    family: str,
    kind: str,
    tokenizer: Path | None = None,
    made: Callable[[str], torch.Tensor] | None = None,
) -> None:
    """Write the file, whole or not at all, holding one tensor of it beside the model.

    Args:
        model: what to write.
        path: a new file.
        family: its model_type.
        kind: of all matrices but routers, one of `KINDS`.
        tokenizer: a folder with the tokenizer.json and chat template to put into it.
        made: what makes one of the model's tensors by name, so that the model need not be held;
            see `transfer.outgoing`.

    Raises:
        ConfigError: llama.cpp has no such network, the file could not say all of the settings, or
            its tokenizer cuts texts by a rule that has no name there.
        OSError: the disk is full or the place cannot be written.
    """
    if family not in NETWORKS:
        raise ConfigError(f"GGUF is written for {', '.join(NETWORKS)}; given {family!r}")
    if kind not in KINDS:
        raise ConfigError(f"weights in GGUF are {', '.join(KINDS)}; given {kind!r}")
    assert isinstance(model.cfg, ModelConfig)
    _check_form(NETWORKS[family], model.cfg)
    table = with_names(family_of(family, "family"))
    unfinished = path.with_name(f"{UNFINISHED}{path.name}")
    writer = GGUFWriter(unfinished, NETWORKS[family])
    try:
        write_fields(writer, NETWORKS[family], model.cfg)
        if tokenizer is not None and (tokenizer / HF_FILE).is_file():
            _write_tokenizer(writer, tokenizer)
        tensors = tensors_of(outgoing(table, model, tensors=made), KINDS[kind])
        write_tensors(writer, [*tensors, *_factors(model.cfg)])
        _check(unfinished, table, model.cfg)
        unfinished.replace(path)
    finally:
        writer.close()
        unfinished.unlink(missing_ok=True)


def write_tensors(writer: GGUFWriter, tensors: list[Tensor]) -> None:
    """Everything of a file whose fields are set: its header, then tensor by tensor."""
    for each in tensors:
        length, size = _block(each.kind)
        nbytes = int(np.prod(each.shape)) // length * size
        dtype = np.dtype(np.float32)
        writer.add_tensor_info(each.name, each.shape, dtype, nbytes, raw_dtype=each.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for each in tensors:
        writer.write_tensor_data(np.concatenate([part.reshape(-1) for part in each.make()]))


def tensors_of(outgoing: list[Written], kind: GGMLQuantizationType) -> list[Tensor]:
    """What is written of a model's tensors, entries of a stack joined."""
    stacks: dict[str, list[Written]] = {}
    for one in outgoing:
        entry = _ENTRY.fullmatch(one.key)
        stacks.setdefault(entry[1] if entry else one.key, []).append(one)
    found = []
    for name, parts in stacks.items():
        shape = parts[0].shape
        if len(parts) > 1 or parts[0].key != name:
            shape = (len(parts), *shape)
        if name.endswith(".ffn_gate_inp_shexp.weight"):
            shape = shape[1:]
        own = GGMLQuantizationType.F32 if _FP32.fullmatch(name) else kind
        if shape[-1] % _block(own)[0]:
            own = GGMLQuantizationType.BF16

        def make(
            parts: list[Written] = parts, own: GGMLQuantizationType = own
        ) -> Iterator[NDArray[Any]]:
            for part in parts:
                yield quantize(part.make().detach().float().contiguous().numpy(), own)

        found.append(Tensor(name, shape, own, make))
    return found


def _block(kind: GGMLQuantizationType) -> tuple[int, int]:
    known = header.KINDS[int(kind)]
    return known.length, known.bytes


def _check_form(network: str, cfg: ModelConfig) -> None:
    """Refuse what llama.cpp's networks have no form for, though a file could say it."""
    mixed = [layer for layer in range(cfg.num_layers) if cfg.is_moe_layer(layer)]
    others = sorted(set(range(mixed[0], cfg.num_layers)) - set(mixed)) if mixed else []
    if others:
        raise ConfigError(
            f"layer {others[0]} is dense and comes after the first mixture, layer {mixed[0]}; "
            "llama.cpp reads every layer after the first mixture as one, so this model cannot be "
            "written as GGUF. Write it with --to hf"
        )
    width = cfg.attention.num_heads * cfg.head_dim
    if network == "bailingmoe2" and width != cfg.dim:
        raise ConfigError(
            f"queries are {width} wide and the model {cfg.dim}; llama.cpp's bailingmoe2 takes "
            "queries as wide as the model"
        )
    if network == "olmoe" and cfg.num_kv_heads != cfg.attention.num_heads:
        raise ConfigError(
            "llama.cpp's OLMoE has as many heads of keys and values as of queries; this model has "
            f"{cfg.num_kv_heads} and {cfg.attention.num_heads}"
        )


def _check(path: Path, family: Family, cfg: Config) -> None:
    """Refuse a file that does not say what the model is."""
    read = to_settings(family, settings.config_json(header.read(path)))
    said, meant = canonical(read), canonical(cfg)
    for name, value in meant.items():
        if said[name] != value:
            raise ConfigError(
                f"GGUF cannot say {name} = {value} of a model of {family.model_type}: it would be "
                f"read as {said[name]}"
            )


def write_fields(writer: GGUFWriter, network: str, cfg: ModelConfig) -> None:
    """What llama.cpp reads of a model's settings, by its own names."""
    for key, value in _fields(cfg).items():
        name = f"{network}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif value is not None:
            writer.add_float32(name, value)


def _fields(cfg: ModelConfig) -> dict[str, Any]:
    """What llama.cpp reads of a model's settings; None: not said."""
    attention, moe = cfg.attention, cfg.moe
    windows = {cfg.window(layer) for layer in range(cfg.num_layers)} - {None}
    dense = any(not cfg.is_moe_layer(layer) for layer in range(cfg.num_layers))
    hidden = cfg.dense.hidden_dim if moe is None or dense else moe.hidden_dim
    fields: dict[str, Any] = {
        "block_count": cfg.num_layers,
        "context_length": attention.context,
        "embedding_length": cfg.dim,
        "feed_forward_length": hidden,
        "vocab_size": cfg.vocab_size,
        "attention.head_count": attention.num_heads,
        "attention.head_count_kv": cfg.num_kv_heads,
        "attention.layer_norm_rms_epsilon": cfg.norm.eps,
        "attention.sliding_window": windows.pop() if len(windows) == 1 else None,
    }
    latent = attention.latent
    if latent is None:
        fields |= {f"attention.{name}_length": cfg.head_dim for name in ("key", "value")}
        fields["rope.dimension_count"] = turning_width(cfg)
    else:
        fields |= {
            "attention.q_lora_rank": latent.q_rank,
            "attention.kv_lora_rank": latent.kv_rank,
            "attention.key_length": latent.nope_dim + latent.rope_dim,
            "attention.value_length": latent.value_dim,
            "rope.dimension_count": latent.rope_dim,
        }
    return fields | _rotary(cfg) | _scales(cfg) | _delta(cfg) | _mixture(cfg)


def _scales(cfg: ModelConfig) -> dict[str, Any]:
    """Factors of parts of the network, where they are not the usual ones."""
    positions = cfg.attention.positions
    scales = {
        "embedding_scale": cfg.head.embed_scale,
        "residual_scale": cfg.norm.residual_scale,
        "logit_scale": 1 / cfg.head.scale,
        "attention.scale": getattr(positions, "score_scale", None) or 1.0,
    }
    return {name: float(scale) for name, scale in scales.items() if scale != 1.0}


def _delta(cfg: ModelConfig) -> dict[str, Any]:
    """Qwen3-Next's layers without attention."""
    delta = cfg.attention.delta
    if delta is None:
        return {}
    return {
        "ssm.conv_kernel": delta.conv_width,
        "ssm.state_size": delta.key_dim,
        "ssm.group_count": delta.key_heads,
        "ssm.time_step_rank": delta.value_heads,
        "ssm.inner_size": delta.value_width,
        "full_attention_interval": delta.full_every,
    }


def _rotary(cfg: ModelConfig) -> dict[str, Any]:
    positions = cfg.attention.positions
    if not isinstance(positions, RopeConfig):
        raise ConfigError(f"attention.positions are {positions.kind}; GGUF is written of rotary")
    fields: dict[str, Any] = {"rope.freq_base": positions.theta}
    scaling = positions.scaling
    if isinstance(scaling, LinearScaling):
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    elif isinstance(scaling, YarnScaling):
        fields |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": scaling.factor,
            "rope.scaling.original_context_length": scaling.original_context,
            "rope.scaling.yarn_beta_fast": scaling.beta_fast,
            "rope.scaling.yarn_beta_slow": scaling.beta_slow,
        }
        if scaling.mscale_all_dim:
            fields["rope.scaling.yarn_log_multiplier"] = 0.1 * scaling.mscale_all_dim
    elif isinstance(scaling, LongRopeScaling) and scaling.short_scale == scaling.long_scale:
        fields |= {
            "rope.scaling.original_context_length": scaling.original_context,
            "rope.scaling.attn_factor": float(scaling.long_scale),
        }
    elif scaling is not None:
        raise ConfigError(f"{scaling.kind} of rotary positions is not written as GGUF")
    return fields


def _factors(cfg: ModelConfig) -> Iterator[Tensor]:
    """What frequencies are divided by in short and in long texts."""
    scaling = getattr(cfg.attention.positions, "scaling", None)
    if not isinstance(scaling, LongRopeScaling):
        return
    for name, factors in (("short", scaling.short_factor), ("long", scaling.long_factor)):
        array = np.array(factors, np.float32)
        full = f"rope_factors_{name}.weight"
        yield Tensor(full, array.shape, KINDS["f32"], partial(iter, [array]))


def _mixture(cfg: ModelConfig) -> dict[str, Any]:
    moe = cfg.moe
    if moe is None:
        return {}
    router = moe.router
    fields: dict[str, Any] = {
        "expert_count": moe.num_experts,
        "expert_used_count": moe.top_k,
        "expert_feed_forward_length": moe.hidden_dim,
        "expert_weights_norm": moe.renormalizes,
        "expert_weights_scale": router.scale,
        "expert_gating_func": 2 if router.kind == "sigmoid" else 1,
        "leading_dense_block_count": next(filter(cfg.is_moe_layer, range(cfg.num_layers))),
        "interleave_moe_layer_step": cfg.moe_every,  # llama.cpp's ERNIE 4.5 asks for it
    }
    if router.num_groups > 1:
        fields |= {
            "expert_group_count": router.num_groups,
            "expert_group_used_count": router.top_groups,
        }
    if moe.shared is not None:
        fields["expert_shared_feed_forward_length"] = moe.shared.hidden_dim
        if moe.shared.hidden_dim % moe.hidden_dim == 0:
            fields["expert_shared_count"] = moe.shared.hidden_dim // moe.hidden_dim
    return fields


def _write_tokenizer(writer: GGUFWriter, folder: Path) -> None:
    """tokenizer.json as llama.cpp's fields."""
    made = json.loads((folder / HF_FILE).read_text(encoding="utf-8"))
    model = made["model"]
    added = {each["id"]: each for each in made.get("added_tokens", ())}
    vocab = {number: token for token, number in model.get("vocab", {}).items()}
    vocab |= {number: each["content"] for number, each in added.items()}
    if model.get("type") != "BPE" or sorted(vocab) != list(range(len(vocab))):
        raise ConfigError(
            f"{folder / HF_FILE}: only BPE whose tokens have the numbers from 0 on is written as "
            "GGUF; leave the tokenizer out"
        )
    name = rule_of(made)
    if name is None:
        raise ConfigError(
            f"{folder / HF_FILE}: its tokenizer cuts texts by a rule that has no name in GGUF; "
            f"known are {', '.join(sorted(RULES))}"
        )
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    kinds = [
        1 if number not in added else 3 if added[number]["special"] else 4
        for number in sorted(vocab)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list([vocab[number] for number in sorted(vocab)])
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    _write_ends(writer, folder, {token: number for number, token in vocab.items()})


def _write_ends(writer: GGUFWriter, folder: Path, numbers: Mapping[str, int]) -> None:
    tokenizer = load_tokenizer(folder)
    begins = tokenizer.encode_prompt("")
    stated = optional_json(folder / HF_SETTINGS).get("bos_token")
    stated = stated.get("content") if isinstance(stated, dict) else stated
    first = begins[0] if begins else numbers.get(stated or "")
    if first is not None:
        writer.add_bos_token_id(first)
    writer.add_add_bos_token(bool(begins))
    writer.add_eos_token_id(tokenizer.end_of_text)
    others = sorted(tokenizer.ends - {tokenizer.end_of_text})
    if others:
        writer.add_eot_token_id(others[0])
    try:
        writer.add_chat_template(load_chat(folder).source)
    except DataError:
        return  # a base model has none
