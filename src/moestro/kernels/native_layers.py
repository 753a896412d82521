"""Layers of a decoder as the native step takes them: the C structures behind `moestro_layer`.

`kernels.native_step` passes tokens through them; `infer.native_decoder` takes them from models.

Letters: D width, H heads, G key/value heads, A head width, E experts, K experts per token. Of
latent attention: R the latent width, N and A' a head's widths without and with positions, O of its
values.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moestro.errors import ShapeError
from moestro.kernels.addresses import FP32, ROWS, Shape, address, check
from moestro.kernels.native_cpu import experts_of, matrix_of
from moestro.kernels.native_library import I32, I64, PTR, CExperts, CMatrix
from moestro.kernels.packing import ExpertSlabs, PackedMatrix

_FLOAT = ctypes.c_float


class Kept(NamedTuple):
    """A buffer of what is kept of a sequence; None in the shape: as many positions."""

    shape: Shape
    dtype: torch.dtype


class StepLatent(NamedTuple):
    """Latent attention (`models.latent`) of one layer; plain tensors as in StepLayer."""

    nope: int  # N
    value: int  # O
    q: PackedMatrix  # [H·(N + A'), D]; behind q_down, where there is one: [H·(N + A'), q_rank]
    kv_down: PackedMatrix  # [R + A', D]
    kv_norm: Tensor  # [R]
    kv_up: Tensor  # [H·(N + O), R], fp32 or bf16
    eps: float  # of both norms
    q_down: PackedMatrix | None = None  # [q_rank, D]
    q_norm: Tensor | None = None  # [q_rank]


class StepDelta(NamedTuple):
    """A gated DeltaNet (`models.delta`) of one layer; plain tensors as in StepLayer.

    Letters: G key heads, H value heads, A and O widths of a key and a value, W of the convolution
    of I = 2·G·A + H·O channels.
    """

    key_heads: int  # G
    value_heads: int  # H
    key_dim: int  # A
    value_dim: int  # O
    qkvz: PackedMatrix  # [I + H·O, D]: queries, keys, values, gates of the outputs
    ba: Tensor  # [2H, D], of β and of the decay
    conv: Tensor  # [W, I]
    rate: Tensor  # [H]
    time_bias: Tensor  # [H]
    gain: Tensor  # [O], of the norm
    length_eps: float  # added to the squared length of queries and keys
    eps: float  # of the norm


class StepLayer(NamedTuple):
    """One layer. All plain tensors are fp32 and contiguous; None where the layer has none."""

    attention_norm: Tensor  # [D], gain of the norm before attention
    ffn_norm: Tensor  # [D], of the one before the feed-forward network
    out: PackedMatrix  # [D, H·A], behind latent attention and a DeltaNet [D, H·O]
    experts: ExpertSlabs  # of a dense layer its network as a single one
    qkv: PackedMatrix | None = None  # [(H + 2G)·A, D]; gated: [(2H + 2G)·A, D]
    latent: StepLatent | None = None  # instead of qkv
    delta: StepDelta | None = None  # instead of both
    router: Tensor | None = None  # [E, D]; None for a dense layer
    attention_norm_bias: Tensor | None = None  # [D], of a layer norm; None for an RMSNorm
    ffn_norm_bias: Tensor | None = None  # [D]
    window: int = 0  # positions seen, the token's own included; 0: all that are kept
    qkv_bias: Tensor | None = None  # [(H + 2G)·A]
    out_bias: Tensor | None = None  # [D]
    q_norm: Tensor | None = None  # [A], gain of each query head's RMSNorm; norm_all: [H·A]
    k_norm: Tensor | None = None  # [A], of each key head's; norm_all: [G·A]
    sinks: Tensor | None = None  # [H]
    logit_bias: Tensor | None = None  # [E], added to the logits
    selection_bias: Tensor | None = None  # [E], added to the scores when choosing
    shared: ExpertSlabs | None = None  # the shared expert, as a single one
    shared_gate: Tensor | None = None  # [D]


class StepShape(NamedTuple):
    """Numbers that all layers share."""

    dim: int  # D
    heads: int  # H
    groups: int  # G; 1 with latent attention
    head_dim: int  # A; R + A' with latent attention
    vocab: int  # V
    top_k: int  # K; 0 for a model without mixtures
    turning: int | None = None  # numbers of a head that turn, its first; None: all
    norm_all: bool = False  # queries, and keys, have one norm over all heads
    norm_rotated: bool = False  # each head's norm comes after its rotation
    gated: bool = False  # behind each head's query stand its gates
    expert_groups: int = 1  # experts are chosen in the best of them alone
    top_groups: int = 1  # how many those are
    group_best: int = 1  # a group counts as much as its best ones
    sigmoid: bool = False  # scores are sigmoids instead of a softmax
    rivals: float = 0.0  # of sparsemixer 2 · jitter, else 0
    renormalize: bool = True  # the K weights are divided by their sum
    router_scale: float = 1.0  # every weight is multiplied by it
    eps: float = 1e-6  # of the norms
    score_scale: float = 1.0  # of the attention scores
    head_scale: float = 1.0  # of the last hidden state


# Fields of `moestro_layer`, each taken from the field of StepLayer of that name. A letter is a
# size: D width, A of a head, H heads, E experts, N the columns of out, W the rows of qkv, q and k
# the gains of queries and keys.
_LAYER = (
    ("attention_norm", PTR, "D"), ("ffn_norm", PTR, "D"), ("attention_norm_bias", PTR, "D"),
    ("ffn_norm_bias", PTR, "D"), ("qkv", CMatrix, "WD"),
    ("out", CMatrix, "DN"), ("qkv_bias", PTR, "W"), ("out_bias", PTR, "D"),
    ("q_norm", PTR, "q"), ("k_norm", PTR, "k"), ("sinks", PTR, "H"),
    ("window", I64, ""), ("router", PTR, "ED"), ("logit_bias", PTR, "E"),
    ("selection_bias", PTR, "E"), ("latent", PTR, ""), ("delta", PTR, ""),
    ("experts", CExperts, "ED"), ("shared", CExperts, "1D"), ("shared_gate", PTR, "D"),
)  # fmt: skip


class CLatent(ctypes.Structure):
    """`moestro_latent`."""

    _fields_ = (
        ("q_rank", I64), ("kv_rank", I64), ("nope", I64), ("value", I64), ("q_down", CMatrix),
        ("q", CMatrix), ("kv_down", CMatrix), ("q_norm", PTR), ("kv_norm", PTR), ("kv_up", PTR),
        ("kv_up_dtype", I32), ("eps", _FLOAT),
    )  # fmt: skip


class CDelta(ctypes.Structure):
    """`moestro_delta`."""

    _fields_ = (
        ("key_heads", I64), ("value_heads", I64), ("key_dim", I64), ("value_dim", I64),
        ("conv_width", I64), ("qkvz", CMatrix), ("ba", PTR), ("conv", PTR), ("rate", PTR),
        ("time_bias", PTR), ("gain", PTR), ("length_eps", _FLOAT), ("eps", _FLOAT),
    )  # fmt: skip


class CLayer(ctypes.Structure):
    """`moestro_layer`."""

    _fields_ = tuple((name, kind) for name, kind, _ in _LAYER)


def turning_of(shape: StepShape) -> int:
    """How many of a head's numbers turn."""
    return shape.head_dim if shape.turning is None else shape.turning


