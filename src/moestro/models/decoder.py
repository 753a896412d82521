"""The decoder language model: embed, blocks of attention and feed-forward, predict.

Letters: B batch, S sequence, T = B · S tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moestro.config import ModelConfig, RelativeConfig, RopeConfig
from moestro.errors import ShapeError
from moestro.models.attention import Attention, reach, relative_bias
from moestro.models.cache import KVCache, LayerCache
from moestro.models.latent import LatentAttention
from moestro.models.linear import Embedding, Linear
from moestro.models.network import Network
from moestro.models.norms import norm_of
from moestro.models.rotary import Rotary, RotaryTable, frequencies, rotary, turning_width
from moestro.moe.experts import FeedForward
from moestro.moe.layer import MoE
from moestro.moe.mixing import compute_dtype
from moestro.moe.routing import Routing


class DecoderOutput(NamedTuple):
    """Logits [B, S, V], and the Routing of each mixture layer, first layer first."""

    logits: Tensor
    routings: tuple[Routing, ...]


class Positions(NamedTuple):
    """What all layers know of the new positions: angles, or a bias that they share, or neither."""

    angles: Rotary | None
    bias_HSP: Tensor | None


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); the latter dense or a mixture."""

    def __init__(self, cfg: ModelConfig, layer: int, backend: str) -> None:
        super().__init__()
        # What writes to the residual stream starts smaller, by the root of its number (GPT-2).
        scale = (2 * cfg.num_layers) ** -0.5
        self.attention_norm = norm_of(cfg.norm, cfg.dim)
        self.attention: Attention | LatentAttention
        if cfg.attention.latent is None:
            self.attention = Attention(cfg, layer, scale)
        else:
            self.attention = LatentAttention(cfg, scale)
        self.ffn_norm = norm_of(cfg.norm, cfg.dim)
        self.ffn: MoE | FeedForward
        if cfg.moe is not None and cfg.is_moe_layer(layer):
            self.ffn = MoE(cfg.moe, backend, scale)
        else:
            dense = cfg.dense
            self.ffn = FeedForward(
                cfg.dim, dense.hidden_dim, dense.activation, backend=backend, out_scale=scale
            )

    def forward(
        self,
        x_BSD: Tensor,
        positions: Positions,
        tokens_BS: Tensor,
        valid_BS: Tensor | None,
        cache: LayerCache | None,
    ) -> tuple[Tensor, Routing | None]:
        """[B, S, D] → ([B, S, D], the mixture's Routing or None for a dense block)."""
        normed_BSD = self.attention_norm(x_BSD)
        x_BSD = x_BSD + self.attention(
            normed_BSD, positions.angles, valid_BS, cache, positions.bias_HSP
        )
        normed_BSD = self.ffn_norm(x_BSD)
        if isinstance(self.ffn, MoE):
            y_BSD, routing = self.ffn(normed_BSD, token_ids=tokens_BS, valid=valid_BS)
            return x_BSD + y_BSD, routing
        return x_BSD + self.ffn(normed_BSD.flatten(0, 1)).view_as(x_BSD), None


