"""What config.json says of quantised weights, and the forms that its checkpoint then has.

A field that is not known is refused: it may say that the numbers mean something else. Which tensors
are quantised is told by their keys, so lists of modules that are or are not change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from moestro.checkpoints.quantised.awq import Awq
from moestro.checkpoints.quantised.bitsandbytes import Fp4, Nf4
from moestro.checkpoints.quantised.compressed_tensors import PackedInts, Weights, WholeValues
from moestro.checkpoints.quantised.form import Form, join
from moestro.checkpoints.quantised.fp8 import BlockFp8, MatrixFp8
from moestro.checkpoints.quantised.gptq import Gptq
from moestro.checkpoints.quantised.mxfp4 import Mxfp4
from moestro.checkpoints.tensor_files import Source, Stored
from moestro.errors import CheckpointError

# quant_method → its name in sentences.
_NAMES = {
    "awq": "AWQ", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors",
    "fp8": "fp8", "gptq": "GPTQ", "mlx": "MLX", "modelopt": "ModelOpt", "mxfp4": "MXFP4",
}  # fmt: skip

# Scales of activations and of a cache in fp8, which are computed without here.
_ACTIVATIONS = (
    ".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point", ".q_scale",
    ".k_scale", ".v_scale", ".kv_scale", ".k_zero_point", ".v_zero_point",
)  # fmt: skip

# How the weights were made, or are to be run elsewhere.
_MAKING = {
    "act_group_aware", "amp", "autoround_version", "backend", "batch_size",
    "block_name_to_quantize", "cache_block_outputs", "damp_auto_increment", "damp_percent",
    "data_type", "dataset", "desc_act", "disable_exllama", "do_fuse", "enable_minmax_tuning",
    "enable_norm_bias_tuning", "enable_quanted_input", "exllama_config", "fuse_max_seq_len",
    "gptaq", "gradient_accumulate_steps", "iters", "lm_head", "low_gpu_mem_usage", "lr",
    "max_input_length", "meta", "minmax_lr", "model_file_base_name", "model_name_or_path",
    "model_seqlen",
    "module_name_preceding_first_block", "modules_in_block_to_quantize", "modules_to_fuse",
    "modules_to_not_convert", "mse", "nsamples", "pad_token_id", "scale_dtype", "seqlen",
    "static_groups", "sym", "to_quant_block_names", "tokenizer", "train_bs", "true_sequential",
    "use_cuda_fp16", "use_exllama", "use_triton", "zero_point",
}  # fmt: skip
# What changes the numbers, so that only one of these values is read.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "pack_dtype": (None, "int32", "torch.int32"), "is_marlin_format": (None, False),
    "rotation": (None, ""), "adapter": (None, {}), "activation": (None,),
}  # fmt: skip
_E4M3 = ("e4m3", "float8_e4m3fn")


class Quantisation(NamedTuple):
    """What a config.json says of its weights: the quant_method, and in words."""

    method: str
    words: str


class Reading(NamedTuple):
    """How a method's checkpoints are read.

    Attributes:
        forms: that their tensors may have.
        unused: suffixes of keys that are left out.
    """

    forms: tuple[Form, ...]
    unused: tuple[str, ...] = ()


def quantisation(hf_config: Mapping[str, Any]) -> Quantisation | None:
    """How the weights beside a config.json are quantised; None where they are plain.

    MLX states bits and groups without a method, in `quantization` and `quantization_config`.
    """
    stated = hf_config.get("quantization_config") or hf_config.get("quantization")
    if not stated:
        return None
    settings = stated if isinstance(stated, Mapping) else {"quant_method": stated}
    method = str(settings.get("quant_method", "mlx" if "bits" in settings else "an unnamed method"))
    loaded = {8: settings.get("load_in_8bit"), 4: settings.get("load_in_4bit")}
    bits = settings.get("bits") or next((bits for bits, yes in loaded.items() if yes is True), None)
    words = _NAMES.get(method, method)
    return Quantisation(method, words if bits is None else f"{words} in {bits} bits")


def reading(settings: Any) -> Reading:
    """How to read what a `quantization_config` of config.json describes.

    Raises:
        CheckpointError: a method, version, format, number of bits or field that is not known; says
            what was given and what is read.
    """
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
    if not isinstance(settings, Mapping) or not isinstance(method, str) or method not in _METHODS:
        raise CheckpointError(
            f"config.json says quant_method {method!r}; read are {', '.join(sorted(_METHODS))}. "
            "Use a checkpoint that is not quantised, or one in these"
        )
    return _METHODS[method](settings)


def find_sources(stored: Mapping[str, Stored], hf_config: Mapping[str, Any]) -> dict[str, Source]:
    """Sources by key, parts of quantised tensors joined under the key of what they stand for.

    Raises:
        CheckpointError: see `reading`, or `join`.
    """
    if not hf_config.get("quantization_config"):
        return dict(stored)
    how = reading(hf_config["quantization_config"])
    return join(stored, how.forms, how.unused)


def in_blocks(hf_config: Mapping[str, Any]) -> bool:
    """Whether rows of some tensors beside a config.json can be ggml's blocks; see `Form.blocks`."""
    if not hf_config.get("quantization_config"):
        return False
    try:
        return any(form.in_blocks for form in reading(hf_config["quantization_config"]).forms)
    except CheckpointError:  # which is refused where it is read
        return False