def _routes(shape: StepShape, count: int) -> bool:
    """Whether top_k of `count` experts can be chosen, in the best groups."""
    groups, best = shape.expert_groups, shape.top_groups
    if groups < 1 or count % groups or not 1 <= best <= groups:
        return False
    size = count // groups
    return 1 <= shape.group_best <= size and 1 <= shape.top_k <= size * best


def kept_by(layer: StepLayer, shape: StepShape, dtype: torch.dtype) -> tuple[Kept, ...]:
    """What is kept of a sequence: keys and values, or both in one; of int8 also their scales."""
    delta = layer.delta
    if delta is not None:
        inputs = (1, len(delta.conv) - 1, delta.conv.shape[-1])
        state = (1, delta.value_heads, delta.key_dim, delta.value_dim)
        return Kept(inputs, torch.float32), Kept(state, torch.float32)
    positions: Shape = (1, None) if layer.latent is not None else (1, shape.groups, None)
    count = 1 if layer.latent is not None else 2
    numbers = (Kept((*positions, shape.head_dim), dtype),) * count
    scales = (Kept((*positions, 1), torch.float32),) * count
    return numbers + scales if dtype == torch.int8 else numbers


def attention_of(layer: StepLayer, shape: StepShape) -> CLatent | CDelta | None:
    """What a layer has instead of grouped-query attention."""
    if sum(each is not None for each in (layer.qkv, layer.latent, layer.delta)) != 1:
        raise ShapeError("a layer has one of qkv, latent attention and a DeltaNet")
    if layer.delta is not None:
        return _delta(layer.delta, shape)
    return None if layer.latent is None else _latent(layer.latent, shape)


