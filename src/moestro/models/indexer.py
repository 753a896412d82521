"""Which positions a token of latent attention attends to, where that is only some of them.

DeepSeek-V3.2 (2025), §2.1. Letters: B batch, S new positions, Q of them in a block, P positions to
choose from, D width, H heads of the indexer, R width of the queries' vector, A width of a head.
"""

from __future__ import annotations

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
        self,
        x_BSD: Tensor,
        q_BSR: Tensor,
        angles: Rotary,
        keys_BPA: Tensor,
        window: int,
        valid_BP: Tensor | None = None,
    ) -> Tensor | None:
        """The positions that each of the last S may attend to.

        Args:
            x_BSD: normalised hidden states.
            q_BSR: the queries' vector after its norm.
            angles: of the S positions.
            keys_BPA: of all positions, their own the last.
            window: positions that a token could attend to, its own included.
            valid_BP: as attention takes it.

        Returns:
            bool [B, S, P], later positions among them; None: all, being no more than `top_k`.
        """
        length, span = x_BSD.shape[1], keys_BPA.shape[1]
        if span <= self.cfg.top_k:
            return None
        q_BSHA = self._turned(self.q(q_BSR).unflatten(-1, (self.cfg.num_heads, -1)), angles)
        wide = torch.promote_types(q_BSHA.dtype, torch.float32)
        weights_BSH = self.weights(x_BSD).to(wide) * self.cfg.num_heads**-0.5
        keys_BAP = keys_BPA.to(wide).mT
        parts = []
        for start in range(0, length, attention.ROWS):
            rows = slice(start, min(start + attention.ROWS, length))
            own = range(span - length + rows.start, span - length + rows.stop)
            seen = attention.visible(own, range(span), window, valid_BP, x_BSD.device)
            scores_BQP = keys_BAP.new_zeros(len(x_BSD), len(own), span)
            for head in range(self.cfg.num_heads):
                q_BQA = q_BSHA[:, rows, head].to(wide)
                products_BQP = (q_BQA @ keys_BAP * self.cfg.head_dim**-0.5).relu_()
                scores_BQP.addcmul_(products_BQP, weights_BSH[:, rows, head, None])
            seen = seen if seen.dim() == 2 else seen[:, 0]
            best = scores_BQP.masked_fill_(~seen, -torch.inf).topk(self.cfg.top_k).indices
            parts.append(torch.zeros_like(scores_BQP, dtype=torch.bool).scatter_(-1, best, True))
        return torch.cat(parts, dim=1)

    def _turned(self, x_BSHA: Tensor, angles: Rotary) -> Tensor:
        """The first numbers of each head turned."""
        rest = x_BSHA.shape[-1] - self.turning
        turning, still = x_BSHA.split_with_sizes([self.turning, rest], dim=-1)
        return torch.cat([pointwise.rotate(turning, *angles), still], dim=-1)
