"""Which positions a token of latent attention attends to, where that is only some of them.

DeepSeek-V3.2 (2025), §2.1. Letters: B batch, S new positions, Q of them in a block, P positions to
choose from, D width, H heads of the indexer, R width of the queries' vector, A width of a head.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from moestro.config import LatentConfig
from moestro.kernels import attention, pointwise
from moestro.models.linear import PlainLinear
from moestro.models.norms import LayerNorm
from moestro.models.rotary import Rotary

NORM_EPS = 1e-6


class Indexer(nn.Module):
    """The best `top_k` positions of each token, by Σ_h w_h · relu(q_h · k).

    It takes no gradients: in the paper it learns by an objective of its own, which this project
    does not have. So its parameters stay as they are, and are neither packed nor adapted.

    Args:
        dim: D.
        latent: of the attention; its indexer is set.
    """

    def __init__(self, dim: int, latent: LatentConfig) -> None:
        super().__init__()
        cfg = latent.indexer
        assert cfg is not None
        assert latent.q_rank is not None
        self.cfg, self.turning = cfg, latent.rope_dim
        self.q = PlainLinear(latent.q_rank, cfg.num_heads * cfg.head_dim)
        self.k = PlainLinear(dim, cfg.head_dim)
        self.k_norm = LayerNorm(cfg.head_dim, NORM_EPS)
        self.weights = PlainLinear(dim, cfg.num_heads)
        self.requires_grad_(False)

    @torch.no_grad()
    def keys(self, x_BSD: Tensor, angles: Rotary) -> Tensor:
        """What later positions score these by: [B, S, A]."""
        keys_BS1A = self.k_norm(self.k(x_BSD))[:, :, None]
        return self._turned(keys_BS1A, angles)[:, :, 0]

    @torch.no_grad()
    def forward(
        self, x_BSD: Tensor, q_BSR: Tensor, angles: Rotary, keys_BPA: Tensor
    ) -> attention.Choose | None:
        """What marks, of the keys that a block of queries sees, the best `top_k` of each query.

        Of equal scores the nearest position's counts more, so neither the cut of a text nor its
        later tokens change what is chosen; 0, where all heads' products are negative, is common.

        Args:
            x_BSD: normalised hidden states of the last S positions.
            q_BSR: the queries' vector after its norm.
            angles: of the S positions.
            keys_BPA: of all positions, their own the last.

        Returns:
            for `attention.attend`; None: all, being no more than `top_k`.
        """
        if keys_BPA.shape[1] <= self.cfg.top_k:
            return None
        q_BSHA = self._turned(self.q(q_BSR).unflatten(-1, (self.cfg.num_heads, -1)), angles)
        wide = torch.promote_types(q_BSHA.dtype, torch.float32)
        weights_BSH = self.weights(x_BSD).to(wide) * self.cfg.num_heads**-0.5
        return partial(self._best, q_BSHA, weights_BSH, keys_BPA.to(wide).mT)

    @torch.no_grad()
    def _best(
        self,
        q_BSHA: Tensor,
        weights_BSH: Tensor,
        keys_BAP: Tensor,
        own: range,
        keys: range,
        seen: Tensor,
    ) -> Tensor:
        """`attention.Choose`."""
        if len(keys) <= self.cfg.top_k:
            return seen
        first = keys_BAP.shape[2] - q_BSHA.shape[1]
        rows = slice(own.start - first, own.stop - first)
        keys_BAP = keys_BAP[..., keys.start : keys.stop]
        scores_BQP = keys_BAP.new_zeros(len(keys_BAP), len(own), len(keys))
        for head in range(self.cfg.num_heads):
            q_BQA = q_BSHA[:, rows, head].to(keys_BAP.dtype) * self.cfg.head_dim**-0.5
            products_BQP = (q_BQA @ keys_BAP).relu_()
            scores_BQP.addcmul_(products_BQP, weights_BSH[:, rows, head, None])
        scores_BQP.masked_fill_(~(seen if seen.dim() == 2 else seen[:, 0]), -torch.inf)
        return seen & nearest_best(scores_BQP, self.cfg.top_k)[:, None]

    def _turned(self, x_BSHA: Tensor, angles: Rotary) -> Tensor:
        """The first numbers of each head turned."""
        rest = x_BSHA.shape[-1] - self.turning
        turning, still = x_BSHA.split_with_sizes([self.turning, rest], dim=-1)
        return torch.cat([pointwise.rotate(turning, *angles), still], dim=-1)


def nearest_best(scores_BQP: Tensor, top_k: int) -> Tensor:
    """bool, the `top_k` largest of each row, of equal ones the last; all that are NaN."""
    least_BQ1 = scores_BQP.topk(top_k).values[..., -1:]
    best_BQP, tied_BQP = ~(scores_BQP < least_BQ1), scores_BQP == least_BQ1
    too_many_BQ1 = best_BQP.sum(-1, keepdim=True) - top_k
    early_BQP = tied_BQP.cumsum(-1, dtype=torch.int32) <= too_many_BQ1
    return best_BQP & ~(tied_BQP & early_BQP)
