"""Grouped-query attention with rotary positions and a rolling key/value cache.

Letters: B batch, S new positions, P positions attended to, D width, H heads, G key/value heads,
A width of one head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moestro.config import ModelConfig
from moestro.kernels import attention, pointwise
from moestro.moe.experts import compute_dtype


class Rotary(NamedTuple):
    """Cosines and sines of S positions, [S, A/2], for `pointwise.rotate`."""

    cos_SA: Tensor
    sin_SA: Tensor


def rotary(start: int, length: int, cfg: ModelConfig, device: torch.device) -> Rotary:
    """Angles position · θ^(-2i/A) of positions start … start+length-1 (Su et al. 2021, eq. 15)."""
    share_A = torch.arange(0, cfg.head_dim, 2, device=device, dtype=torch.float64) / cfg.head_dim
    positions_S = torch.arange(start, start + length, device=device, dtype=torch.float64)
    angles_SA = positions_S[:, None] * cfg.attention.positions.theta**-share_A
    return Rotary(angles_SA.cos().float(), angles_SA.sin().float())


class RMSNorm(nn.Module):
    """Root-mean-square norm; computes in fp32 and returns the dtype that the next layer takes."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_TD: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        return pointwise.rms_norm(x_TD, self.weight, self.eps, compute_dtype(x_TD))


class LayerCache:
    """Keys and values of one layer's last `context` positions; memory stays bounded."""

    def __init__(self, context: int) -> None:
        self.context = context
        self.keys_BPGA: Tensor | None = None
        self.values_BPGA: Tensor | None = None

    def extend(self, keys_BSGA: Tensor, values_BSGA: Tensor) -> tuple[Tensor, Tensor]:
        """Append S positions; returns all that the new ones may look at, oldest first."""
        if self.keys_BPGA is not None and self.values_BPGA is not None:
            keys_BSGA = torch.cat([self.keys_BPGA, keys_BSGA], dim=1)
            values_BSGA = torch.cat([self.values_BPGA, values_BSGA], dim=1)
        # A copy: a view would keep the whole prompt alive.
        self.keys_BPGA = keys_BSGA[:, -self.context :].clone()
        self.values_BPGA = values_BSGA[:, -self.context :].clone()
        return keys_BSGA, values_BSGA


class KVCache:
    """One `LayerCache` per layer, and how many positions have passed."""

    def __init__(self, num_layers: int, context: int) -> None:
        self.layers = [LayerCache(context) for _ in range(num_layers)]
        self.position = 0


class Attention(nn.Module):
    """Causal self-attention over the last `context` positions."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = cfg.attention.num_heads, cfg.num_kv_heads
        self.head_dim, self.context = cfg.head_dim, cfg.attention.context
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = nn.Linear(cfg.dim, width, bias=False)
        self.out = nn.Linear(self.num_heads * self.head_dim, cfg.dim, bias=False)
        self.q_norm = self.k_norm = None
        if cfg.attention.qk_norm == "head":
            self.q_norm = RMSNorm(self.head_dim, cfg.norm.eps)
            self.k_norm = RMSNorm(self.head_dim, cfg.norm.eps)

    def forward(
        self,
        x_BSD: Tensor,
        angles: Rotary,
        valid_BS: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend. [B, S, D] → [B, S, D].

        Args:
            x_BSD: normalised hidden states.
            angles: of the S new positions.
            valid_BS: bool, False for padding keys; not together with a cache.
            cache: keys and values of earlier positions; extended in place.
        """
        batch, length, _ = x_BSD.shape
        heads, groups = self.num_heads, self.num_kv_heads
        qkv = self.qkv(x_BSD).view(batch, length, heads + 2 * groups, self.head_dim)
        qk, v_BSGA = torch.split(qkv, [heads + groups, groups], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHA, k_BSGA = torch.split(qk, [heads, groups], dim=2)
            qk = torch.cat([self.q_norm(q_BSHA), self.k_norm(k_BSGA)], dim=2)
        turned = pointwise.rotate(qk, *angles)
        q_BSHA, k_BSGA = torch.split(turned, [heads, groups], dim=2)
        if cache is not None:
            k_BSGA, v_BSGA = cache.extend(k_BSGA, v_BSGA)
        q_BHSA, k_BGSA, v_BGSA = (x.transpose(1, 2) for x in (q_BSHA, k_BSGA, v_BSGA))
        mask = self._mask(length, k_BSGA.shape[1], valid_BS, x_BSD.device)
        if mask is None:
            y_BHSA = attention.causal(q_BHSA, k_BGSA, v_BGSA)
        else:
            y_BHSA = F.scaled_dot_product_attention(
                q_BHSA, k_BGSA, v_BGSA, attn_mask=mask, enable_gqa=groups != heads
            )
        out: Tensor = self.out(y_BHSA.transpose(1, 2).reshape(batch, length, -1))
        return out

    def _mask(
        self, length: int, span: int, valid_BS: Tensor | None, device: torch.device
    ) -> Tensor | None:
        """Which of `span` positions each of the last `length` sees; None for plain causal."""
        if valid_BS is None and length == span <= self.context:
            return None
        query_S = torch.arange(span - length, span, device=device)
        distance_SP = query_S[:, None] - torch.arange(span, device=device)
        seen_SP = (distance_SP >= 0) & (distance_SP < self.context)
        if valid_BS is None:
            return seen_SP
        # A padding query still sees itself: a row without any key would be NaN.
        seen_BSP = (seen_SP & valid_BS[:, None, :]) | (distance_SP == 0)
        return seen_BSP[:, None]
