"""Stacked expert weights, and the plain feed-forward network that is a mixture of one.

`gate_up [E, 2F, D]` (gated: gate rows first, then up) or `[E, F, D]` (plain), `down [E, D, F]`;
where there are biases, `gate_up_bias [E, 2F]` or `[E, F]`, and `down_bias [E, D]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moestro.kernels import backends, reference
from moestro.kernels.reference import Biases

# Most rows that are multiplied expert by expert instead of being grouped, without gradients.
FEW_ROWS = 16


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: autocast's where it is on, else the tensor's own."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


class Experts(nn.Module):
    """E feed-forward networks with stacked weights.

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
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal at two σ, σ = sqrt(s / fan-in) (Fedus et al. 2021, §2.4)."""
        for weight, scale in ((self.gate_up, 1.0), (self.down, self.out_scale)):
            std = scale * math.sqrt(self.init_scale / weight.shape[-1])
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        for bias in self.biases or ():
            nn.init.zeros_(bias)

    @property
    def biases(self) -> Biases | None:
        """Both biases, where the experts have them."""
        if self.gate_up_bias is None or self.down_bias is None:
            return None
        return Biases(self.gate_up_bias, self.down_bias)

    def kernel(self, device: str, dtype: torch.dtype) -> backends.Backend:
        """The backend that computes this layer on `device` in `dtype`."""
        widths = (self.gate_up.shape[2], self.gate_up.shape[1], self.down.shape[2])
        return backends.choose(self.backend, device, dtype, widths)

    def forward(
        self, rows_RD: Tensor, offsets_E: Tensor, experts_E: Tensor | None = None
    ) -> Tensor:
        """Run each row through its expert.

        Args:
            rows_RD: rows grouped by expert, in the dtype to compute in.
            offsets_E: int64, end of each group.
            experts_E: int64, expert of each group; None: group e is expert e's.

        Returns:
            [R, D] in the rows' dtype.
        """
        kernel = self.kernel(rows_RD.device.type, rows_RD.dtype)
        biases = self.biases
        if not (self.training and self.dropout):
            weights = (self.gate_up, self.down, offsets_E, self.activation, experts_E, biases)
            return kernel.expert_ffn(rows_RD, *weights)
        up_EH, down_ED = biases or (None, None)
        hidden_RH = kernel.grouped_mm(rows_RD, self.gate_up, offsets_E, experts_E, up_EH)
        act_RF = F.dropout(reference.activate(hidden_RH, self.activation), self.dropout)
        return kernel.grouped_mm(act_RF, self.down, offsets_E, experts_E, down_ED)

    def single(self, rows: int, like: Tensor) -> Callable[[Tensor, int], Tensor] | None:
        """One expert as a function: (rows [P, D], its number) → [P, D], without gradients.

        For generating text, where so few rows are multiplied that grouping them costs more.

        Args:
            rows: how many there are for all experts together.
            like: their device and dtype.

        Returns:
            None where grouping is better or needed: many rows, gradients, dropout, a kernel that
            has no such function.
        """
        dropping = self.training and self.dropout > 0
        if rows > FEW_ROWS or dropping or torch.is_grad_enabled():
            return None
        single_ffn = self.kernel(like.device.type, like.dtype).single_ffn
        if single_ffn is None:
            return None
        weights = (self.gate_up, self.down, self.activation, self.biases)
        return lambda rows_PD, expert: single_ffn(rows_PD, expert, *weights)

    def extra_repr(self) -> str:
        """Shapes, for print(model)."""
        num_experts, dim, hidden_dim = self.down.shape
        return f"{num_experts} × ({dim} → {hidden_dim} → {dim}), {self.activation}"


class FeedForward(Experts):
    """A dense feed-forward network: one expert that takes every row, by the same kernels."""

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
            1,
            dim,
            hidden_dim,
            activation,
            init_scale=init_scale,
            backend=backend,
            out_scale=out_scale,
        )

    def forward(
        self, x_TD: Tensor, offsets_E: Tensor | None = None, experts_E: Tensor | None = None
    ) -> Tensor:
        """[T, D] to [T, D]; there is one group, so neither offsets nor experts are needed."""
        x_TD = x_TD.to(compute_dtype(x_TD))
        single = self.single(len(x_TD), x_TD)
        if single is not None:
            return single(x_TD, 0)
        all_rows_E = torch.tensor([len(x_TD)], dtype=torch.int64, device=x_TD.device)
        return super().forward(x_TD, all_rows_E)
