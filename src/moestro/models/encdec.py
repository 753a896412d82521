"""The encoder-decoder: T5 (Raffel et al. 2020) and, with mixtures, Switch Transformer.

Two stacks of pre-norm blocks share one embedding; each stack has one table of relative positions.
There is no dropout but the experts' own (`experts.dropout`); T5's and Switch's 0.1 elsewhere is
left out.

Letters: B batch, S source, T target, D width, V vocabulary, H heads.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moestro.config import EncDecConfig, RelativeConfig
from moestro.errors import ShapeError
from moestro.models.cache import KVCache, LayerCache
from moestro.models.encdec_attention import (
    CrossAttention,
    KeysValues,
    SelfAttention,
    cross_bias,
    self_bias,
)
from moestro.models.linear import Embedding, Linear
from moestro.models.network import Network
from moestro.models.norms import norm_of
from moestro.models.relative import RelativeBias
from moestro.moe.experts import FeedForward
from moestro.moe.layer import MoE
from moestro.moe.routing import Routing

# What the decoder reads before its first token: T5's padding.
START_TOKEN = 0


class EncDecOutput(NamedTuple):
    """Logits [B, T, V], and the Routing of each mixture: the encoder's first, then the decoder's.

    Routings of `decode` are the decoder's alone.
    """

    logits: Tensor
    routings: tuple[Routing, ...]


class Encoded(NamedTuple):
    """The encoder's output [B, S, D], and the Routing of each of its mixtures."""

    memory: Tensor
    routings: tuple[Routing, ...]


class Source(NamedTuple):
    """What the decoder sees of a source; computed once, it serves every step of a generation.

    Attributes:
        cross: keys and values, one pair for each decoder layer.
        bias: against padding, [B, 1, 1, S]; None without padding.
    """

    cross: tuple[KeysValues, ...]
    bias: Tensor | None


class EncDecCache(KVCache):
    """What a generation keeps: the source, and the target's keys and values so far.

    Attributes:
        source: what the decoder sees of the source.
    """

    def __init__(self, source: Source) -> None:
        super().__init__([sys.maxsize] * len(source.cross))
        self.source = source


class EncDecBlock(nn.Module):
    """x + attention(norm(x)), in the decoder + cross(norm(x)), then + feed-forward(norm(x))."""

    def __init__(self, cfg: EncDecConfig, layer: int, crosses: bool, backend: str) -> None:
        super().__init__()
        # What writes to the residual stream starts smaller, by the root of its number: GPT-2's
        # rule, which T5 leaves out.
        writers = 3 * cfg.decoder_layers if crosses else 2 * cfg.encoder_layers
        scale = writers**-0.5
        self.attention_norm = norm_of(cfg.norm, cfg.dim)
        self.attention = SelfAttention(cfg, scale)
        self.cross_norm = norm_of(cfg.norm, cfg.dim) if crosses else None
        self.cross = CrossAttention(cfg, scale) if crosses else None
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
        tokens_BS: Tensor,
        valid_BS: Tensor | None,
        bias: Tensor,
        cross: KeysValues | None,
        cross_bias: Tensor | None,
        cache: LayerCache | None,
    ) -> tuple[Tensor, Routing | None]:
        """[B, S, D] → ([B, S, D], the mixture's Routing or None for a dense block)."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), bias, cache)
        if self.cross is not None and self.cross_norm is not None:
            x_BSD = x_BSD + self.cross(self.cross_norm(x_BSD), cross, cross_bias)
        normed_BSD = self.ffn_norm(x_BSD)
        if isinstance(self.ffn, MoE):
            y_BSD, routing = self.ffn(normed_BSD, token_ids=tokens_BS, valid=valid_BS)
            return x_BSD + y_BSD, routing
        y_BSD = self.ffn(normed_BSD.flatten(0, 1)).view_as(x_BSD)
        return x_BSD + y_BSD, None


class Stack(nn.Module):
    """The encoder, or the decoder: blocks, their shared table of positions, and a last norm."""

    def __init__(self, cfg: EncDecConfig, num_layers: int, decodes: bool, backend: str) -> None:
        super().__init__()
        positions = cfg.attention.positions
        assert isinstance(positions, RelativeConfig)  # the settings allow no other
        self.relative = RelativeBias(
            positions.buckets, positions.max_distance, cfg.attention.num_heads, not decodes
        )
        blocks = (EncDecBlock(cfg, n, decodes, backend) for n in range(num_layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm_of(cfg.norm, cfg.dim)

    def forward(
        self,
        x_BSD: Tensor,
        tokens_BS: Tensor,
        valid_BS: Tensor | None = None,
        source: Source | None = None,
        cache: EncDecCache | None = None,
        recompute: bool = False,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Run all blocks. [B, S, D] → ([B, S, D] normalised, the mixtures' Routings).

        Args:
            x_BSD: embedded tokens.
            tokens_BS: their ids.
            valid_BS: bool, False for padding; not together with a cache.
            source: for the decoder.
            cache: of the positions before these; extended in place.
            recompute: keep no activations for the backward.
        """
        start, end = 0, x_BSD.shape[1]
        if cache is not None:
            start, end = cache.position, cache.position + end
            cache.position = end
        bias = self_bias(self.relative, range(start, end), range(end), valid_BS)
        routings = []
        for n, block in enumerate(self.blocks):
            cross, cross_bias = (source.cross[n], source.bias) if source else (None, None)
            layer_cache = cache.layers[n] if cache is not None else None
            arguments = (x_BSD, tokens_BS, valid_BS, bias, cross, cross_bias, layer_cache)
            if recompute:
                x_BSD, routing = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_BSD, routing = block(*arguments)
            if routing is not None:
                routings.append(routing)
        return self.norm(x_BSD), tuple(routings)


