"""Grouped-query attention: positions, windows, sinks, gates, and a key/value cache.

Letters: B batch, S new positions, P positions attended to, D width, H heads, G key/value heads,
A width of one head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moestro.config import NetworkConfig, RelativeConfig, RopeConfig, StackSpec, TemperatureConfig
from moestro.kernels import attention
from moestro.models.cache import KeysValues, LayerCache
from moestro.models.linear import QKV, Linear
from moestro.models.norms import rms_norm_of
from moestro.models.relative import RelativeBias
from moestro.models.rotary import Rotary, turn


class Attention(nn.Module):
    """Self-attention: causal, over the last positions of the layer's window, or an encoder's.

    Args:
        cfg: of the model.
        stack: that it is in.
        layer: its number there.
        out_scale: of the output's weights at the start.
    """

    def __init__(
        self, cfg: NetworkConfig, stack: StackSpec, layer: int = 0, out_scale: float = 1.0
    ) -> None:
        super().__init__()
        settings, positions = cfg.attention, cfg.attention.positions
        self.num_heads, self.num_kv_heads = settings.num_heads, cfg.num_kv_heads
        self.head_dim = cfg.head_dim
        spec, self.bidirectional = stack.layers[layer], not stack.causal
        self.window, self.chunk, self.rotary = spec.window, spec.chunk, spec.rotary
        wide, narrow = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        relative = isinstance(positions, RelativeConfig)
        # T5 has the scale of the scores in the initial queries instead.
        root = self.head_dim**-0.5
        self.scale, query_scale = 1.0 if relative else root, root if relative else 1.0
        if isinstance(positions, RopeConfig) and positions.score_scale is not None:
            self.scale = positions.score_scale
        self.temperature = None
        if isinstance(positions, RopeConfig) and not self.rotary:
            self.temperature = positions.temperature
        # Behind each head's queries stand its gates, where it has some.
        self.gated = settings.delta is not None and settings.delta.gated_attention
        queries = wide * (1 + self.gated)
        self.qkv = QKV(cfg.dim, queries, 2 * narrow, settings.bias != "none", query_scale)
        self.out = Linear(wide, cfg.dim, settings.bias == "all", out_scale)
        self.q_norm = self.k_norm = None
        self.norm_all, self.norm_rotated = (settings.qk_norm == x for x in ("full", "rotated"))
        self.unit_eps = cfg.norm.eps if settings.qk_norm == "unit" and self.rotary else None
        if settings.qk_norm not in ("none", "unit"):
            self.q_norm = rms_norm_of(cfg.norm, wide if self.norm_all else self.head_dim)
            self.k_norm = rms_norm_of(cfg.norm, narrow if self.norm_all else self.head_dim)
        self.sinks = nn.Parameter(torch.empty(self.num_heads)) if settings.sinks else None
        self.relative = None
        if isinstance(positions, RelativeConfig) and not positions.shared:
            self.relative = RelativeBias(
                positions.buckets, positions.max_distance, self.num_heads, self.bidirectional
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sinks of 0: each head's own weight on nothing is that of a score of 0."""
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def forward(
        self,
        x_BSD: Tensor,
        angles: Rotary | None = None,
        valid_BS: Tensor | None = None,
        cache: LayerCache | None = None,
        bias_HSP: Tensor | None = None,
        start: int = 0,
    ) -> Tensor:
        """Attend. [B, S, D] → [B, S, D].

        Args:
            x_BSD: normalised hidden states.
            angles: of the S new positions; None with relative positions.
            valid_BS: bool, False for padding keys, or int64, the document of each token; not
                together with a cache.
            cache: keys and values of earlier positions; extended in place.
            bias_HSP: of relative positions that layers share, for at least the last P keys.
            start: position of the first of the new ones.
        """
        batch, length, _ = x_BSD.shape
        heads, groups = self.num_heads, self.num_kv_heads
        qkv_BSO, gates_BSO = self._projected(x_BSD)
        qkv = self._normed(qkv_BSO).view(batch, length, heads + 2 * groups, self.head_dim)
        qk, v_BSGA = qkv.split_with_sizes([heads + groups, groups], dim=2)
        qk = turn(qk, angles) if angles is not None and self.rotary else qk
        qk = unit(qk, self.unit_eps) if self.unit_eps is not None else qk
        q_BSHA, k_BSGA = qk.split_with_sizes([heads, groups], dim=2)
        if self.norm_rotated and self.q_norm is not None and self.k_norm is not None:
            q_BSHA, k_BSGA = self.q_norm(q_BSHA), self.k_norm(k_BSGA)
        if self.temperature is not None:
            places_BS = _places(range(start, start + length), x_BSD, valid_BS)
            q_BSHA = q_BSHA * _growth(self.temperature, places_BS, q_BSHA.dtype)
        q_BHSA, k_BGPA, v_BGPA = (x.transpose(1, 2) for x in (q_BSHA, k_BSGA, v_BSGA))
        if cache is not None:
            k_BGPA, v_BGPA = cache.extend(k_BGPA, v_BGPA)
        span = k_BGPA.shape[2]
        if self.relative is not None:
            bias_HSP = self.relative(range(span - length, span), range(span))
        elif bias_HSP is not None:
            bias_HSP = bias_HSP[:, :, -span:]
        if self.chunk is not None and start + length > self.chunk:
            keys = range(start + length - span, start + length)
            valid_BS = _pieces(self.chunk, keys, x_BSD, valid_BS)
        y_BHSA = attention.attend(
            q_BHSA,
            k_BGPA,
            v_BGPA,
            scale=self.scale,
            window=self.window,
            sinks_H=self.sinks,
            bias_HSP=bias_HSP,
            valid_BP=valid_BS,
            bidirectional=self.bidirectional,
        )
        y_BSO = y_BHSA.transpose(1, 2).reshape(batch, length, -1)
        if gates_BSO is not None:
            y_BSO = y_BSO * gates_BSO.sigmoid()
        out: Tensor = self.out(y_BSO)
        return out

    def _projected(self, x_BSD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries, keys and values; and the gates of the outputs, if there are any."""
        qkv_BSO: Tensor = self.qkv(x_BSD)
        if not self.gated:
            return qkv_BSO, None
        both = 2 * self.num_heads * self.head_dim
        both_BSO, kv_BSO = qkv_BSO.split_with_sizes([both, qkv_BSO.shape[-1] - both], dim=-1)
        both_BSHO = both_BSO.view(*x_BSD.shape[:2], self.num_heads, 2 * self.head_dim)
        q_BSHA, gates_BSHA = both_BSHO.chunk(2, dim=-1)
        return torch.cat([q_BSHA.flatten(2), kv_BSO], dim=-1), gates_BSHA.flatten(2)

    def _normed(self, qkv_BSO: Tensor) -> Tensor:
        """Queries and keys normalised before they rotate, each head alone or all together."""
        if self.q_norm is None or self.k_norm is None or self.norm_rotated:
            return qkv_BSO
        wide, narrow = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        q_BSO, k_BSO, v_BSO = qkv_BSO.split_with_sizes([wide, narrow, narrow], dim=-1)
        if not self.norm_all:
            q_BSO, k_BSO = (x.view(*x.shape[:2], -1, self.head_dim) for x in (q_BSO, k_BSO))
        q_BSO, k_BSO = self.q_norm(q_BSO), self.k_norm(k_BSO)
        return torch.cat([q_BSO.flatten(2), k_BSO.flatten(2), v_BSO], dim=-1)


def unit(x_BSHA: Tensor, eps: float) -> Tensor:
    """Each head over its root mean square, in at least fp32 (Llama-4's norm without gains)."""
    wide = x_BSHA.to(torch.promote_types(x_BSHA.dtype, torch.float32))
    return F.rms_norm(wide, wide.shape[-1:], eps=eps).to(x_BSHA.dtype)


def _places(positions: range, x_BSD: Tensor, valid_BS: Tensor | None) -> Tensor:
    """Positions [B or 1, P], from the first token of each text that is not padding."""
    places_1P = torch.arange(positions.start, positions.stop, device=x_BSD.device)[None]
    return places_1P if valid_BS is None else places_1P - valid_BS.int().argmax(1, keepdim=True)


def _pieces(size: int, keys: range, x_BSD: Tensor, valid_BS: Tensor | None) -> Tensor:
    """The piece of the text that each key lies in, int64 [B, P]; -1 for padding."""
    pieces_BP = (_places(keys, x_BSD, valid_BS) // size).expand(len(x_BSD), -1)
    return pieces_BP if valid_BS is None else pieces_BP.masked_fill(~valid_BS, -1)


def _growth(temperature: TemperatureConfig, places_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """What queries at these positions are multiplied by, [B or 1, S, 1, 1]."""
    passed_BS = (places_BS + 1).clamp(min=0) // temperature.length
    growth_BS = 1 + temperature.scale * passed_BS.to(torch.float32).log1p()
    return growth_BS.to(dtype)[..., None, None]


class CrossAttention(nn.Module):
    """A decoder's attention to all of its encoder's output, as in T5: scores are not scaled.

    Args:
        cfg: of the model.
        out_scale: of the output's weights at the start.
    """

    def __init__(self, cfg: NetworkConfig, out_scale: float = 1.0) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = cfg.attention.num_heads, cfg.num_kv_heads
        self.head_dim = cfg.head_dim
        wide = self.num_heads * self.head_dim
        self.q = Linear(cfg.dim, wide, scale=self.head_dim**-0.5)
        self.kv = Linear(cfg.dim, 2 * self.num_kv_heads * self.head_dim)
        self.out = Linear(wide, cfg.dim, scale=out_scale)

    def look(self, memory_BPD: Tensor) -> KeysValues:
        """The keys and values of the encoder's output."""
        kv_BPNA = self.kv(memory_BPD).unflatten(-1, (2 * self.num_kv_heads, self.head_dim))
        return KeysValues(*kv_BPNA.transpose(1, 2).chunk(2, dim=1))

    def forward(self, x_BSD: Tensor, source: KeysValues, valid_BP: Tensor | None) -> Tensor:
        """Attend. [B, S, D] → [B, S, D].

        Args:
            x_BSD: normalised hidden states.
            source: from `look`.
            valid_BP: bool, False for padding in the source.
        """
        q_BHSA = self.q(x_BSD).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        y_BHSA = attention.attend(q_BHSA, *source, scale=1.0, valid_BP=valid_BP, bidirectional=True)
        out: Tensor = self.out(y_BHSA.transpose(1, 2).flatten(2))
        return out
