"""Experts as modules, and the plain feed-forward network that is a mixture of one.

`gate_up [E, 2F, D]` (gated: gate rows first, then up) or `[E, F, D]` (plain), `down [E, D, F]`;
where there are biases, `gate_up_bias [E, 2F]` or `[E, F]`, and `down_bias [E, D]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moestro.errors import ShapeError
from moestro.kernels import native_cpu, packing, reference
from moestro.kernels.packing import Format, StoredRows
from moestro.kernels.reference import Biases
from moestro.moe import mixing
from moestro.moe.lora import Adapter, Adapters
from moestro.moe.mixing import ExpertWeights, compute_dtype
from moestro.moe.noise import Drop
from moestro.moe.packed import PackedExperts, PackedFeedForward, PackedStack
from moestro.moe.routing import Routing

P = ParamSpec("P")
Y = TypeVar("Y")


class StackedWeights(nn.Module):
    """The parameters of E feed-forward networks: what `Experts` and `FeedForward` share.

    Args:
        num_experts: E.
        dim: D.
        hidden_dim: F.
        activation: swiglu, geglu, clamped_swiglu (gated), relu or gelu (plain).
        dropout: probability of zeroing an expert's hidden units in training
            ("expert dropout", Fedus et al. 2021, §4.2).
        init_scale: s; weights start truncated normal with σ = sqrt(s / fan-in).
        backend: a kernel's name, or "auto"; see `moestro.kernels.backends`.
        bias: whether both projections have one; they start at zero.
        out_scale: of the σ of `down`.
    """

    packed: type[PackedStack]  # what it becomes
    gate_up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        activation: str = "swiglu",
        dropout: float = 0.0,
        init_scale: float = 1.0,
        backend: str = "auto",
        bias: bool = False,
        out_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.activation, self.dropout = activation, dropout
        self.init_scale, self.out_scale, self.backend = init_scale, out_scale, backend
        width = 2 * hidden_dim if activation in reference.GATED else hidden_dim
        self.gate_up = nn.Parameter(torch.empty(num_experts, width, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.gate_up_bias = self.down_bias = None
        if bias:
            self.gate_up_bias = nn.Parameter(torch.empty(num_experts, width))
            self.down_bias = nn.Parameter(torch.empty(num_experts, dim))
        self.gate_up_adapter: Adapter | None = None
        self.down_adapter: Adapter | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal at two σ, σ = sqrt(s / fan-in) (Fedus et al. 2021, §2.4).

        One expert after the other, so that a rank can draw some of them (`moestro.moe.parallel`).
        """
        for weight, std in self.spreads():
            for matrix in () if weight.is_meta else self.in_turn(weight):
                nn.init.trunc_normal_(matrix, std=std, a=-2 * std, b=2 * std)
        for bias in self.biases or ():
            nn.init.zeros_(bias)

    def in_turn(self, weight: Tensor) -> Iterable[Tensor]:
        """The experts' matrices in the order in which they are drawn."""
        return weight

    def spreads(self) -> list[tuple[nn.Parameter, float]]:
        """The matrices, with the σ that each begins with."""
        scales = ((self.gate_up, 1.0), (self.down, self.out_scale))
        return [(w, scale * math.sqrt(self.init_scale / w.shape[-1])) for w, scale in scales]

    @property
    def biases(self) -> Biases | None:
        """Both biases, where the experts have them."""
        if self.gate_up_bias is None or self.down_bias is None:
            return None
        return Biases(self.gate_up_bias, self.down_bias)

    def values(self) -> ExpertWeights:
        """The weights, for `moestro.moe.mixing`."""
        found = Adapters(self.gate_up_adapter, self.down_adapter)
        adapters = found if any(each is not None for each in found) else None
        return ExpertWeights(
            self.gate_up, self.down, self.activation, self.biases, adapters=adapters
        )

    def to_packed(self, format: Format, stored: StoredRows | None = None) -> PackedStack:
        """The same with packed weights; see `moestro.moe.packed.Packable`."""
        how = (self.activation, format, *(self.biases or ()))
        if stored is None and self.down.is_meta:
            return self.packed(packing.blank_experts(self.down, *how))
        pack = partial(native_cpu.pack_experts, stored=stored)
        return self.packed(pack(self.gate_up, self.down, *how))

    def native(self) -> packing.ExpertSlabs:
        """The weights as the native kernels read them, not copied."""
        weights = (self.gate_up, self.down, self.activation)
        return native_cpu.plain_experts(*weights, *(self.biases or ()))

    def extra_repr(self) -> str:
        """Shapes, for print(model)."""
        num_experts, dim, hidden_dim = self.down.shape
        return f"{num_experts} × ({dim} → {hidden_dim} → {dim}), {self.activation}"


class Experts(StackedWeights):
    """E feed-forward networks, whose `forward` is the mixing."""

    packed = PackedExperts
    first = 0  # the number of the expert in row 0 of the weights

    def forward(self, x_TD: Tensor, routing: Routing, noise_T: Tensor | None = None) -> Tensor:
        """Each token through its experts, and the weighted sum of what they return.

        Args:
            x_TD: tokens.
            routing: who goes where.
            noise_T: int64 keys of the tokens, of which dropout is a function
                (`moestro.moe.noise`); None: it is drawn by torch's generator.

        Raises:
            ShapeError: the tokens are not of the weights' dtype, and autocast is off.
        """
        if x_TD.dtype != self.down.dtype and not torch.is_autocast_enabled(x_TD.device.type):
            raise ShapeError(
                f"x is {x_TD.dtype} but the experts are {self.down.dtype}; convert one of them, "
                "or run under torch.autocast"
            )
        weights = self.values()
        if self.training and self.dropout:
            if noise_T is None:
                weights = weights._replace(activation=self._activate_and_drop)
            else:
                weights = weights._replace(drop=Drop(self.dropout, noise_T, self.first))
        return hidden_from_compiler(mixing.mix)(
            x_TD.to(compute_dtype(x_TD)), routing, weights, self.backend
        )

    def _activate_and_drop(self, hidden_RH: Tensor) -> Tensor:
        return F.dropout(reference.activate(hidden_RH, self.activation), self.dropout)


class FeedForward(StackedWeights):
    """A dense feed-forward network: one expert that takes every row, by the same kernels."""

    packed = PackedFeedForward

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: str = "swiglu",
        init_scale: float = 1.0,
        backend: str = "auto",
        out_scale: float = 1.0,
    ) -> None:
        super().__init__(
            1, dim, hidden_dim, activation, 0.0, init_scale, backend, out_scale=out_scale
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] → [T, D] in the dtype computed in."""
        return hidden_from_compiler(mixing.dense)(
            x_TD.to(compute_dtype(x_TD)), self.values(), self.backend
        )


def hidden_from_compiler(function: Callable[P, Y]) -> Callable[P, Y]:
    """The function, kept out of what is being compiled; see `moestro.moe.mixing`."""
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function
