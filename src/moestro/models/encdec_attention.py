"""Attention of an encoder-decoder: to its own stack, and from the decoder to the encoder.

As in T5 (Raffel et al. 2020, §2.1) scores are not divided by the square root of the head's width,
and positions enter as a bias that is added to them.

Letters: B batch, S queries, P keys, D width, H heads, G key/value heads, A width of one head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moestro.config import EncDecConfig
from moestro.models.cache import LayerCache
from moestro.models.linear import QKV, Linear
from moestro.models.relative import RelativeBias


class KeysValues(NamedTuple):
    """What queries look at: keys and values, each [B, G, P, A]."""

    keys_BGPA: Tensor
    values_BGPA: Tensor


class SelfAttention(nn.Module):
    """Every position looks at the positions of its own stack.

    Args:
        cfg: of the model.
        out_scale: of the output's weights at the start.
    """

    def __init__(self, cfg: EncDecConfig, out_scale: float = 1.0) -> None:
        super().__init__()
        self.heads, self.groups = cfg.attention.num_heads, cfg.num_kv_heads
        self.head_dim = cfg.head_dim
        wide, narrow = self.heads * self.head_dim, self.groups * self.head_dim
        self.qkv = QKV(cfg.dim, wide, 2 * narrow, query_scale=self.head_dim**-0.5)
        self.out = Linear(wide, cfg.dim, scale=out_scale)

    def forward(self, x_BSD: Tensor, bias: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Attend. [B, S, D] → [B, S, D].

        Args:
            x_BSD: normalised hidden states.
            bias: added to the scores, [1 or B, H, S, P], P earlier and new positions.
            cache: keys and values of earlier positions; extended in place.
        """
        heads = self.heads + 2 * self.groups
        qkv_BNSA = self.qkv(x_BSD).unflatten(-1, (heads, self.head_dim)).transpose(1, 2)
        sizes = [self.heads, self.groups, self.groups]
        q_BHSA, k_BGPA, v_BGPA = torch.split(qkv_BNSA, sizes, dim=1)
        if cache is not None:
            k_BGPA, v_BGPA = cache.extend(k_BGPA, v_BGPA)
        y_BSD: Tensor = self.out(_attend(q_BHSA, KeysValues(k_BGPA, v_BGPA), bias))
        return y_BSD


class CrossAttention(nn.Module):
    """Every position of the decoder looks at all of what the encoder made; made as the other."""

    def __init__(self, cfg: EncDecConfig, out_scale: float = 1.0) -> None:
        super().__init__()
        self.heads, self.groups = cfg.attention.num_heads, cfg.num_kv_heads
        self.head_dim = cfg.head_dim
        wide = self.heads * self.head_dim
        self.q = Linear(cfg.dim, wide, scale=self.head_dim**-0.5)
        self.kv = Linear(cfg.dim, 2 * self.groups * self.head_dim)
        self.out = Linear(wide, cfg.dim, scale=out_scale)

    def look(self, memory_BPD: Tensor) -> KeysValues:
        """The keys and values of the encoder's output; they serve every step of a generation."""
        kv_BPNA = self.kv(memory_BPD).unflatten(-1, (2 * self.groups, self.head_dim))
        return KeysValues(*kv_BPNA.transpose(1, 2).chunk(2, dim=1))

    def forward(self, x_BSD: Tensor, memory: KeysValues, bias: Tensor | None) -> Tensor:
        """Attend. [B, S, D] → [B, S, D].

        Args:
            x_BSD: normalised hidden states.
            memory: from `look`.
            bias: added to the scores, [B, 1, 1, P]; None where no key is padding.
        """
        q_BHSA = self.q(x_BSD).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        y_BSD: Tensor = self.out(_attend(q_BHSA, memory, bias))
        return y_BSD


def self_bias(
    relative: RelativeBias, queries: range, keys: range, valid_BP: Tensor | None
) -> Tensor:
    """What is added to the scores of a stack's own attention, [1 or B, H, S, P].

    The relative bias, and next to -inf for padding and, in the decoder, for later keys.

    Args:
        relative: the stack's table.
        queries: their positions, one apart.
        keys: their positions, one apart, from 0.
        valid_BP: bool, False for padding keys.
    """
    bias: Tensor = relative(queries, keys)[None]
    if not relative.bidirectional and len(queries) > 1:
        shape = (len(queries), len(keys))
        seen_SP = torch.ones(shape, dtype=torch.bool, device=bias.device).tril(queries.start)
        bias = bias.masked_fill(~seen_SP, _lowest(bias.dtype))
    if valid_BP is not None:
        bias = bias.masked_fill(~valid_BP[:, None, None], _lowest(bias.dtype))
    return bias


def cross_bias(valid_BP: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores of cross attention, [B, 1, 1, P]; None without padding."""
    if valid_BP is None:
        return None
    bias_BP = torch.zeros(valid_BP.shape, dtype=dtype, device=valid_BP.device)
    return bias_BP.masked_fill(~valid_BP, _lowest(dtype))[:, None, None]


def _lowest(dtype: torch.dtype) -> float:
    """Not -inf: a query whose keys are all padding would be NaN."""
    return torch.finfo(dtype).min


def _attend(q_BHSA: Tensor, seen: KeysValues, bias: Tensor | None) -> Tensor:
    """[B, S, H · A]."""
    mask = None if bias is None else bias.to(q_BHSA.dtype)
    grouped = seen.keys_BGPA.shape[1] != q_BHSA.shape[1]
    y_BHSA = F.scaled_dot_product_attention(
        q_BHSA, *seen, attn_mask=mask, scale=1.0, enable_gqa=grouped
    )
    return y_BHSA.transpose(1, 2).flatten(2)
