"""The encoder-decoder: T5 (Raffel et al. 2020) and, with mixtures, Switch Transformer.

Two stacks of pre-norm blocks share one embedding; each stack has one table of relative positions.
The only dropout is the experts' own (`experts.dropout`); T5's and Switch's 0.1 elsewhere is
left out, and so is T5's rule for the first weights: see `moestro.models.blocks`.

Letters: B batch, S source, T target, D width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moestro.config import EncDecConfig
from moestro.errors import ShapeError
from moestro.models.attention import CrossAttention
from moestro.models.blocks import Stack
from moestro.models.cache import CrossSource, KVCache
from moestro.models.network import ModelOutput, Network, check_tokens
from moestro.moe import noise
from moestro.moe.routing import Routing

# What the decoder reads before its first token: T5's padding.
START_TOKEN = 0


class Encoded(NamedTuple):
    """The encoder's output [B, S, D], and the Routing of each of its mixtures."""

    memory: Tensor
    routings: tuple[Routing, ...]


class EncDec(Network):
    """An encoder-decoder language model; `cfg.moe` unset makes it a dense one (T5).

    A mixture's `capacity.per_sequence` counts within each sequence of one call: the steps of a
    generation, one token each, never overflow it, as in transformers.
    """

    def __init__(self, cfg: EncDecConfig, backend: str = "auto") -> None:
        """Build with random weights.

        Args:
            cfg: its settings.
            backend: a kernel's name, or "auto"; see `moestro.kernels.backends`.
        """
        scale = 1 / cfg.head.scale  # Logits start near N(0, 1).
        super().__init__(cfg, scale)
        encoder, decoder = cfg.stacks()
        self.encoder = Stack().build(cfg, encoder, backend)
        self.decoder = Stack().build(cfg, decoder, backend)
        self.add_head(scale)

    def forward(
        self,
        source_BS: Tensor,
        target_BT: Tensor,
        *,
        valid_BS: Tensor | None = None,
        valid_BT: Tensor | None = None,
        noise_B: Tensor | None = None,
    ) -> ModelOutput:
        """Predict the token after each one of the target; Routings of both stacks.

        Args:
            source_BS: int64 token ids that the encoder reads.
            target_BT: int64 ids that the decoder reads; the first is `START_TOKEN`.
            valid_BS: bool, False for padding in the source.
            valid_BT: bool, False for padding in the target.
            noise_B: see `Stack.run`.

        Raises:
            ShapeError: ids are not [B, S] and [B, T] integers, or a mask does not fit.
        """
        memory_BSD, routings = self.encode(source_BS, valid_BS, noise_B)
        source = self.look(memory_BSD, valid_BS)
        noise_B = None if noise_B is None else noise.mixed(noise_B, 0)  # other than the source's
        output = self._decode(target_BT, source, valid_BT=valid_BT, noise_B=noise_B)
        return ModelOutput(output.logits, routings + output.routings)

    def encode(
        self,
        source_BS: Tensor,
        valid_BS: Tensor | None = None,
        noise_B: Tensor | None = None,
    ) -> Encoded:
        """Read the source; arguments and errors as of `forward`."""
        check_tokens("source", source_BS, valid_BS)
        x_BSD = self.embedded(source_BS)
        recompute = self.recomputes()
        found = self.encoder.run(x_BSD, source_BS, valid_BS, recompute=recompute, noise_B=noise_B)
        return Encoded(*found)

    def look(self, memory_BSD: Tensor, valid_BS: Tensor | None = None) -> CrossSource:
        """What the decoder sees of what `encode` returned; it serves every step of a generation."""
        crosses = (block.cross for block in self.decoder.blocks)
        cross = tuple(x.look(memory_BSD) for x in crosses if isinstance(x, CrossAttention))
        return CrossSource(cross, valid_BS)

    def new_cache(self, memory_BSD: Tensor, valid_BS: Tensor | None = None) -> KVCache:
        """Begin a generation from what `encode` returned."""
        cache = self.decoder.new_cache()
        cache.source = self.look(memory_BSD, valid_BS)
        return cache

    def decode(self, target_BT: Tensor, cache: KVCache) -> ModelOutput:
        """Predict the token after each new one of the target; the decoder's Routings.

        Args:
            target_BT: int64 ids of the positions after those in the cache.
            cache: with a source; extended in place.

        Raises:
            ShapeError: ids are not [B, T] integers, or not as many rows as the source has.
        """
        assert cache.source is not None
        return self._decode(target_BT, cache.source, cache)

    def _decode(
        self,
        target_BT: Tensor,
        source: CrossSource,
        cache: KVCache | None = None,
        valid_BT: Tensor | None = None,
        noise_B: Tensor | None = None,
    ) -> ModelOutput:
        check_tokens("target", target_BT, valid_BT)
        rows = len(source.cross[0].keys_BGPA)
        if len(target_BT) != rows:
            raise ShapeError(
                f"the target has {len(target_BT)} rows but the source {rows}; give one target for "
                "each source"
            )
        x_BTD, routings = self.decoder.run(
            self.embedded(target_BT),
            target_BT,
            valid_BT,
            cache,
            source,
            self.recomputes(),
            noise_B=noise_B,
        )
        return ModelOutput(self.logits(x_BTD), routings)
