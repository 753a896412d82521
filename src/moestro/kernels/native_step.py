"""One token through a whole decoder in one native call: the C structures of `moestro_step`.

What bounds decoding is reading the weights, so nothing else may take time between them. The Python
forward of `models.decoder` is the definition; `infer.native_decoder` decides which models fit.

Letters: L layers, B sequences, D width, H heads, G key/value heads, A head width, V vocabulary,
K experts per token, P positions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moestro.errors import ShapeError
from moestro.kernels.native_cpu import experts_of, matrix_of
from moestro.kernels.native_library import Experts, Matrix, library
from moestro.kernels.packing import PackedExperts, PackedMatrix

_INT32, _INT64, _FLOAT, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
CACHE_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class StepLayer(NamedTuple):
    """One layer. All plain tensors are fp32 and contiguous; None where the layer has none.

    Attributes:
        attention_norm: [D] gain of the RMSNorm before attention.
        ffn_norm: [D] gain of the one before the feed-forward network.
        qkv: [(H + 2G)·A, D].
        out: [D, H·A].
        experts: the routed experts; of a dense layer its network as a single one.
        router: [E, D]; None for a dense layer.
        window: positions seen, the token's own included; 0: all that are kept.
        qkv_bias: [(H + 2G)·A].
        out_bias: [D].
        q_norm: [A] gain of each query head's RMSNorm.
        k_norm: [A] of each key head's.
        sinks: [H].
        logit_bias: [E] added to the logits.
        selection_bias: [E] added to the scores when choosing.
        shared: the shared expert, as a single one.
        shared_gate: [D].
    """

    attention_norm: Tensor
    ffn_norm: Tensor
    qkv: PackedMatrix
    out: PackedMatrix
    experts: PackedExperts
    router: Tensor | None = None
    window: int = 0
    qkv_bias: Tensor | None = None
    out_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    sinks: Tensor | None = None
    logit_bias: Tensor | None = None
    selection_bias: Tensor | None = None
    shared: PackedExperts | None = None
    shared_gate: Tensor | None = None


class StepShape(NamedTuple):
    """Numbers that all layers share.

    Attributes:
        dim: D.
        heads: H.
        groups: G.
        head_dim: A.
        vocab: V.
        top_k: K; 0 for a model without mixtures.
        sigmoid: scores are sigmoids instead of a softmax.
        renormalize: the K weights are divided by their sum.
        router_scale: every weight is multiplied by it.
        eps: of the norms.
        score_scale: of the attention scores.
        head_scale: of the last hidden state.
    """

    dim: int
    heads: int
    groups: int
    head_dim: int
    vocab: int
    top_k: int
    sigmoid: bool = False
    renormalize: bool = True
    router_scale: float = 1.0
    eps: float = 1e-6
    score_scale: float = 1.0
    head_scale: float = 1.0


class _Layer(ctypes.Structure):
    """`moestro_layer`."""

    _fields_ = (
        ("attention_norm", _POINTER), ("ffn_norm", _POINTER), ("qkv", Matrix), ("out", Matrix),
        ("qkv_bias", _POINTER), ("out_bias", _POINTER), ("q_norm", _POINTER), ("k_norm", _POINTER),
        ("sinks", _POINTER), ("window", _INT64), ("router", _POINTER), ("logit_bias", _POINTER),
        ("selection_bias", _POINTER), ("experts", Experts), ("shared", Experts),
        ("shared_gate", _POINTER),
    )  # fmt: skip


class _Decoder(ctypes.Structure):
    """`moestro_decoder`."""

    _fields_ = (
        ("layers", _INT64), ("dim", _INT64), ("heads", _INT64), ("groups", _INT64),
        ("head_dim", _INT64), ("vocab", _INT64), ("top_k", _INT32), ("sigmoid", _INT32),
        ("renormalize", _INT32), ("cache_dtype", _INT32), ("router_scale", _FLOAT),
        ("eps", _FLOAT), ("score_scale", _FLOAT), ("head_scale", _FLOAT), ("layer", _POINTER),
        ("norm", _POINTER), ("head", Matrix), ("head_bias", _POINTER),
    )  # fmt: skip


class _Past(ctypes.Structure):
    """`moestro_past`."""

    _fields_ = (
        ("keys", _POINTER), ("values", _POINTER), ("room", _POINTER), ("place", _POINTER),
        ("kept", _POINTER),
    )  # fmt: skip


class StepPast:
    """Where one sequence's keys and values are, and where the step writes those of its new token.

    Attributes:
        structure: what the native library reads.
        buffers: of each layer, as it was put.
    """

    def __init__(self, decoder: StepDecoder) -> None:
        """Of no layer yet.

        Args:
            decoder: whose past it is.
        """
        count, shape = decoder.num_layers, decoder.shape
        self._sizes, self._dtype = (1, shape.groups, shape.head_dim), decoder.cache_dtype
        self.buffers: list[tuple[Tensor, ...] | None] = [None] * count
        self._keys, self._values = (_POINTER * count)(), (_POINTER * count)()
        self._rooms, self._places = (_INT64 * count)(), (_INT64 * count)()
        self._kept = (_INT64 * count)()
        self._arrays = (self._keys, self._values, self._rooms, self._places, self._kept)
        self.structure = _Past(*(ctypes.cast(array, _POINTER) for array in self._arrays))

    def put(self, layer: int, buffers: tuple[Tensor, ...], place: int, kept: int) -> None:
        """Say where a layer's keys and values are, before each step.

        Args:
            layer: its number.
            buffers: keys and values [1, G, P, A], consecutive positions side by side.
            place: of the new token in P.
            kept: positions before it that it may see.

        Raises:
            ShapeError: they are not of the decoder's shape and cache dtype, or not contiguous.
        """
        if buffers is not self.buffers[layer]:
            for each in buffers:
                fits = (*each.shape[:2], each.shape[-1]) == self._sizes and each.dim() == 4
                if not fits or each.dtype != self._dtype or not each.is_contiguous():
                    groups, head_dim = self._sizes[1:]
                    raise ShapeError(
                        f"the native decoder takes keys and values [1, {groups}, P, {head_dim}], "
                        f"contiguous, in {self._dtype}; given {list(each.shape)} in {each.dtype}"
                    )
            keys, values = buffers
            self._keys[layer], self._values[layer] = keys.data_ptr(), values.data_ptr()
            self._rooms[layer] = min(keys.shape[2], values.shape[2])
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
    ) -> None:
        """Point at the weights.

        Args:
            layers: first to last.
            shape: see there.
            norm: fp32 [D], gain of the last RMSNorm.
            head: [V, D].
            head_bias: fp32 [V].
            cache_dtype: of keys and values, fp32 or bf16.

        Raises:
            ShapeError: a tensor is not fp32 and contiguous on CPU.
        """
        self.shape, self.cache_dtype = shape, cache_dtype
        self.num_layers = len(layers)
        self._alive = (list(layers), norm, head, head_bias)
        self._layers = (_Layer * len(layers))(*map(_layer, layers))
        self._decoder = _Decoder(
            len(layers), shape.dim, shape.heads, shape.groups, shape.head_dim, shape.vocab,
            shape.top_k, shape.sigmoid, shape.renormalize, CACHE_DTYPES[cache_dtype],
            shape.router_scale, shape.eps, shape.score_scale, shape.head_scale,
            ctypes.cast(self._layers, _POINTER), _address(norm), matrix_of(head),
            _address(head_bias),
        )  # fmt: skip

    def step(
        self, x_BD: Tensor, cos_BA: Tensor, sin_BA: Tensor, pasts: Sequence[StepPast]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One new token for each of B sequences; its key and value are written into their pasts.

        Args:
            x_BD: fp32, the tokens' embeddings.
            cos_BA: fp32 [B, A/2], cosines of their positions.
            sin_BA: fp32 [B, A/2], sines.
            pasts: of the sequences, each its own; every layer of them must be `put`.

        Returns:
            (logits fp32 [B, V], experts int64 [L, B, K], weights fp32 [L, B, K]; those of dense
            layers are -1 and 0).

        Raises:
            ShapeError: shapes do not fit.
        """
        batch, shape = len(pasts), self.shape
        sizes = ((batch, shape.dim), (batch, shape.head_dim // 2), (batch, shape.head_dim // 2))
        given = (x_BD, cos_BA, sin_BA)
        if any(tuple(x.shape) != size for x, size in zip(given, sizes, strict=True)):
            raise ShapeError(f"a step takes {sizes}; given {[tuple(x.shape) for x in given]}")
        structures = (_Past * batch)(*(past.structure for past in pasts))
        logits_BV = torch.empty(batch, shape.vocab, dtype=torch.float32, device="cpu")
        choices = (self.num_layers, batch, shape.top_k)
        experts_LBK = torch.full(choices, -1, dtype=torch.int64, device="cpu")
        weights_LBK = torch.zeros(choices, dtype=torch.float32, device="cpu")
        inputs = [x.float().contiguous() for x in given]
        code = library().moestro_step(
            ctypes.byref(self._decoder), batch, *(_address(x) for x in inputs), structures,
            logits_BV.data_ptr(), experts_LBK.data_ptr(), weights_LBK.data_ptr(),
        )  # fmt: skip
        if code:
            raise ShapeError(f"the native decoder refused its arguments (code {code})")
        return logits_BV, experts_LBK, weights_LBK


def _layer(layer: StepLayer) -> _Layer:
    shared = Experts() if layer.shared is None else experts_of(layer.shared)
    return _Layer(
        _address(layer.attention_norm), _address(layer.ffn_norm), matrix_of(layer.qkv),
        matrix_of(layer.out), _address(layer.qkv_bias), _address(layer.out_bias),
        _address(layer.q_norm), _address(layer.k_norm), _address(layer.sinks), layer.window,
        _address(layer.router), _address(layer.logit_bias), _address(layer.selection_bias),
        experts_of(layer.experts), shared, _address(layer.shared_gate),
    )  # fmt: skip


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ShapeError(
            f"the native decoder takes fp32 tensors, contiguous and on CPU; given {tensor.dtype} "
            f"{list(tensor.shape)} on {tensor.device}"
        )
    return tensor.data_ptr()
