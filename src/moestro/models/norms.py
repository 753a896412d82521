"""The norms before each sublayer, of queries and keys, and at the end."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moestro.config import NormConfig
from moestro.kernels import pointwise
from moestro.moe.mixing import compute_dtype


class RMSNorm(nn.Module):
    """Root-mean-square norm; computes in fp32 and returns the dtype that the next layer takes.

    Args:
        dim: D.
        eps: added to the mean square.
        zero_centred: gains are 1 + weight. 16 bits hold small weights more exactly than gains near
            1, so these are never stored.
    """

    def __init__(self, dim: int, eps: float, zero_centred: bool = False) -> None:
        super().__init__()
        self.eps, self.zero_centred = eps, zero_centred
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gains of 1."""
        nn.init.constant_(self.weight, 0.0 if self.zero_centred else 1.0)

    def gain(self) -> Tensor:
        """What the normalised numbers are multiplied by, [D]; zero-centred in at least fp32."""
        if not self.zero_centred:
            return self.weight
        return 1 + self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))

    def forward(self, x_TD: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        return pointwise.rms_norm(x_TD, self.gain(), self.eps, compute_dtype(x_TD))


class LayerNorm(nn.Module):
    """Layer norm with a bias (Ba et al. 2016); dtypes as `RMSNorm`."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gains of 1, no shift."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        # torch takes mean and variance of 16-bit numbers in fp32, but wants all of one dtype.
        dtype = torch.promote_types(x_TD.dtype, self.weight.dtype)
        weight_D, bias_D = self.weight.to(dtype), self.bias.to(dtype)
        y_TD = F.layer_norm(x_TD.to(dtype), weight_D.shape, weight_D, bias_D, self.eps)
        return y_TD.to(compute_dtype(x_TD))


def norm_of(cfg: NormConfig, dim: int) -> RMSNorm | LayerNorm:
    """The norm that the settings ask for, of width D = `dim`."""
    return LayerNorm(dim, cfg.eps) if cfg.kind == "layer" else rms_norm_of(cfg, dim)


def rms_norm_of(cfg: NormConfig, dim: int) -> RMSNorm:
    """RMSNorm whatever the kind, as for queries and keys."""
    return RMSNorm(dim, cfg.eps, cfg.zero_centred)