class EncDec(Network):
    """An encoder-decoder language model; `cfg.moe` unset makes it a dense one (T5).

    A mixture's `capacity.per_sequence` counts within each sequence of one call: the steps of a
    generation, one token each, never overflow it, as in transformers.

    Attributes:
        moe_layers: layer number of each Routing that `forward` returns, the decoder's layers
            counted on from the encoder's.
        checkpoint_activations: recompute each block in the backward instead of keeping its
            activations. Routings are returned values, so nothing is counted twice.
    """

    def __init__(self, cfg: EncDecConfig, backend: str = "auto") -> None:
        """Build with random weights.

        Args:
            cfg: its settings.
            backend: a kernel's name, or "auto"; see `moestro.kernels.backends`.
        """
        super().__init__()
        self.cfg = cfg
        self.checkpoint_activations = False
        # Logits start near N(0, 1).
        scale = 1 / cfg.head.scale
        self.embed = Embedding(cfg.vocab_size, cfg.dim, scale)
        self.encoder = Stack(cfg, cfg.encoder_layers, False, backend)
        self.decoder = Stack(cfg, cfg.decoder_layers, True, backend)
        self.head = Linear(cfg.dim, cfg.vocab_size, cfg.head.bias, scale)
        if cfg.head.tied:
            self.head.weight = self.embed.weight
        blocks = [*self.encoder.blocks, *self.decoder.blocks]
        self.moe_layers = tuple(n for n, block in enumerate(blocks) if isinstance(block.ffn, MoE))

    def mixtures(self) -> list[MoE]:
        """The mixture layers, in the order of the Routings."""
        blocks = [*self.encoder.blocks, *self.decoder.blocks]
        return [block.ffn for block in blocks if isinstance(block.ffn, MoE)]

    def forward(
        self,
        source_BS: Tensor,
        target_BT: Tensor,
        *,
        valid_BS: Tensor | None = None,
        valid_BT: Tensor | None = None,
    ) -> EncDecOutput:
        """Predict the token after each one of the target.

        Args:
            source_BS: int64 token ids that the encoder reads.
            target_BT: int64 ids that the decoder reads; the first is `START_TOKEN`.
            valid_BS: bool, False for padding in the source.
            valid_BT: bool, False for padding in the target.

        Raises:
            ShapeError: ids are not [B, S] and [B, T] integers, or a mask does not fit.
        """
        memory_BSD, routings = self.encode(source_BS, valid_BS)
        source = self._source(memory_BSD, valid_BS)
        output = self._decode(target_BT, source, valid_BT=valid_BT)
        return EncDecOutput(output.logits, routings + output.routings)

    def encode(self, source_BS: Tensor, valid_BS: Tensor | None = None) -> Encoded:
        """Read the source.

        Args:
            source_BS: int64 token ids.
            valid_BS: bool, False for padding.

        Raises:
            ShapeError: ids are not [B, S] integers, or the mask does not fit.
        """
        _check("source", source_BS, valid_BS)
        recompute = self.checkpoint_activations and self.training
        x_BSD = self.embed(source_BS)
        return Encoded(*self.encoder(x_BSD, source_BS, valid_BS, recompute=recompute))

    def new_cache(self, memory_BSD: Tensor, valid_BS: Tensor | None = None) -> EncDecCache:
        """Begin a generation from what `encode` returned.

        Args:
            memory_BSD: the encoder's output.
            valid_BS: bool, False for padding in the source.
        """
        return EncDecCache(self._source(memory_BSD, valid_BS))

    def decode(self, target_BT: Tensor, cache: EncDecCache) -> EncDecOutput:
        """Predict the token after each new one of the target; the decoder's Routings.

        Args:
            target_BT: int64 ids of the positions after those in the cache.
            cache: from `new_cache`; extended in place.

        Raises:
            ShapeError: ids are not [B, T] integers, or not as many rows as the source has.
        """
        return self._decode(target_BT, cache.source, cache)

    def _source(self, memory_BSD: Tensor, valid_BS: Tensor | None) -> Source:
        crosses = (block.cross for block in self.decoder.blocks)
        cross = tuple(x.look(memory_BSD) for x in crosses if isinstance(x, CrossAttention))
        return Source(cross, cross_bias(valid_BS, memory_BSD.dtype))

    def _decode(
        self,
        target_BT: Tensor,
        source: Source,
        cache: EncDecCache | None = None,
        valid_BT: Tensor | None = None,
    ) -> EncDecOutput:
        _check("target", target_BT, valid_BT)
        rows = len(source.cross[0].keys_BGPA)
        if len(target_BT) != rows:
            raise ShapeError(
                f"the target has {len(target_BT)} rows but the source {rows}; give one target for "
                "each source"
            )
        recompute = self.checkpoint_activations and self.training
        hidden_BTD, routings = self.decoder(
            self.embed(target_BT), target_BT, valid_BT, source, cache, recompute
        )
        return EncDecOutput(self.head(hidden_BTD * self.cfg.head.scale), routings)


def _check(name: str, tokens_BS: Tensor, valid_BS: Tensor | None) -> None:
    if tokens_BS.dim() != 2 or tokens_BS.is_floating_point():
        raise ShapeError(
            f"the {name} takes int64 ids [B, S]; given {tokens_BS.dtype} {list(tokens_BS.shape)}"
        )
    if valid_BS is not None and (valid_BS.shape != tokens_BS.shape or valid_BS.dtype != torch.bool):
        raise ShapeError(
            f"the {name}'s mask must be bool {list(tokens_BS.shape)}, False for padding; given "
            f"{valid_BS.dtype} {list(valid_BS.shape)}"
        )
