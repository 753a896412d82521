"""Published checkpoints in fewer bits: how two tensors stand for one, and what numbers they mean.

fp8: e4m3 values with one scale per block, usually of 128 × 128 (DeepSeek-V3, §3.3), or with one for
the whole matrix (AutoFP8, Mistral).
MXFP4 (OCP Microscaling 1.0, §5.3-5.4; gpt-oss): two e2m1 values in a byte, the low half first, and
a power of two for each 32 of them.

Letters: E experts, O, I out and in of a matrix, N = I / 32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.checkpoints.tensor_files import Source, Stored
from moestro.errors import CheckpointError, ShapeError

Shape = tuple[int, ...]

# e2m1 has 1 sign, 2 exponent and 1 mantissa bit.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_GROUP = 32
_GROUPS_AT_ONCE = 1 << 16


# quant_method → its name in sentences.
_NAMES = {
    "awq": "AWQ", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors",
    "fp8": "fp8", "gptq": "GPTQ", "mlx": "MLX", "modelopt": "ModelOpt", "mxfp4": "MXFP4",
}  # fmt: skip


class Quantisation(NamedTuple):
    """What a config.json says of its weights: the quant_method, and in words."""

    method: str
    words: str


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


class Scheme(NamedTuple):
    """How a checkpoint stores one tensor as two, values and scales.

    Attributes:
        values: what the key of the values adds to the key of the tensor.
        scales: what the key of the scales adds to it; one of these.
        shape: (shape of the values) → shape of the tensor.
        dequantize: (values, scales, dtype) → the tensor, of the shape that a checkpoint which is
            not quantised has.
        unused: ends of the keys of scales for activations, which stay in full here.
    """

    values: str
    scales: tuple[str, ...]
    shape: Callable[[Shape], Shape]
    dequantize: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    unused: tuple[str, ...] = ()


def scheme(settings: Mapping[str, Any]) -> Scheme:
    """The scheme that a `quantization_config` of config.json describes.

    Raises:
        CheckpointError: a method, format or field that is not known; names it.
    """
    method = settings.get("quant_method")
    if method not in _FIELDS:
        raise CheckpointError(
            f"config.json says quant_method {method!r}; read are {', '.join(sorted(_FIELDS))}. "
            "Use a checkpoint that is not quantised, or one in these"
        )
    unknown = sorted(settings.keys() - _FIELDS[method] - {"quant_method"})
    if unknown:
        raise CheckpointError(
            f"quantization_config of config.json has unknown fields for {method}: "
            f"{', '.join(unknown)}; known are {', '.join(sorted(_FIELDS[method]))}"
        )
    if method == "mxfp4":
        return Scheme("_blocks", ("_scales",), _mxfp4_shape, _mxfp4_experts)
    given = settings.get("weight_block_size")
    if given is not None and not _is_block(given):
        raise CheckpointError(
            f"quantization_config of config.json has weight_block_size {given!r}; fp8 has two "
            "whole numbers such as [128, 128], or null for one scale per matrix"
        )
    if settings.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise CheckpointError(
            f"quantization_config of config.json has fmt {settings['fmt']!r}; only e4m3 is read"
        )

    block = None if given is None else (given[0], given[1])

    def dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        return from_fp8(values, scales, block, dtype)

    return Scheme("", _FP8_SCALES, lambda shape: shape, dequantize, _FP8_UNUSED)


def _is_block(value: Any) -> TypeGuard[Sequence[int]]:
    sides = value if isinstance(value, list | tuple) else ()
    return len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides)


# Values are multiplied by either: the first is DeepSeek's name, the second AutoFP8's.
_FP8_SCALES = ("_scale_inv", "_scale")
_FP8_UNUSED = (
    ".activation_scale", ".input_scale", ".output_scale", ".k_scale", ".kv_scale", ".v_scale",
)  # fmt: skip
# What each method may say of itself; the keys say which tensors are quantised.
_FIELDS = {
    "fp8": {
        "activation_scheme", "dequantize", "fmt", "ignored_layers", "kv_cache_scheme",
        "modules_to_not_convert", "scale_fmt", "weight_block_size",
    },
    "mxfp4": {"dequantize", "modules_to_not_convert"},
}  # fmt: skip


def pairs(keys: Iterable[str], method: Scheme) -> dict[str, tuple[str, str]]:
    """The quantised tensors among a checkpoint's keys: key → (key of values, key of scales).

    All other keys hold plain tensors, or are unused.

    Raises:
        CheckpointError: scales without values, or values without scales; names the key.
    """
    names = {key for key in keys if not key.endswith(method.unused)}
    found = {}
    for key in sorted(names):
        end = next((end for end in method.scales if key.endswith(end)), "")
        if end:
            name = key.removesuffix(end)
            found[name] = (other := name + method.values, key)
        elif method.values and key.endswith(method.values):
            name = key.removesuffix(method.values)
            found[name] = (key, other := name + method.scales[0])
        else:
            continue
        if other not in names:
            raise CheckpointError(f"the checkpoint has {key} but lacks {other}")
    return found


@dataclass(frozen=True)
class Quantized(Source):
    """A tensor that two of a checkpoint stand for, values and scales."""

    values: Stored
    scales: Stored
    scheme: Scheme

    @classmethod
    def of(cls, values: Stored, scales: Stored, scheme: Scheme) -> Quantized:
        """The tensor of these two."""
        shape, size = scheme.shape(values.shape), values.bytes + scales.bytes
        return cls(values.file, values.key, None, shape, size, values, scales, scheme)

    def entry(self, index: int) -> Quantized:
        """Entry `index` of the first axis.

        Raises:
            CheckpointError: there are not as many entries of scales as of values.
        """
        if self.scales.shape[:1] != self.values.shape[:1]:
            raise CheckpointError(
                f"{self.file}: {self.key} {list(self.values.shape)} needs scales for each of its "
                f"first axis; it has {list(self.scales.shape)}"
            )
        return Quantized.of(self.values.entry(index), self.scales.entry(index), self.scheme)

    def load(self, dtype: torch.dtype) -> Tensor:
        """The numbers in `dtype`."""
        try:
            return self.scheme.dequantize(self.values.load(), self.scales.load(), dtype)
        except ShapeError as error:
            raise CheckpointError(f"{self.file}: {self.key}: {error}") from None


def find_sources(stored: Mapping[str, Stored], hf_config: Mapping[str, Any]) -> dict[str, Source]:
    """Sources by key, quantised pairs joined under the key of the tensor that they stand for.

    Raises:
        CheckpointError: the quantisation is not known, or values lack their scales.
    """
    if not hf_config.get("quantization_config"):
        return dict(stored)
    method = scheme(hf_config["quantization_config"])
    joined = {values: (name, scales) for name, (values, scales) in pairs(stored, method).items()}
    used = {scales for _, scales in joined.values()}
    sources: dict[str, Source] = {}
    for key, one in stored.items():
        if key in joined:
            name, scales = joined[key]
            sources[name] = Quantized.of(one, stored[scales], method)
        elif key not in used and not key.endswith(method.unused):
            sources[key] = one
    return sources


def from_fp8(
    values_OI: Tensor, scales: Tensor, block: tuple[int, int] | None, dtype: torch.dtype
) -> Tensor:
    """Values times the scale of their block, multiplied in fp32. [O, I].

    Args:
        values_OI: float8_e4m3fn.
        scales: one number per block, [ceil(O / rows), ceil(I / columns)]; the last block of a row
            or column may be a part of one. Without blocks a single number, of any shape.
        block: its (rows, columns); None: the whole matrix is one.
        dtype: of the result.

    Raises:
        ShapeError: the values are of another dtype, or the scales do not fit them.
    """
    if values_OI.dtype != torch.float8_e4m3fn or values_OI.dim() != 2:
        raise ShapeError(
            f"fp8 values are float8_e4m3fn [O, I]; given {values_OI.dtype} {list(values_OI.shape)}"
        )
    height, width = values_OI.shape
    rows, columns = block or (max(height, 1), max(width, 1))
    expected = (-(-height // rows), -(-width // columns))
    if block is None and scales.numel() == 1:
        scales = scales.reshape(1, 1)
    if scales.shape != expected or not scales.is_floating_point():
        raise ShapeError(
            f"values {list(values_OI.shape)} in blocks of {rows} × {columns} take scales "
            f"{list(expected)} of floats; given {scales.dtype} {list(scales.shape)}"
        )
    every = torch.arange(256, dtype=torch.uint8, device=values_OI.device)
    numbers = every.view(torch.float8_e4m3fn).float()
    # A pair of bytes read as one number has its first byte in the low half.
    table = torch.stack([numbers.repeat(256), numbers.repeat_interleave(256)], dim=1)
    values_OI = values_OI.contiguous()
    out_OI = torch.empty_like(values_OI, dtype=dtype)
    wide = scales.float().repeat_interleave(columns, dim=1)[:, :width]
    for scale_I, start in zip(wide, range(0, height, rows), strict=True):
        out_OI[start : start + rows] = _numbers(values_OI[start : start + rows], table) * scale_I
    return out_OI


def _numbers(values: Tensor, table: Tensor) -> Tensor:
    """fp8 as fp32, by a table of all pairs: torch takes five times as long on a CPU."""
    if values.shape[-1] % 2:
        return values.float()
    return F.embedding(values.view(torch.int16).int() & 0xFFFF, table).flatten(-2)


def from_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """e2m1 value · 2^(scale - 127); scale 255 is not a number. [..., N · 32].

    Args:
        blocks: uint8 [..., N, 16], two values in a byte.
        scales: uint8 [..., N].
        dtype: of the result; exact in bf16 and fp32 as long as the exponent fits.

    Raises:
        ShapeError: a dtype or shape does not fit.
    """
    fits = blocks.dim() >= 2 and (*scales.shape, _GROUP // 2) == tuple(blocks.shape)
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8 or not fits:
        raise ShapeError(
            "MXFP4 blocks are uint8 [..., N, 16] with uint8 scales [..., N]; given "
            f"{blocks.dtype} {list(blocks.shape)} and {scales.dtype} {list(scales.shape)}"
        )
    exact = dtype if dtype in (torch.bfloat16, torch.float32) else torch.float32
    byte = torch.arange(256, device=blocks.device)
    half = torch.tensor(_E2M1, dtype=exact, device=blocks.device)
    twins = torch.stack([half[byte & 15], half[byte >> 4]], dim=1)
    powers = torch.ldexp(torch.ones_like(byte, dtype=torch.float64), byte - 127).to(exact)
    powers[255] = torch.nan
    out = torch.empty(*scales.shape, _GROUP, dtype=dtype, device=blocks.device)
    # Some at a time, so that what is needed on the way is small.
    flat = (out.view(-1, _GROUP), blocks.reshape(-1, _GROUP // 2), scales.reshape(-1))
    for part, block, scale in zip(*(torch.split(x, _GROUPS_AT_ONCE) for x in flat), strict=True):
        numbers = F.embedding(block.int(), twins).flatten(-2)
        part.copy_(numbers.mul_(powers[scale.int()][:, None]))
    return out.flatten(-2)


def _mxfp4_shape(shape: Shape) -> Shape:
    """[E, O, N, 16] of the blocks → [E, I, O]: gpt-oss keeps plain experts transposed."""
    *experts, out, groups, _ = shape
    return (*experts, groups * _GROUP, out)


def _mxfp4_experts(blocks_EON: Tensor, scales_EON: Tensor, dtype: torch.dtype) -> Tensor:
    return from_mxfp4(blocks_EON, scales_EON, dtype).transpose(-1, -2)
