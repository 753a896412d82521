"""Tokens through a whole decoder in one native call: the C structures of `moestro_step`.

What bounds decoding is reading the weights, so nothing else may take time between them. The Python
forward of `models.decoder` is the definition; `infer.native_decoder` decides which models fit.

Letters: L layers, B sequences, T their new tokens, D width, H heads, G key/value heads, A head
width, V vocabulary, K experts per token, P positions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moestro.errors import ShapeError
from moestro.kernels.addresses import CPU, FP32, ROWS, address, check, piece
from moestro.kernels.native_cpu import experts_of, failure_of, matrix_of
from moestro.kernels.native_library import I32, I64, PTR, CExperts, CMatrix, call
from moestro.kernels.packing import ExpertSlabs, PackedMatrix

_FLOAT = ctypes.c_float


class StepLayer(NamedTuple):
    """One layer. All plain tensors are fp32 and contiguous; None where the layer has none."""

    attention_norm: Tensor  # [D], gain of the norm before attention
    ffn_norm: Tensor  # [D], of the one before the feed-forward network
    qkv: PackedMatrix  # [(H + 2G)·A, D]
    out: PackedMatrix  # [D, H·A]
    experts: ExpertSlabs  # of a dense layer its network as a single one
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
    groups: int  # G
    head_dim: int  # A
    vocab: int  # V
    top_k: int  # K; 0 for a model without mixtures
    turning: int | None = None  # numbers of a head that turn, its first; None: all
    norm_all: bool = False  # queries, and keys, have one norm over all heads
    norm_rotated: bool = False  # each head's norm comes after its rotation
    expert_groups: int = 1  # experts are chosen in the best of them alone
    top_groups: int = 1  # how many those are
    group_best: int = 1  # a group counts as much as its best ones
    sigmoid: bool = False  # scores are sigmoids instead of a softmax
    renormalize: bool = True  # the K weights are divided by their sum
    router_scale: float = 1.0  # every weight is multiplied by it
    eps: float = 1e-6  # of the norms
    score_scale: float = 1.0  # of the attention scores
    head_scale: float = 1.0  # of the last hidden state


# Fields of `moestro_layer`, each taken from the field of StepLayer of that name. A letter is a
# size: D width, A of a head, H heads, E experts, N = H·A, W = (H + 2G)·A, q and k the gains
# of queries and keys.
_LAYER = (
    ("attention_norm", PTR, "D"), ("ffn_norm", PTR, "D"), ("attention_norm_bias", PTR, "D"),
    ("ffn_norm_bias", PTR, "D"), ("qkv", CMatrix, "WD"),
    ("out", CMatrix, "DN"), ("qkv_bias", PTR, "W"), ("out_bias", PTR, "D"),
    ("q_norm", PTR, "q"), ("k_norm", PTR, "k"), ("sinks", PTR, "H"),
    ("window", I64, ""), ("router", PTR, "ED"), ("logit_bias", PTR, "E"),
    ("selection_bias", PTR, "E"), ("experts", CExperts, "ED"), ("shared", CExperts, "1D"),
    ("shared_gate", PTR, "D"),
)  # fmt: skip


class _Layer(ctypes.Structure):
    """`moestro_layer`."""

    _fields_ = tuple((name, kind) for name, kind, _ in _LAYER)


class _Decoder(ctypes.Structure):
    """`moestro_decoder`."""

    _fields_ = (
        ("layers", I64), ("dim", I64), ("heads", I64), ("groups", I64), ("head_dim", I64),
        ("vocab", I64), ("turning", I64), ("top_k", I32), ("sigmoid", I32), ("renormalize", I32),
        ("cache_dtype", I32), ("norm_all", I32), ("norm_rotated", I32), ("expert_groups", I32),
        ("top_groups", I32), ("group_best", I32), ("router_scale", _FLOAT), ("eps", _FLOAT),
        ("score_scale", _FLOAT), ("head_scale", _FLOAT), ("layer", PTR), ("norm", PTR),
        ("norm_bias", PTR), ("head", CMatrix), ("head_bias", PTR),
    )  # fmt: skip


class _Past(ctypes.Structure):
    """`moestro_past`."""

    _fields_ = (
        ("keys", PTR), ("values", PTR), ("room", PTR), ("place", PTR), ("kept", PTR), ("rows", I64),
    )  # fmt: skip


class StepPast:
    """Where one sequence's keys and values are, and where the step writes those of new tokens.

    Args:
        decoder: whose past it is; it has no layer yet.
    """

    def __init__(self, decoder: StepDecoder) -> None:
        count = decoder.num_layers
        self.kind = decoder.past_kind
        self.buffers: list[tuple[Tensor, ...] | None] = [None] * count
        self._keys, self._values = (PTR * count)(), (PTR * count)()
        self._rooms, self._places = (I64 * count)(), (I64 * count)()
        self._kept = (I64 * count)()
        self._arrays = (self._keys, self._values, self._rooms, self._places, self._kept)
        self.structure = _Past(*(ctypes.cast(array, PTR) for array in self._arrays), 1)

    @property
    def rows(self) -> int:
        """How many new tokens the next step brings."""
        return int(self.structure.rows)

    @rows.setter
    def rows(self, rows: int) -> None:
        self.structure.rows = rows

    def put(self, layer: int, buffers: tuple[Tensor, ...], place: int, kept: int) -> None:
        """Say where a layer's keys and values are, before each step.

        Args:
            layer: its number.
            buffers: keys and values [1, G, P, A], consecutive positions side by side.
            place: of the first new token in P.
            kept: positions before it that it may see.

        Raises:
            ShapeError: there is no such layer, or they are not of the decoder's shape and cache
                dtype, or not contiguous. Places that do not fit are refused by the step.
        """
        if not 0 <= layer < len(self.buffers):
            raise ShapeError(f"layers are 0 to {len(self.buffers) - 1}; given {layer}")
        if buffers is not self.buffers[layer]:
            _, groups, width, dtype = self.kind
            keys, values = buffers
            room = check(keys, "keys", (1, groups, None, width), (dtype,)).shape[2]
            size = (1, groups, room, width)
            self._keys[layer] = address(keys, "keys", size, (dtype,))
            self._values[layer] = address(values, "values", size, (dtype,))
            self._rooms[layer] = room
            self.buffers[layer] = buffers
        self._places[layer], self._kept[layer] = place, kept


class StepDecoder:
    """A decoder as the native library sees it; keeps the tensors alive that it points to."""

    def __init__(
        self,
        layers: Sequence[StepLayer],
        shape: StepShape,
        norm: Tensor,
        head: PackedMatrix,
        head_bias: Tensor | None = None,
        cache_dtype: torch.dtype = torch.float32,
        norm_bias: Tensor | None = None,
    ) -> None:
        """Point at the weights: of the layers, the last norm (fp32 [D]) and the head ([V, D]).

        Raises:
            ShapeError: a tensor is not what the shape needs, or not fp32 and contiguous on CPU; or
                keys and values (`cache_dtype`) are neither fp32 nor bf16.
        """
        _check_shape(shape, len(layers), cache_dtype)
        self.shape, self.num_layers = shape, len(layers)
        # What its pasts have in common with it.
        self.past_kind = (len(layers), shape.groups, shape.head_dim, cache_dtype)
        self._alive = (list(layers), norm, head, head_bias, norm_bias)
        failures = (failure_of(layer.experts) for layer in layers)
        self._failure = next((each for each in failures if each is not None), None)
        self._layers = (_Layer * len(layers))(*(_layer(layer, shape) for layer in layers))
        self._decoder = _Decoder(
            len(layers), shape.dim, shape.heads, shape.groups, shape.head_dim, shape.vocab,
            _turning(shape), shape.top_k, shape.sigmoid, shape.renormalize, ROWS[cache_dtype],
            shape.norm_all, shape.norm_rotated,
            shape.expert_groups, shape.top_groups, shape.group_best,
            shape.router_scale, shape.eps, shape.score_scale, shape.head_scale,
            ctypes.cast(self._layers, PTR), address(norm, "norm", (shape.dim,), FP32),
            None if norm_bias is None else address(norm_bias, "norm_bias", (shape.dim,), FP32),
            _matrix(head, "head", shape.vocab, shape.dim),
            None if head_bias is None else address(head_bias, "head_bias", (shape.vocab,), FP32),
        )  # fmt: skip

    def step(
        self, x_TD: Tensor, cos_TA: Tensor, sin_TA: Tensor, pasts: Sequence[StepPast]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """New tokens of B sequences; their keys and values are written into the pasts.

        A token gets the same bits however its sequence is cut, and whatever runs beside it.

        Args:
            x_TD: fp32, the tokens' embeddings, sequence by sequence, `rows` of each.
            cos_TA: fp32 [T, A/2], cosines of their positions, A of the part of a head that turns.
            sin_TA: fp32 [T, A/2], sines.
            pasts: of the sequences, each its own; every layer of them must be `put`.

        Returns:
            (logits after each sequence's last token, fp32 [B, V]; experts int64 [L, T, K]; weights
            fp32 [L, T, K]; those of dense layers are -1 and 0).

        Raises:
            ShapeError: shapes do not fit.
            CheckpointError: experts that are stored could not be read; the pasts are as before.
        """
        batch, half = len(pasts), _turning(self.shape) // 2
        kinds = [past.kind for past in pasts]
        if kinds != [self.past_kind] * max(batch, 1) or len({id(past) for past in pasts}) < batch:
            raise ShapeError(
                f"a step takes pasts, each once, of {self.past_kind} (layers, groups, head_dim, "
                f"dtype); given {kinds}"
            )
        tokens = sum(past.rows for past in pasts)
        x_TD, x_at = piece(x_TD, "embeddings", (tokens, self.shape.dim), FP32, torch.float32)
        cos_TA, cos_at = piece(cos_TA, "cosines", (tokens, half), FP32, torch.float32)
        sin_TA, sin_at = piece(sin_TA, "sines", (tokens, half), FP32, torch.float32)
        structures = (_Past * batch)(*(past.structure for past in pasts))
        sizes = (self.num_layers, tokens, self.shape.top_k)
        logits_BV = torch.empty(batch, self.shape.vocab, dtype=torch.float32, device=CPU)
        experts_LTK = torch.full(sizes, -1, dtype=torch.int64, device=CPU)
        weights_LTK = torch.zeros(sizes, dtype=torch.float32, device=CPU)
        call(
            "step", ctypes.byref(self._decoder), batch, x_at, cos_at, sin_at, structures,
            logits_BV.data_ptr(), experts_LTK.data_ptr(), weights_LTK.data_ptr(),
            takes="pasts with every layer put, at places within their room",
            failure=self._failure,
        )  # fmt: skip
        return logits_BV, experts_LTK, weights_LTK


def _check_shape(shape: StepShape, num_layers: int, cache_dtype: torch.dtype) -> None:
    """Refuse numbers that no decoder has."""
    turning = _turning(shape)
    least = min(shape.dim, shape.heads, shape.groups, turning, shape.vocab, num_layers)
    odd = turning % 2 or turning > shape.head_dim
    if least < 1 or shape.top_k < 0 or shape.heads % shape.groups or odd:
        raise ShapeError(
            f"a decoder has layers, a multiple of groups as heads, and an even number of a head's "
            f"numbers that turn; given {num_layers} layers and {shape}"
        )
    if cache_dtype not in ROWS:
        raise ShapeError(f"keys and values are float32 or bfloat16; given {cache_dtype}")


def _turning(shape: StepShape) -> int:
    return shape.head_dim if shape.turning is None else shape.turning


def _routes(shape: StepShape, count: int) -> bool:
    """Whether top_k of `count` experts can be chosen, in the best groups."""
    groups, best = shape.expert_groups, shape.top_groups
    if groups < 1 or count % groups or not 1 <= best <= groups:
        return False
    size = count // groups
    return 1 <= shape.group_best <= size and 1 <= shape.top_k <= size * best


def _layer(layer: StepLayer, shape: StepShape) -> _Layer:
    width, queries = shape.head_dim, shape.heads * shape.head_dim
    count, routed = layer.experts.num_experts, layer.router is not None
    if layer.window < 0 or (not _routes(shape, count) if routed else count != 1):
        raise ShapeError(
            f"a layer has a window of 0 or more, and with a router top_k of its experts, without "
            f"one a single expert; given window {layer.window}, {count} experts, {shape}"
        )
    sizes = {"D": shape.dim, "A": width, "H": shape.heads, "E": count, "1": 1, "N": queries}
    sizes["W"] = queries + 2 * shape.groups * width
    sizes["q"] = queries if shape.norm_all else width
    sizes["k"] = shape.groups * width if shape.norm_all else width
    given = (
        _field(layer, name, kind, [sizes[letter] for letter in letters])
        for name, kind, letters in _LAYER
    )
    return _Layer(*given)


def _field(layer: StepLayer, name: str, kind: type, sizes: list[int]) -> Any:
    """What the C structure holds of a layer's field; an empty `kind` for an optional None."""
    value = getattr(layer, name)
    if value is None and name in StepLayer._field_defaults:
        return kind()
    if kind is PTR:
        return address(value, name, tuple(sizes), FP32)
    if kind is CMatrix:
        return _matrix(value, name, *sizes)
    return _experts(value, name, *sizes) if kind is CExperts else value


def _matrix(packed: PackedMatrix, name: str, rows: int, columns: int) -> CMatrix:
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
