"""The decoder language model: embed, blocks of attention and feed-forward, predict.

Letters: B batch, S sequence.
"""

from __future__ import annotations

from torch import Tensor, nn

from moestro.config import ModelConfig, RopeConfig, WindowConfig
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
        documents_BS: Tensor | None = None,
        *,
        valid_BS: Tensor | None = None,
        cache: KVCache | None = None,
        noise_B: Tensor | None = None,
    ) -> ModelOutput:
        """Predict each next token.

        Args:
            tokens_BS: int64 token ids.
            documents_BS: int64, the document of each token, -1 for padding: neighbours of one
                number are a text of their own, which sees no other and begins at position 0.
            valid_BS: bool, False for padding.
            cache: of the positions before these; extended in place.
            noise_B: see `Stack.run`.

        Raises:
            ShapeError: ids are not [B, S] integers, a mask or documents come with a cache, the
                cache holds another batch, or documents share a row where `cannot_pack`.
        """
        if documents_BS is not None:
            valid_BS = self._valid(tokens_BS, documents_BS, valid_BS)
        check_tokens("decoder", tokens_BS, valid_BS)
        if valid_BS is not None and cache is not None:
            raise ShapeError("a cache holds no padding mask; pass valid_BS or cache, not both")
        x_BSD, routings = self.run(
            self.embedded(tokens_BS), tokens_BS, valid_BS, cache,
            recompute=self.recomputes(), documents_BS=documents_BS, noise_B=noise_B,
        )  # fmt: skip
        return ModelOutput(self.logits(x_BSD), routings)

    def _valid(self, tokens_BS: Tensor, documents_BS: Tensor, valid_BS: Tensor | None) -> Tensor:
        """Which tokens are of a document."""
        if valid_BS is not None or documents_BS.shape != tokens_BS.shape:
            raise ShapeError(
                f"documents_BS says which of {list(tokens_BS.shape)} tokens are padding by -1; "
                f"given {list(documents_BS.shape)}{' and a mask' if valid_BS is not None else ''}"
            )
        valid_BS = documents_BS >= 0
        several = documents_BS.diff(dim=1).masked_fill(~valid_BS[:, 1:], 0) != 0
        why = cannot_pack(self.cfg)
        if why is not None and several.any():
            raise ShapeError(f"{why}; give each document a row of its own")
        return valid_BS


class Cached(nn.Module):
    """A decoder whose every token looks at keys and values as a new cache keeps them.

    What a kind of cache costs in quality is the difference to the decoder itself.
    """

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model, self.training = model, model.training

    def forward(self, tokens_BS: Tensor) -> ModelOutput:
        """See `Decoder.forward`."""
        output: ModelOutput = self.model(tokens_BS, cache=self.model.new_cache(len(tokens_BS)))
        return output


def cannot_pack(cfg: ModelConfig) -> str | None:
    """Why a model of these settings cannot keep documents of one row apart; None: it can."""
    if cfg.attention.delta is not None:
        return "the state of gated DeltaNet layers runs on from one document of a row to the next"
    if cfg.attention.conv is not None:
        return "short convolutions run on from one document of a row to the next"
    positions, mix = cfg.attention.positions, cfg.attention.window
    if isinstance(mix, WindowConfig) and mix.chunked:
        return "the pieces of chunked attention are counted from the begin of a row"
    if isinstance(positions, RopeConfig) and positions.temperature is not None:
        return "the temperature of queries depends on their place in the row"
    return None