class Decoder(Network):
    """A decoder-only language model; `cfg.moe` unset makes it a dense one.

    Attributes:
        moe_layers: layer number of each Routing that `forward` returns.
        checkpoint_activations: recompute each block in the backward instead of keeping its
            activations. Routings are returned values, so nothing is counted twice.
    """

    def __init__(self, cfg: ModelConfig, backend: str = "auto") -> None:
        """Build with random weights.

        Args:
            cfg: its settings.
            backend: a kernel's name, or "auto"; see `moestro.kernels.backends`.
        """
        super().__init__()
        self.cfg = cfg
        self.checkpoint_activations = False
        positions, heads = cfg.attention.positions, cfg.attention.num_heads
        if isinstance(positions, RopeConfig):
            frequencies(positions, turning_width(cfg))  # Refuses lists of the wrong length.
        self.embed = Embedding(cfg.vocab_size, cfg.dim)
        self.relative = None
        if isinstance(positions, RelativeConfig) and positions.shared:
            self.relative = relative_bias(positions, heads)
        self.blocks = nn.ModuleList(Block(cfg, n, backend) for n in range(cfg.num_layers))
        self.norm = norm_of(cfg.norm, cfg.dim)
        self.head = Linear(cfg.dim, cfg.vocab_size, cfg.head.bias)
        if cfg.head.tied:
            self.head.weight = self.embed.weight
        self.moe_layers = tuple(n for n in range(cfg.num_layers) if cfg.is_moe_layer(n))

    def mixtures(self) -> list[MoE]:
        """The mixture layers, in the order of the Routings."""
        return [block.ffn for block in self.blocks if isinstance(block.ffn, MoE)]

    def new_cache(self, batch: int = 1) -> KVCache:
        """An empty cache: each layer keeps the positions of its window, at most the context."""
        rope = isinstance(self.cfg.attention.positions, RopeConfig)
        limits = [reach(self.cfg, n) for n in range(self.cfg.num_layers)]
        return KVCache(limits, RotaryTable(self.cfg) if rope else None)

    def forward(
        self,
        tokens_BS: Tensor,
        *,
        valid_BS: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> DecoderOutput:
        """Predict each next token.

        Args:
            tokens_BS: int64 token ids.
            valid_BS: bool, False for padding.
            cache: of the positions before these; extended in place.

        Raises:
            ShapeError: ids are not [B, S] integers, a mask comes with a cache, or the cache holds
                another batch.
        """
        self._check(tokens_BS, valid_BS, cache)
        x_BSD = self.embed(tokens_BS)
        positions = self._positions(x_BSD, cache)
        routings = []
        for n, block in enumerate(self.blocks):
            layer_cache = cache.layers[n] if cache is not None else None
            if self.checkpoint_activations and self.training:
                x_BSD, routing = checkpoint(
                    block, x_BSD, positions, tokens_BS, valid_BS, layer_cache, use_reentrant=False
                )
            else:
                x_BSD, routing = block(x_BSD, positions, tokens_BS, valid_BS, layer_cache)
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.position += tokens_BS.shape[1]
        x_BSD = self.norm(x_BSD)
        if self.cfg.head.scale != 1:
            x_BSD = x_BSD * self.cfg.head.scale
        return DecoderOutput(self.head(x_BSD), tuple(routings))

    def _positions(self, x_BSD: Tensor, cache: KVCache | None) -> Positions:
        """Angles of the new positions, or their shared bias for every key that a layer may see."""
        length = x_BSD.shape[1]
        dtype = compute_dtype(x_BSD)
        if cache is not None and cache.rotary is not None:
            angles = cache.rotary.at(cache.position, length, x_BSD.device, dtype)
            return Positions(angles, None)
        if isinstance(self.cfg.attention.positions, RopeConfig):
            return Positions(rotary(0, length, self.cfg, x_BSD.device, dtype), None)
        if self.relative is None:
            return Positions(None, None)
        span = length
        if cache is not None:
            span += min(cache.position, max(layer.limit for layer in cache.layers) - 1)
        return Positions(None, self.relative(range(span - length, span), range(span)))

    def _check(self, tokens_BS: Tensor, valid_BS: Tensor | None, cache: KVCache | None) -> None:
        if tokens_BS.dim() != 2 or tokens_BS.is_floating_point():
            raise ShapeError(
                f"the decoder takes int64 ids [B, S]; given {tokens_BS.dtype} "
                f"{list(tokens_BS.shape)}"
            )
        if valid_BS is None:
            return
        if valid_BS.shape != tokens_BS.shape or valid_BS.dtype != torch.bool:
            raise ShapeError(
                f"valid_BS must be bool {list(tokens_BS.shape)}, False for padding; given "
                f"{valid_BS.dtype} {list(valid_BS.shape)}"
            )
        if cache is not None:
            raise ShapeError("a cache holds no padding mask; pass valid_BS or cache, not both")
