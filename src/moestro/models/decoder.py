"""The decoder language model: embed, blocks of attention and feed-forward, predict.

Letters: B batch, S sequence.
"""

from __future__ import annotations

from torch import Tensor

from moestro.config import ModelConfig
from moestro.errors import ShapeError
from moestro.models.blocks import Stack
from moestro.models.cache import KVCache
from moestro.models.network import ModelOutput, Network, check_tokens


class Decoder(Network, Stack):
    """A decoder-only language model; `cfg.moe` unset makes it a dense one."""

    def __init__(self, cfg: ModelConfig, backend: str = "auto") -> None:
        """Build with random weights.

        Args:
            cfg: its settings.
            backend: a kernel's name, or "auto"; see `moestro.kernels.backends`.
        """
        super().__init__(cfg)
        (stack,) = cfg.stacks()
        self.build(cfg, stack, backend)
        self.add_head()

    def forward(
        self,
        tokens_BS: Tensor,
        *,
        valid_BS: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> ModelOutput:
        """Predict each next token.

        Args:
            tokens_BS: int64 token ids.
            valid_BS: bool, False for padding.
            cache: of the positions before these; extended in place.

        Raises:
            ShapeError: ids are not [B, S] integers, a mask comes with a cache, or the cache holds
                another batch.
        """
        check_tokens("decoder", tokens_BS, valid_BS)
        if valid_BS is not None and cache is not None:
            raise ShapeError("a cache holds no padding mask; pass valid_BS or cache, not both")
        x_BSD, routings = self.run(
            self.embedded(tokens_BS), tokens_BS, valid_BS, cache, recompute=self.recomputes()
        )
        return ModelOutput(self.logits(x_BSD), routings)