def _refuse(field: str, given: Any, allowed: Sequence[Any] | str) -> CheckpointError:
    words = allowed if isinstance(allowed, str) else " or ".join(map(repr, allowed))
    return CheckpointError(
        f"quantization_config of config.json has {field} {given!r:.200}; read is {words}"
    )


def _check(settings: Mapping[str, Any], known: Iterable[str], of: str = "") -> None:
    """Refuse fields that are not known, and known ones whose value would change the numbers."""
    method = of or settings["quant_method"]
    unknown = sorted(settings.keys() - set(known) - {"quant_method"})
    if unknown:
        raise CheckpointError(
            f"quantization_config of config.json has unknown fields for {method}: "
            f"{', '.join(unknown)}; known are {', '.join(sorted(known))}. Remove from a copy what "
            "only says how the weights were made"
        )
    for field, allowed in _FIXED.items():
        if field in settings and settings[field] not in allowed:
            raise _refuse(field, settings[field], allowed)


def _whole(settings: Mapping[str, Any], field: str, allowed: Sequence[int]) -> int:
    value = settings.get(field)
    if type(value) is not int or value not in allowed:
        raise _refuse(field, value, allowed)
    return value


def _group(settings: Mapping[str, Any]) -> int:
    """The size of a group of inputs; -1: all."""
    value = settings.get("group_size")
    if type(value) is not int or (value < 1 and value != -1):
        raise _refuse("group_size", value, "a whole number such as 128, or -1 for a whole row")
    return value


def _without_overrides(settings: Mapping[str, Any]) -> None:
    """GPTQModel's `dynamic`: modules left plain are seen by their keys, other bits are not."""
    own = settings.get("dynamic") or {}
    if not isinstance(own, Mapping) or any(not str(key).startswith("-:") for key in own):
        raise _refuse("dynamic", own, "what leaves modules plain, each beginning with '-:'")


def _gptq(settings: Mapping[str, Any]) -> Reading:
    _check(settings, {*_MAKING, *_FIXED, "bits", "group_size", "checkpoint_format", "format",
                      "method", "dynamic"})  # fmt: skip
    _without_overrides(settings)
    formats = ("gptq", "gptq_v2")
    stated = {str(settings[key]) for key in ("checkpoint_format", "format") if settings.get(key)}
    if len(stated) > 1 or not stated <= {*formats}:
        raise _refuse("checkpoint_format", " and ".join(sorted(stated)), formats)
    if settings.get("method") not in (None, "gptq"):
        raise _refuse("method", settings["method"], ("gptq",))
    bits = _whole(settings, "bits", (4, 8))
    symmetric, reordered = settings.get("sym") is True, settings.get("desc_act") is True
    less_one = "gptq_v2" not in stated
    return Reading((Gptq(bits, _group(settings), less_one, symmetric, reordered),))


def _awq(settings: Mapping[str, Any]) -> Reading:
    _check(settings, {*_MAKING, *_FIXED, "bits", "group_size", "version", "format", "method",
                      "checkpoint_format", "dynamic"})  # fmt: skip
    _without_overrides(settings)
    for key in ("version", "format", "checkpoint_format"):
        if str(settings.get(key) or "gemm").lower() != "gemm":
            raise _refuse(key, settings[key], ("gemm",))
    if settings.get("backend") == "llm-awq":
        raise _refuse("backend", "llm-awq", ("autoawq",))
    _whole(settings, "bits", (4,))
    return Reading((Awq(_group(settings)),))


def _bitsandbytes(settings: Mapping[str, Any]) -> Reading:
    four = {f"bnb_4bit_{name}" for name in ("compute_dtype", "quant_storage", "quant_type",
                                            "use_double_quant")}  # fmt: skip
    eight = {f"llm_int8_{name}" for name in ("enable_fp32_cpu_offload", "has_fp16_weight",
                                             "skip_modules", "threshold")}  # fmt: skip
    loads = {f"{start}load_in_{bits}bit" for start in ("", "_") for bits in (4, 8)}
    _check(settings, four | eight | loads)
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        raise _refuse("load_in_8bit", True, "4 bits only, NF4 or FP4")
    return Reading((Nf4(), Fp4()))


