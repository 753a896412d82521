"""The decoder language model: embed, blocks of attention and feed-forward, predict.

Letters: B batch, S sequence, T = B · S tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moestro.config import ModelConfig
from moestro.errors import ShapeError
from moestro.models.attention import Attention, KVCache, LayerCache, RMSNorm, Rotary, rotary
from moestro.moe.experts import FeedForward
from moestro.moe.layer import MoE
from moestro.moe.routing import Routing


class DecoderOutput(NamedTuple):
    """Logits [B, S, V], and the Routing of each mixture layer, first layer first."""

    logits: Tensor
    routings: tuple[Routing, ...]


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); the latter dense or a mixture."""

    def __init__(self, cfg: ModelConfig, layer: int, backend: str) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(cfg.dim, cfg.norm.eps)
        self.attention = Attention(cfg)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm.eps)
        self.ffn: MoE | FeedForward
        if cfg.moe is not None and cfg.is_moe_layer(layer):
            self.ffn = MoE(cfg.moe, backend)
        else:
            self.ffn = FeedForward(
                cfg.dim, cfg.dense.hidden_dim, cfg.dense.activation, backend=backend
            )

    def forward(
        self,
        x_BSD: Tensor,
        angles: Rotary,
        tokens_BS: Tensor,
        valid_BS: Tensor | None,
        cache: LayerCache | None,
    ) -> tuple[Tensor, Routing | None]:
        """[B, S, D] → ([B, S, D], the mixture's Routing or None for a dense block)."""
        normed_BSD = self.attention_norm(x_BSD)
        x_BSD = x_BSD + self.attention(normed_BSD, angles, valid_BS, cache)
        normed_BSD = self.ffn_norm(x_BSD)
        if isinstance(self.ffn, MoE):
            y_BSD, routing = self.ffn(normed_BSD, token_ids=tokens_BS, valid=valid_BS)
            return x_BSD + y_BSD, routing
        return x_BSD + self.ffn(normed_BSD.flatten(0, 1)).view_as(x_BSD), None


class Decoder(nn.Module):
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
        self.embed = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.blocks = nn.ModuleList(Block(cfg, n, backend) for n in range(cfg.num_layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm.eps)
        self.head = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
        if cfg.head.tied:
            self.head.weight = self.embed.weight
        self.moe_layers = tuple(n for n in range(cfg.num_layers) if cfg.is_moe_layer(n))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embeddings N(0, 1/D); what writes to the residual stream shrunk by sqrt(2L) (GPT-2)."""
        nn.init.normal_(self.embed.weight, std=self.cfg.dim**-0.5)
        if not self.cfg.head.tied:
            nn.init.normal_(self.head.weight, std=self.cfg.dim**-0.5)
        shrink = 1 / math.sqrt(2 * self.cfg.num_layers)
        for module in self.modules():
            if isinstance(module, Attention):
                for linear in (module.qkv, module.out):
                    nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if name.endswith(("attention.out.weight", ".down")):
                    weight.mul_(shrink)

    def mixtures(self) -> list[MoE]:
        """The mixture layers, in the order of the Routings."""
        return [block.ffn for block in self.blocks if isinstance(block.ffn, MoE)]

    def new_cache(self, batch: int = 1) -> KVCache:
        """An empty cache that keeps the last `context` positions."""
        return KVCache(self.cfg.num_layers, self.cfg.attention.context)

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
            ShapeError: ids are not [B, S] integers, or a mask comes with a cache.
        """
        if tokens_BS.dim() != 2 or tokens_BS.is_floating_point():
            raise ShapeError(
                f"the decoder takes int64 ids [B, S]; given {tokens_BS.dtype} "
                f"{list(tokens_BS.shape)}"
            )
        if valid_BS is not None and (
            valid_BS.shape != tokens_BS.shape or valid_BS.dtype != torch.bool
        ):
            raise ShapeError(
                f"valid_BS must be bool {list(tokens_BS.shape)}, False for padding; given "
                f"{valid_BS.dtype} {list(valid_BS.shape)}"
            )
        if valid_BS is not None and cache is not None:
            raise ShapeError("a cache holds no padding mask; pass valid_BS or cache, not both")
        start = cache.position if cache is not None else 0
        angles = rotary(start, tokens_BS.shape[1], self.cfg, tokens_BS.device)
        x_BSD = self.embed(tokens_BS)
        routings = []
        for n, block in enumerate(self.blocks):
            layer_cache = cache.layers[n] if cache is not None else None
            if self.checkpoint_activations and self.training:
                x_BSD, routing = checkpoint(
                    block, x_BSD, angles, tokens_BS, valid_BS, layer_cache, use_reentrant=False
                )
            else:
                x_BSD, routing = block(x_BSD, angles, tokens_BS, valid_BS, layer_cache)
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.position += tokens_BS.shape[1]
        return DecoderOutput(self.head(self.norm(x_BSD)), tuple(routings))
