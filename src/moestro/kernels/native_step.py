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
FIRST_CAPACITY = 256


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
        ("keys", _POINTER), ("values", _POINTER), ("capacity", _POINTER), ("position", _INT64),
    )  # fmt: skip


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
        self, x_BD: Tensor, cos_BA: Tensor, sin_BA: Tensor, pasts: Sequence[Past]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One new token for each of B sequences, whose pasts grow by it.

        Args:
            x_BD: fp32, the tokens' embeddings.
            cos_BA: fp32 [B, A/2], cosines of their positions.
            sin_BA: fp32 [B, A/2], sines.
            pasts: of the sequences, each its own.

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
        for past in pasts:
            past.make_room()
        structures = (_Past * batch)(*(past.structure() for past in pasts))
        logits_BV = torch.empty(batch, shape.vocab)
        experts_LBK = torch.full((self.num_layers, batch, shape.top_k), -1)
        weights_LBK = torch.zeros(self.num_layers, batch, shape.top_k)
        inputs = [x.float().contiguous() for x in given]
        code = library().moestro_step(
            ctypes.byref(self._decoder), batch, *(_address(x) for x in inputs), structures,
            logits_BV.data_ptr(), experts_LBK.data_ptr(), weights_LBK.data_ptr(),
        )  # fmt: skip
        if code:
            raise ShapeError(f"the native decoder refused its arguments (code {code})")
        for past in pasts:
            past.position += 1
        return logits_BV, experts_LBK, weights_LBK


class Past:
    """Keys and values of one sequence: rings that grow up to each layer's limit.

    Attributes:
        position: of the next token.
    """

    def __init__(self, decoder: StepDecoder, limits: Sequence[int]) -> None:
        """Start empty.

        Args:
            decoder: whose past it is.
            limits: most positions that each layer looks back on, the newest included.
        """
        self.position = 0
        self._limits = list(limits)
        self._sizes = (decoder.shape.groups, decoder.shape.head_dim)
        self._dtype = decoder.cache_dtype
        self._keys = [self._new(min(limit, FIRST_CAPACITY)) for limit in limits]
        self._values = [self._new(min(limit, FIRST_CAPACITY)) for limit in limits]
        self._point()

    def fill(self, layer: int, keys_GPA: Tensor, values_GPA: Tensor, end: int) -> None:
        """Copy the last positions of a layer in, such as those of a prompt.

        Args:
            layer: its number.
            keys_GPA: rotated keys, oldest first.
            values_GPA: values.
            end: the position after the last of them.
        """
        kept = min(keys_GPA.shape[1], self._limits[layer], end)
        self._grow(layer, end + 1)
        slots = torch.arange(end - kept, end) % len(self._keys[layer])
        for ring, new_GPA in ((self._keys, keys_GPA), (self._values, values_GPA)):
            ring[layer][slots] = new_GPA[:, -kept:].transpose(0, 1).to(self._dtype)
        self.position = end
        self._point()

    def make_room(self) -> None:
        """Grow the rings that the next position would close too early."""
        if all(
            self.position < len(keys) or len(keys) == limit
            for keys, limit in zip(self._keys, self._limits, strict=True)
        ):
            return
        for layer in range(len(self._limits)):
            self._grow(layer, self.position + 1)
        self._point()

    def structure(self) -> _Past:
        """What the native library reads."""
        return _Past(*self._addresses, self.position)

    def _new(self, capacity: int) -> Tensor:
        return torch.zeros(capacity, *self._sizes, dtype=self._dtype)

    def _grow(self, layer: int, positions: int) -> None:
        """Room for `positions` in one layer, by doubling; a ring at its limit stays."""
        old = len(self._keys[layer])
        capacity = old
        while capacity < positions:
            capacity *= 2
        capacity = min(capacity, self._limits[layer])
        if capacity == old:
            return
        # Nothing has been overwritten yet, so slot and position are still the same.
        for ring in (self._keys, self._values):
            larger = self._new(capacity)
            larger[:old] = ring[layer]
            ring[layer] = larger

    def _point(self) -> None:
        count = len(self._limits)
        self._arrays = (
            (_POINTER * count)(*(each.data_ptr() for each in self._keys)),
            (_POINTER * count)(*(each.data_ptr() for each in self._values)),
            (_INT64 * count)(*(len(each) for each in self._keys)),
        )
        self._addresses = tuple(ctypes.cast(array, _POINTER) for array in self._arrays)


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
