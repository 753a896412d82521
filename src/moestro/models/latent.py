"""Multi-head latent attention: keys and values of all heads come from one small vector per token.

DeepSeek-V2 (2024), §2.1. Letters: B batch, S new positions, P positions attended to, D width,
H heads, R width of the latent vector, N and A widths of a head without and with positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.config import NetworkConfig, RopeConfig
from moestro.kernels import attention, pointwise
from moestro.models.cache import LayerCache
from moestro.models.indexer import Indexer
from moestro.models.linear import Linear, PlainLinear
from moestro.models.norms import RMSNorm
from moestro.models.rotary import Rotary, score_scale

# The latent vectors' norms have their own, whatever the model's is.
NORM_EPS = 1e-6


class LatentAttention(nn.Module):
    """Causal latent attention over the last `context` positions, or those of them chosen.

    The cache keeps R + A numbers per position: the latent vector after its norm, and the rotated
    part of the keys, which all heads share. With an indexer it keeps that one's keys too.

    Args:
        cfg: of the model.
        out_scale: of the output's weights at the start.
    """

    def __init__(self, cfg: NetworkConfig, out_scale: float = 1.0) -> None:
        super().__init__()
        latent, positions = cfg.attention.latent, cfg.attention.positions
        assert latent is not None
        assert isinstance(positions, RopeConfig)
        self.latent, self.num_heads = latent, cfg.attention.num_heads
        self.window = cfg.attention.context
        key_dim = latent.nope_dim + latent.rope_dim
        self.scale = key_dim**-0.5 * score_scale(positions)
        if latent.q_rank is None:
            self.q = Linear(cfg.dim, self.num_heads * key_dim)
        else:
            self.q_down = Linear(cfg.dim, latent.q_rank)
            self.q_norm = RMSNorm(latent.q_rank, NORM_EPS)
            self.q_up = Linear(latent.q_rank, self.num_heads * key_dim)
        self.indexer = None if latent.indexer is None else Indexer(cfg.dim, latent)
        self.kv_down = Linear(cfg.dim, latent.kv_rank + latent.rope_dim)
        self.kv_norm = RMSNorm(latent.kv_rank, NORM_EPS)
        up_dim = self.num_heads * (latent.nope_dim + latent.value_dim)
        # Decoding multiplies by parts of it in both directions.
        self.kv_up = PlainLinear(latent.kv_rank, up_dim)
        self.out = Linear(self.num_heads * latent.value_dim, cfg.dim, scale=out_scale)

    def forward(
        self,
        x_BSD: Tensor,
        angles: Rotary | None,
        valid_BS: Tensor | None = None,
        cache: LayerCache | None = None,
        bias_HSP: Tensor | None = None,
    ) -> Tensor:
        """Attend. [B, S, D] → [B, S, D].

        Args:
            x_BSD: normalised hidden states.
            angles: of the S new positions.
            valid_BS: bool, False for padding keys, or int64, the document of each token; not
                together with a cache.
            cache: latent vectors of earlier positions; extended in place.
            bias_HSP: always None: latent attention has rotary positions.
        """
        assert angles is not None
        assert bias_HSP is None
        latent, (batch, length, _) = self.latent, x_BSD.shape
        q_BSO, small_BSR = self._queries(x_BSD)
        q_BSHO = q_BSO.view(batch, length, self.num_heads, -1)
        nope_BSHN, rope_BSHA = q_BSHO.split_with_sizes([latent.nope_dim, latent.rope_dim], dim=-1)
        down_BSO = self.kv_down(x_BSD)
        latent_BSR, key_BSA = down_BSO.split_with_sizes([latent.kv_rank, latent.rope_dim], dim=-1)
        turned = pointwise.rotate(torch.cat([rope_BSHA, key_BSA[:, :, None]], dim=2), *angles)
        rope_BSHA, key_BS1A = turned.split_with_sizes([self.num_heads, 1], dim=2)
        kept = [torch.cat([self.kv_norm(latent_BSR), key_BS1A[:, :, 0]], dim=-1)]
        if self.indexer is not None:
            kept.append(self.indexer.keys(x_BSD, angles))
        kept_BPO, *index = kept if cache is None else cache.extend(*kept)
        choose = None if self.indexer is None else self.indexer(x_BSD, small_BSR, angles, *index)
        form = self.absorbed if self._absorbs(length, kept_BPO.shape[1]) else self.expanded
        y_BHSO = form(nope_BSHN, rope_BSHA, kept_BPO, valid_BS, choose)
        out: Tensor = self.out(y_BHSO.transpose(1, 2).reshape(batch, length, -1))
        return out

    def _queries(self, x_BSD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of all heads together, and the small vector that they come from, if there is one."""
        if self.latent.q_rank is None:
            return self.q(x_BSD), None
        small_BSR = self.q_norm(self.q_down(x_BSD))
        return self.q_up(small_BSR), small_BSR

    def _absorbs(self, length: int, span: int) -> bool:
        """Whether `absorbed` multiplies less than `expanded`: for few queries of many keys."""
        rank, head = self.latent.kv_rank, self.latent.nope_dim + self.latent.value_dim
        return length * (span * (2 * rank - head) + rank * head) < span * rank * head

    def expanded(
        self,
        nope_BSHN: Tensor,
        rope_BSHA: Tensor,
        kept_BPO: Tensor,
        valid_BP: Tensor | None,
        choose: attention.Choose | None = None,
    ) -> Tensor:
        """Keys and values of each head, computed from the latent vectors: [B, H, S, value]."""
        latent, (batch, span, _) = self.latent, kept_BPO.shape
        latent_BPR, key_BPA = kept_BPO.split_with_sizes([latent.kv_rank, latent.rope_dim], dim=-1)
        kv_BPHO = self.kv_up(latent_BPR).view(batch, span, self.num_heads, -1)
        nope_BPHN, v_BPHO = kv_BPHO.split_with_sizes([latent.nope_dim, latent.value_dim], dim=-1)
        key_BPHA = key_BPA[:, :, None].expand(-1, -1, self.num_heads, -1)
        q_BSHO = torch.cat([nope_BSHN, rope_BSHA], dim=-1)
        k_BPHO = torch.cat([nope_BPHN, key_BPHA], dim=-1)
        return attention.attend(
            q_BSHO.transpose(1, 2),
            k_BPHO.transpose(1, 2),
            v_BPHO.transpose(1, 2),
            scale=self.scale,
            window=self.window,
            valid_BP=valid_BP,
            choose=choose,
        )

    def absorbed(
        self,
        nope_BSHN: Tensor,
        rope_BSHA: Tensor,
        kept_BPO: Tensor,
        valid_BP: Tensor | None,
        choose: attention.Choose | None = None,
    ) -> Tensor:
        """The same with no key or value computed (§2.1.2): [B, H, S, value].

        q · (U c) = (Uᵀ q) · c, and a weighted sum of U c is U of the weighted sum: queries go down
        to the latent width and results come up from it.
        """
        latent, (batch, length, heads, _) = self.latent, nope_BSHN.shape
        up_HOR = self.kv_up.weight.view(heads, -1, latent.kv_rank)
        keys_HNR, values_HOR = up_HOR.split_with_sizes([latent.nope_dim, latent.value_dim], dim=1)
        nope_HTN = nope_BSHN.flatten(0, 1).transpose(0, 1)
        down_BHSR = torch.bmm(nope_HTN, keys_HNR).view(heads, batch, length, -1).transpose(0, 1)
        q_BHSO = torch.cat([down_BHSR, rope_BSHA.transpose(1, 2)], dim=-1)
        # The rotary part passes along as if it were a value: cheaper than a copy without it.
        kept_B1PO = kept_BPO[:, None]
        y_BHSO = attention.attend(
            q_BHSO,
            kept_B1PO,
            kept_B1PO,
            scale=self.scale,
            window=self.window,
            valid_BP=valid_BP,
            choose=choose,
        )
        y_HTR = y_BHSO[..., : latent.kv_rank].transpose(0, 1).flatten(1, 2)
        if values_HOR.dtype.itemsize == 2:  # On CPU four times faster in this order, else slower.
            y_HTO = torch.bmm(values_HOR, y_HTR.transpose(1, 2)).transpose(1, 2)
        else:
            y_HTO = torch.bmm(y_HTR, values_HOR.transpose(1, 2))
        return y_HTO.reshape(heads, batch, length, -1).transpose(0, 1)
