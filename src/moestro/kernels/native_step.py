"""Tokens through a whole decoder in one native call: the C structures of `moestro_step`.

What bounds decoding is reading the weights, so nothing else may take time between them. The Python
forward of `models.decoder` is the definition; `infer.native_decoder` decides which models fit.

Letters: L layers, B sequences, T their new tokens, D width, H heads, G key/value heads, A head
width, V vocabulary, K experts per token, P positions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moestro.errors import ShapeError
from moestro.kernels.addresses import CPU, FP32, ROWS, address, check, piece
from moestro.kernels.native_cpu import failure_of
from moestro.kernels.native_layers import (
    CLayer,
    Kept,
    StepLayer,
    StepShape,
    attention_of,
    checked_matrix,
    kept_by,
    layer_of,
    turning_of,
)
from moestro.kernels.native_library import I32, I64, PTR, CMatrix, call
from moestro.kernels.packing import PackedMatrix

_FLOAT = ctypes.c_float
_ENDLESS = 2**31  # positions that a state may see
CACHES = {**ROWS, torch.int8: 2}  # dtypes of keys and values, as native/moestro.h numbers them
_WIDEST = 1024  # numbers of a head in int8


class _Decoder(ctypes.Structure):
    """`moestro_decoder`."""

    _fields_ = (
        ("layers", I64), ("dim", I64), ("heads", I64), ("groups", I64), ("head_dim", I64),
        ("vocab", I64), ("turning", I64), ("top_k", I32), ("sigmoid", I32), ("renormalize", I32),
        ("cache_dtype", I32), ("norm_all", I32), ("norm_rotated", I32), ("gated", I32),
        ("expert_groups", I32), ("top_groups", I32), ("group_best", I32), ("rivals", _FLOAT),
        ("router_scale", _FLOAT), ("eps", _FLOAT), ("score_scale", _FLOAT),
        ("head_scale", _FLOAT), ("layer", PTR), ("norm", PTR), ("norm_bias", PTR),
        ("head", CMatrix), ("head_bias", PTR),
    )  # fmt: skip


class _Past(ctypes.Structure):
    """`moestro_past`."""

    _fields_ = (
        ("keys", PTR), ("values", PTR), ("key_scales", PTR), ("value_scales", PTR), ("room", PTR),
        ("place", PTR), ("kept", PTR), ("rows", I64), ("told", I64),
    )  # fmt: skip


class PastKind(NamedTuple):
    """What a decoder keeps of a sequence."""

    layers: tuple[tuple[Kept, ...], ...]  # each layer's buffers


class StepPast:
    """Where one sequence's keys and values are, and where the step writes those of new tokens.

    Args:
        decoder: whose past it is; it has no layer yet.

    Attributes:
        rows: how many new tokens the next step brings.
        told: after how many of them, the last ones, logits are wanted.
    """

    def __init__(self, decoder: StepDecoder) -> None:
        count = decoder.num_layers
        self.kind = decoder.past_kind
        self.buffers: list[tuple[Tensor, ...] | None] = [None] * count
        self._keys, self._values = (PTR * count)(), (PTR * count)()
        self._key_scales, self._value_scales = (PTR * count)(), (PTR * count)()
        self._rooms, self._places = (I64 * count)(), (I64 * count)()
        self._kept = (I64 * count)()
        scales = (self._key_scales, self._value_scales)
        arrays = (self._keys, self._values, *scales, self._rooms, self._places, self._kept)
        self._pointers = [ctypes.cast(array, PTR) for array in arrays]
        self.rows = self.told = 1

    @property
    def structure(self) -> _Past:
        """What the next step takes."""
        return _Past(*self._pointers, self.rows, self.told)

    def put(self, layer: int, buffers: tuple[Tensor, ...], place: int, kept: int) -> None:
        """Say where a layer's keys and values are, before each step.

        Args:
            layer: its number.
            buffers: keys and values [1, G, P, A]; of latent attention what is kept, [1, P, R + A'];
                of a DeltaNet fp32 the convolution's last inputs [1, W - 1, I] and the state
                [1, H, A, O]. Consecutive positions lie side by side. Of int8 the scales follow,
                fp32 [1, G, P, 1] or [1, P, 1].
            place: of the first new token in P.
            kept: positions before it that it may see.

        Raises:
            ShapeError: there is no such layer, or they are not of the decoder's shape and cache
                dtype, or not contiguous. Places that do not fit are refused by the step.
        """
        if not 0 <= layer < len(self.buffers):
            raise ShapeError(f"layers are 0 to {len(self.buffers) - 1}; given {layer}")
        if buffers is not self.buffers[layer]:
            self._point(layer, buffers)
        self._places[layer], self._kept[layer] = place, kept

    def _point(self, layer: int, buffers: tuple[Tensor, ...]) -> None:
        kinds, room = self.kind.layers[layer], _ENDLESS
        if len(buffers) != len(kinds):
            raise ShapeError(f"layer {layer} keeps {len(kinds)} buffers; given {len(buffers)}")
        if None in kinds[0].shape:
            shape, dtype = kinds[0]
            room = check(buffers[0], "part 0 of keys and values", shape, (dtype,)).shape[-2]
        places = []
        for number, (tensor, kind) in enumerate(zip(buffers, kinds, strict=True)):
            size = tuple(room if each is None else each for each in kind.shape)
            name = f"part {number} of keys and values"
            places.append(address(tensor, name, size, (kind.dtype,)))
        count = len(places) // 2 if kinds[0].dtype == torch.int8 else len(places)
        self._keys[layer], self._values[layer] = places[0], places[count - 1]
        if count < len(places):
            self._key_scales[layer], self._value_scales[layer] = places[count], places[-1]
        self._rooms[layer] = room
        self.buffers[layer] = buffers


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
                keys and values (`cache_dtype`) are not fp32, bf16 or int8.
        """
        _check_shape(shape, len(layers), cache_dtype)
        self.shape, self.num_layers = shape, len(layers)
        others = [attention_of(layer, shape) for layer in layers]
        # What its pasts have in common with it.
        self.past_kind = PastKind(tuple(kept_by(layer, shape, cache_dtype) for layer in layers))
        self._alive = (list(layers), norm, head, head_bias, norm_bias, others)
        pairs = zip(layers, others, strict=True)
        self._layers = (CLayer * len(layers))(*(layer_of(*pair, shape) for pair in pairs))
        failures = (failure_of(layer.experts) for layer in layers)
        self._failure = next((each for each in failures if each is not None), None)
        self._decoder = _Decoder(
            len(layers), shape.dim, shape.heads, shape.groups, shape.head_dim, shape.vocab,
            turning_of(shape), shape.top_k, shape.sigmoid, shape.renormalize, CACHES[cache_dtype],
            shape.norm_all, shape.norm_rotated, shape.gated,
            shape.expert_groups, shape.top_groups, shape.group_best, shape.rivals,
            shape.router_scale, shape.eps, shape.score_scale, shape.head_scale,
            ctypes.cast(self._layers, PTR), address(norm, "norm", (shape.dim,), FP32),
            None if norm_bias is None else address(norm_bias, "norm_bias", (shape.dim,), FP32),
            checked_matrix(head, "head", shape.vocab, shape.dim),
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
            (logits, fp32 [N, V], after the last `told` tokens of each sequence; experts int64
            [L, T, K]; weights fp32 [L, T, K]; those of dense layers are -1 and 0).

        Raises:
            ShapeError: shapes do not fit.
            CheckpointError: stored experts could not be read; the pasts are then of no use.
        """
        batch, half = len(pasts), turning_of(self.shape) // 2
        own = all(past.kind == self.past_kind for past in pasts)
        if not batch or not own or len({id(past) for past in pasts}) < batch:
            raise ShapeError(
                f"a step takes pasts of its own decoder, each once, {self.past_kind}; given "
                f"{[past.kind for past in pasts]}"
            )
        tokens, told = sum(past.rows for past in pasts), [past.told for past in pasts]
        if any(not 1 <= past.told <= max(past.rows, 1) for past in pasts):
            raise ShapeError(f"told must be 1 to all rows of each past; given {told}")
        x_TD, x_at = piece(x_TD, "embeddings", (tokens, self.shape.dim), FP32, torch.float32)
        cos_TA, cos_at = piece(cos_TA, "cosines", (tokens, half), FP32, torch.float32)
        sin_TA, sin_at = piece(sin_TA, "sines", (tokens, half), FP32, torch.float32)
        structures = (_Past * batch)(*(past.structure for past in pasts))
        sizes = (self.num_layers, tokens, self.shape.top_k)
        logits_NV = torch.empty(sum(told), self.shape.vocab, dtype=torch.float32, device=CPU)
        experts_LTK = torch.empty(sizes, dtype=torch.int64, device=CPU)
        weights_LTK = torch.empty(sizes, dtype=torch.float32, device=CPU)
        call(
            "step", ctypes.byref(self._decoder), batch, x_at, cos_at, sin_at, structures,
            logits_NV.data_ptr(), experts_LTK.data_ptr(), weights_LTK.data_ptr(),
            takes="pasts with every layer put, at places within their room",
            failure=self._failure,
        )  # fmt: skip
        return logits_NV, experts_LTK, weights_LTK


def _check_shape(shape: StepShape, num_layers: int, cache_dtype: torch.dtype) -> None:
    """Refuse numbers that no decoder has."""
    turning = turning_of(shape)
    least = min(shape.dim, shape.heads, shape.groups, turning, shape.vocab, num_layers)
    odd = turning % 2 or turning > shape.head_dim
    if least < 1 or shape.top_k < 0 or shape.heads % shape.groups or odd:
        raise ShapeError(
            f"a decoder has layers, a multiple of groups as heads, and an even number of a head's "
            f"numbers that turn; given {num_layers} layers and {shape}"
        )
    if cache_dtype not in CACHES or (cache_dtype == torch.int8 and shape.head_dim > _WIDEST):
        raise ShapeError(
            f"keys and values are float32 or bfloat16, or int8 of heads no wider than {_WIDEST}; "
            f"given {cache_dtype}, {shape.head_dim} wide"
        )
