"""Pre-norm blocks, and the loop over a stack of them: all of a network but embedding and head.

Letters: B batch, S sequence, P positions attended to, D width, H heads.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple, Self

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moestro.config import CacheKind, NetworkConfig, RelativeConfig, RopeConfig, StackSpec
from moestro.models.attention import Attention, CrossAttention
from moestro.models.cache import CrossSource, KeysValues, KVCache, LayerCache, StateCache
from moestro.models.conv import ShortConv
from moestro.models.delta import DeltaNet
from moestro.models.latent import LatentAttention
from moestro.models.norms import norm_of
from moestro.models.relative import RelativeBias
from moestro.models.rotary import (
    Rotary,
    RotaryTable,
    frequencies,
    packed_rotary,
    rotary,
    turning_width,
)
from moestro.moe import noise
from moestro.moe.experts import FeedForward
from moestro.moe.layer import MoE
from moestro.moe.mixing import compute_dtype
from moestro.moe.routing import Routing


class Shared(NamedTuple):
    """What all blocks of a stack know of the new positions.

    Attributes:
        tokens_BS: their ids.
        valid_BS: bool, False for padding.
        documents_BS: the document of each token, where several share a sequence.
        angles: of rotary positions.
        bias_HSP: of relative positions that the layers share.
        source_valid_BP: `valid_BS` of the text that cross attention sees.
        noise_BS: int64, of which the noise of this block is a function; see `moestro.moe.noise`.
        start: position of the first of them.
    """

    tokens_BS: Tensor
    valid_BS: Tensor | None
    documents_BS: Tensor | None
    angles: Rotary | None
    bias_HSP: Tensor | None
    source_valid_BP: Tensor | None
    noise_BS: Tensor | None = None
    start: int = 0


class Block(nn.Module):
    """x + attention(norm(x)), + cross(norm(x)) where there is a source, + feed-forward(norm(x)).

    What is added is multiplied by `norm.residual_scale`.
    A block without attention has a gated DeltaNet or a short convolution in its place.
    """

    def __init__(self, cfg: NetworkConfig, stack: StackSpec, layer: int, backend: str) -> None:
        super().__init__()
        self.residual_scale = cfg.norm.residual_scale
        # What writes to the residual stream starts smaller, by the root of its number (GPT-2).
        scale = ((3 if stack.cross else 2) * len(stack.layers)) ** -0.5
        self.attention_norm = norm_of(cfg.norm, cfg.dim)
        self.attention: Attention | LatentAttention | None = None
        self.delta: DeltaNet | None = None
        self.conv: ShortConv | None = None
        if stack.layers[layer].state == "delta":
            self.delta = DeltaNet(cfg, scale)
        elif stack.layers[layer].state == "conv":
            self.conv = ShortConv(cfg, scale)
        elif cfg.attention.latent is None:
            self.attention = Attention(cfg, stack, layer, scale)
        else:
            self.attention = LatentAttention(cfg, scale)
        self.cross: CrossAttention | None = None
        if stack.cross:
            self.cross_norm = norm_of(cfg.norm, cfg.dim)
            self.cross = CrossAttention(cfg, scale)
        self.ffn_norm = norm_of(cfg.norm, cfg.dim)
        self.ffn: MoE | FeedForward
        if cfg.moe is not None and stack.layers[layer].mixture:
            self.ffn = MoE(cfg.moe, backend, scale)
        else:
            dense = cfg.dense
            self.ffn = FeedForward(
                cfg.dim, dense.hidden_dim, dense.activation, backend=backend, out_scale=scale
            )

    def forward(
        self,
        x_BSD: Tensor,
        shared: Shared,
        cache: LayerCache | StateCache | None,
        source: KeysValues | None,
    ) -> tuple[Tensor, Routing | None]:
        """[B, S, D] → ([B, S, D], the mixture's Routing or None for a dense block)."""
        y_BSD = self._look_back(self.attention_norm(x_BSD), shared, cache)
        x_BSD = self._added(x_BSD, y_BSD)
        if self.cross is not None:
            y_BSD = self.cross(self.cross_norm(x_BSD), source, shared.source_valid_BP)
            x_BSD = self._added(x_BSD, y_BSD)
        normed_BSD = self.ffn_norm(x_BSD)
        if isinstance(self.ffn, MoE):
            y_BSD, routing = self.ffn(
                normed_BSD,
                token_ids=shared.tokens_BS,
                valid=shared.valid_BS,
                noise=shared.noise_BS,
            )
            return self._added(x_BSD, y_BSD), routing
        return self._added(x_BSD, self.ffn(normed_BSD.flatten(0, 1)).view_as(x_BSD)), None

    def _added(self, x_BSD: Tensor, y_BSD: Tensor) -> Tensor:
        return x_BSD + (y_BSD if self.residual_scale == 1 else y_BSD * self.residual_scale)

    def _look_back(
        self, normed_BSD: Tensor, shared: Shared, cache: LayerCache | StateCache | None
    ) -> Tensor:
        """What the block takes from the positions before."""
        for state in (self.delta, self.conv):
            if state is not None:
                y_BSD: Tensor = state(normed_BSD, shared.valid_BS, cache)
                return y_BSD
        assert self.attention is not None
        valid_BS = shared.valid_BS if shared.documents_BS is None else shared.documents_BS
        seen = (shared.angles, valid_BS, cache, shared.bias_HSP)
        if isinstance(self.attention, Attention):
            y_BSD = self.attention(normed_BSD, *seen, shared.start)
        else:
            y_BSD = self.attention(normed_BSD, *seen)
        return y_BSD


class Stack(nn.Module):
    """Blocks one after the other, the relative positions that they share, and a last norm.

    Attributes:
        cache_kind: how new caches keep keys and values; see `cache_as`.
        together: tokens of a prompt that pass together where a memory budget says so.
    """

    cfg: Any
    cache_kind: CacheKind = "as-is"
    together: int | None = None
    relative: RelativeBias | None
    blocks: nn.ModuleList

    def build(self, cfg: NetworkConfig, stack: StackSpec, backend: str) -> Self:
        """Fill with random weights; apart from __init__, which a decoder has for itself."""
        positions, heads = cfg.attention.positions, cfg.attention.num_heads
        self.cfg, self.spec = cfg, stack
        self.relative = None
        if isinstance(positions, RopeConfig):
            frequencies(positions, turning_width(cfg))  # Refuses lists of the wrong length.
        elif isinstance(positions, RelativeConfig) and positions.shared:
            self.relative = RelativeBias(
                positions.buckets, positions.max_distance, heads, bidirectional=not stack.causal
            )
        self.blocks = nn.ModuleList(Block(cfg, stack, n, backend) for n in range(len(stack.layers)))
        self.norm = norm_of(cfg.norm, cfg.dim)
        return self

    def new_cache(self, batch: int = 1) -> KVCache:
        """An empty cache: each layer keeps the positions of its window, or its state."""
        rope = isinstance(self.cfg.attention.positions, RopeConfig)
        limits = [
            None if layer.state else layer.window or sys.maxsize for layer in self.spec.layers
        ]
        return KVCache(limits, RotaryTable(self.cfg) if rope else None, self.cache_kind)

    def run(
        self,
        x_BSD: Tensor,
        tokens_BS: Tensor,
        valid_BS: Tensor | None = None,
        cache: KVCache | None = None,
        source: CrossSource | None = None,
        recompute: bool = False,
        documents_BS: Tensor | None = None,
        noise_B: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Pass all blocks. [B, S, D] → ([B, S, D] normalised, the mixtures' Routings).

        Args:
            x_BSD: embedded tokens.
            tokens_BS: their ids.
            valid_BS: bool, False for padding; not together with a cache.
            cache: of the positions before these; extended in place.
            source: what cross attention sees.
            recompute: keep no activations for the backward. Routings are returned values, so
                nothing is counted twice.
            documents_BS: the document of each token; not together with a cache.
            noise_B: int64 keys of the sequences, of which what is random in training is a
                function (`moestro.moe.noise`); None: it is drawn by torch's generator.
        """
        noise_BS = None if noise_B is None else noise.of_tokens(noise_B, tokens_BS.shape[1])
        shared = self.shared(x_BSD, tokens_BS, valid_BS, cache, source, documents_BS)
        routings = []
        for n, block in enumerate(self.blocks):
            layer_cache = cache.layers[n] if cache is not None else None
            cross = source.cross[n] if source is not None else None
            if noise_BS is not None:
                shared = shared._replace(noise_BS=noise.mixed(noise_BS, n))
            if recompute:
                x_BSD, routing = checkpoint(
                    block, x_BSD, shared, layer_cache, cross, use_reentrant=False
                )
            else:
                x_BSD, routing = block(x_BSD, shared, layer_cache, cross)
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.position += tokens_BS.shape[1]
        return self.norm(x_BSD), tuple(routings)

    def shared(
        self,
        x_BSD: Tensor,
        tokens_BS: Tensor,
        valid_BS: Tensor | None = None,
        cache: KVCache | None = None,
        source: CrossSource | None = None,
        documents_BS: Tensor | None = None,
    ) -> Shared:
        """What every block is called with beside x; arguments as of `run`."""
        source_valid_BP = None if source is None else source.valid_BP
        positions = self._positions(x_BSD, cache, documents_BS)
        start = 0 if cache is None else cache.position
        return Shared(tokens_BS, valid_BS, documents_BS, *positions, source_valid_BP, start=start)

    def _positions(
        self, x_BSD: Tensor, cache: KVCache | None, documents_BS: Tensor | None
    ) -> tuple[Rotary | None, Tensor | None]:
        """Angles of the new positions, or their shared bias for every key that a layer may see."""
        length, dtype = x_BSD.shape[1], compute_dtype(x_BSD)
        if cache is not None and cache.rotary is not None:
            return cache.rotary.at(cache.position, length, x_BSD.device, dtype), None
        if isinstance(self.cfg.attention.positions, RopeConfig):
            if documents_BS is not None:
                return packed_rotary(documents_BS, self.cfg, dtype), None
            return rotary(0, length, self.cfg, x_BSD.device, dtype), None
        if self.relative is None:
            return None, None
        span = length
        if cache is not None:
            limits = (each.limit for each in cache.layers if isinstance(each, LayerCache))
            span += min(cache.position, max(limits) - 1)
        return None, self.relative(range(span - length, span), range(span))


def cache_as(model: nn.Module, kind: CacheKind) -> None:
    """Let a model's new caches keep keys and values another way; before it is decoded with."""
    for module in model.modules():
        if isinstance(module, Stack):
            module.cache_kind = kind