def _fp8(settings: Mapping[str, Any]) -> Reading:
    _check(settings, {"activation_scheme", "dequantize", "fmt", "ignored_layers", "kv_cache_scheme",
                      "modules_to_not_convert", "scale_fmt", "weight_block_size"})  # fmt: skip
    if settings.get("fmt", "e4m3") not in _E4M3:
        raise _refuse("fmt", settings["fmt"], _E4M3)
    block = settings.get("weight_block_size")
    if block is None:
        return Reading((MatrixFp8(),), _ACTIVATIONS)
    return Reading((BlockFp8(_block("weight_block_size", block)),), _ACTIVATIONS)


def _block(field: str, value: Any) -> tuple[int, int]:
    sides = value if isinstance(value, list | tuple) else ()
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise _refuse(field, value, "two whole numbers such as [128, 128]")
    return sides[0], sides[1]


def _mxfp4(settings: Mapping[str, Any]) -> Reading:
    _check(settings, {"dequantize", "modules_to_not_convert"})
    return Reading((Mxfp4(),))


def _compressed_tensors(settings: Mapping[str, Any]) -> Reading:
    _check(settings, {"config_groups", "format", "global_compression_ratio", "ignore",
                      "kv_cache_scheme", "moe_sparsity_config", "quantization_status",
                      "sparsity_config", "transform_config", "version"})  # fmt: skip
    formats = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized",
               "mixed-precision")  # fmt: skip
    if settings.get("format") not in formats:
        raise _refuse("format", settings.get("format"), formats)
    for field in ("transform_config", "moe_sparsity_config"):
        if settings.get(field):
            raise _refuse(field, settings[field], "none")
    sparse = settings.get("sparsity_config") or {}
    if not isinstance(sparse, Mapping) or sparse.get("format", "dense") != "dense":
        raise _refuse("sparsity_config", sparse, "none, or of format 'dense'")
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _refuse("config_groups", groups, "groups of modules with their weights")
    kinds = []
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise _refuse(f"config_groups.{name}", group, "a group that describes its weights")
        if group.get("format") not in (None, *formats[:-1]):
            raise _refuse(f"config_groups.{name}.format", group["format"], formats[:-1])
        kinds.append(_weights(weights))
    every = tuple(dict.fromkeys(kinds))
    return Reading((PackedInts(every), WholeValues(every)), _ACTIVATIONS)


def _weights(stated: Mapping[str, Any]) -> Weights:
    """The settings of one group's weights."""
    _check(stated, {"actorder", "block_structure", "dynamic", "group_size", "num_bits", "observer",
                    "observer_kwargs", "scale_dtype", "strategy", "symmetric", "type",
                    "zp_dtype"}, "weights of compressed-tensors")  # fmt: skip
    kind = stated.get("type", "int")
    if kind not in ("int", "float"):
        raise _refuse("type", kind, ("int", "float"))
    bits = _whole(stated, "num_bits", (4, 8) if kind == "int" else (8,))
    if stated.get("dynamic"):
        raise _refuse("dynamic", stated["dynamic"], "weights that are not dynamic")
    group, strategy = stated.get("group_size"), stated.get("strategy")
    if strategy is None:
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    block: tuple[int | None, int | None]
    if strategy == "group":
        if _group(stated) == -1:
            raise _refuse("group_size", group, "a whole number such as 128")
        block = (1, _group(stated))
    elif strategy == "block":
        block = _block("block_structure", stated.get("block_structure"))
    elif strategy in ("tensor", "channel"):
        block = (None if strategy == "tensor" else 1, None)
    else:
        raise _refuse("strategy", strategy, ("tensor", "channel", "group", "block"))
    order = stated.get("actorder") or "weight"
    if order not in (True, "group", "dynamic", "weight", "static"):
        raise _refuse("actorder", order, ("group", "weight"))
    reordered = order not in ("weight", "static") and strategy == "group"
    return Weights(kind, bits, stated.get("symmetric", True) is True, block, reordered)


_METHODS: Mapping[str, Callable[[Mapping[str, Any]], Reading]] = {
    "awq": _awq, "bitsandbytes": _bitsandbytes, "compressed-tensors": _compressed_tensors,
    "fp8": _fp8, "gptq": _gptq, "mxfp4": _mxfp4,
}  # fmt: skip