def _delta(delta: StepDelta, shape: StepShape) -> CDelta:
    heads, values = delta.value_heads, delta.value_heads * delta.value_dim
    channels = 2 * delta.key_heads * delta.key_dim + values
    width = max(1, len(check(delta.conv, "conv", (None, channels), FP32)))
    return CDelta(
        delta.key_heads, heads, delta.key_dim, delta.value_dim, width,
        checked_matrix(delta.qkvz, "qkvz", channels + values, shape.dim),
        address(delta.ba, "ba", (2 * heads, shape.dim), FP32),
        address(delta.conv, "conv", (width, channels), FP32),
        address(delta.rate, "rate", (heads,), FP32),
        address(delta.time_bias, "time_bias", (heads,), FP32),
        address(delta.gain, "gain", (delta.value_dim,), FP32), delta.length_eps, delta.eps,
    )  # fmt: skip


def _latent(latent: StepLatent, shape: StepShape) -> CLatent:
    turning, dim, heads = turning_of(shape), shape.dim, shape.heads
    rank, q_rank = shape.head_dim - turning, 0 if latent.q_down is None else latent.q_down.rows
    queries, ups = heads * (latent.nope + turning), heads * (latent.nope + latent.value)
    kv_up = check(latent.kv_up, "kv_up", (ups, rank), ROWS)
    q_down = latent.q_down
    return CLatent(
        q_rank, rank, latent.nope, latent.value,
        CMatrix() if q_down is None else checked_matrix(q_down, "q_down", q_rank, dim),
        checked_matrix(latent.q, "q", queries, q_rank or dim),
        checked_matrix(latent.kv_down, "kv_down", shape.head_dim, dim),
        None if not q_rank else address(latent.q_norm, "q_norm", (q_rank,), FP32),
        address(latent.kv_norm, "kv_norm", (rank,), FP32),
        address(kv_up, "kv_up", (ups, rank), ROWS), ROWS[kv_up.dtype], latent.eps,
    )  # fmt: skip


def layer_of(layer: StepLayer, other: CLatent | CDelta | None, shape: StepShape) -> CLayer:
    """The structure of a layer; `other` is what `attention_of` gave, and must live as long.

    Raises:
        ShapeError: a tensor is not what the shape needs, or not dense on CPU.
    """
    width, queries = shape.head_dim, shape.heads * shape.head_dim
    count, routed = layer.experts.num_experts, layer.router is not None
    if layer.window < 0 or (not _routes(shape, count) if routed else count != 1):
        raise ShapeError(
            f"a layer has a window of 0 or more, and with a router top_k of its experts, without "
            f"one a single expert; given window {layer.window}, {count} experts, {shape}"
        )
    sizes = {"D": shape.dim, "A": width, "H": shape.heads, "E": count, "1": 1}
    sizes["N"] = queries
    if layer.latent is not None:
        sizes["N"] = shape.heads * layer.latent.value
    elif layer.delta is not None:
        sizes["N"] = layer.delta.value_heads * layer.delta.value_dim
    sizes["W"] = queries * (1 + shape.gated) + 2 * shape.groups * width
    sizes["q"] = queries if shape.norm_all else width
    sizes["k"] = shape.groups * width if shape.norm_all else width
    others = ("latent", "delta")
    given = {
        name: _field(layer, name, kind, [sizes[letter] for letter in letters])
        for name, kind, letters in _LAYER
        if name not in others
    }
    if other is not None:
        given["latent" if isinstance(other, CLatent) else "delta"] = ctypes.addressof(other)
    return CLayer(**given)


def _field(layer: StepLayer, name: str, kind: type, sizes: list[int]) -> Any:
    """What the C structure holds of a layer's field; an empty `kind` for an optional None."""
    value = getattr(layer, name)
    if value is None and name in StepLayer._field_defaults:
        return kind()
    if kind is PTR:
        return address(value, name, tuple(sizes), FP32)
    if kind is CMatrix:
        return checked_matrix(value, name, *sizes)
    return _experts(value, name, *sizes) if kind is CExperts else value


def checked_matrix(packed: PackedMatrix, name: str, rows: int, columns: int) -> CMatrix:
    """The structure of a matrix of that size.

    Raises:
        ShapeError: it is of another.
    """
    if (packed.rows, packed.columns) != (rows, columns):
        raise ShapeError(
            f"{name} must be {rows} × {columns}; given {packed.rows} × {packed.columns}"
        )
    return matrix_of(packed)


def _experts(packed: ExpertSlabs, name: str, count: int, dim: int) -> CExperts:
    if (packed.num_experts, packed.dim) != (count, dim):
        raise ShapeError(
            f"{name} must be {count} of width {dim}; given {packed.num_experts} of {packed.dim}"
        )
    return experts_of(packed)
