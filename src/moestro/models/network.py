"""What decoders and encoder-decoders share: embedding, a head that may be tied to it, one reset.

Letters: B batch, S sequence, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from moestro.config import NetworkConfig
from moestro.errors import ShapeError
from moestro.models.linear import Embedding, Linear
from moestro.moe.layer import MoE
from moestro.moe.routing import Routing


class ModelOutput(NamedTuple):
    """Logits [B, S, V], and the Routing of each mixture layer that ran, first layer first."""

    logits: Tensor
    routings: tuple[Routing, ...]


class Network(nn.Module):
    """A language model whose `head` shares the weights of `embed` where `cfg.head.tied`.

    They stay one tensor when the model gets other memory: from `to_empty`, which ends the tie of
    tensors on meta, or from `load_state_dict(assign=True)`.

    Attributes:
        moe_layers: layer number of each Routing that `forward` returns; a decoder's layers count
            on from those of its encoder.
        checkpoint_activations: recompute each block in the backward instead of keeping its
            activations.
    """

    cfg: Any
    head: Linear

    def __init__(self, cfg: NetworkConfig, scale: float = 1.0) -> None:
        """Begin with the embedding, of random vectors; `add_head` ends it."""
        super().__init__()
        self.cfg = cfg
        self.checkpoint_activations = False
        layers = (layer for stack in cfg.stacks() for layer in stack.layers)
        self.moe_layers = tuple(n for n, layer in enumerate(layers) if layer.mixture)
        self.embed = Embedding(cfg.vocab_size, cfg.dim, scale)
        self.register_load_state_dict_post_hook(_tie)  # type: ignore[no-untyped-call]

    def add_head(self, scale: float = 1.0) -> None:
        """The last layer, from the hidden state to the logits."""
        self.head = Linear(self.cfg.dim, self.cfg.vocab_size, self.cfg.head.bias, scale)
        _tie(self)

    def embedded(self, tokens_BS: Tensor) -> Tensor:
        """What the first block reads: [B, S] → [B, S, D]."""
        return self.scaled(self.embed(tokens_BS))

    def scaled(self, rows_ID: Tensor) -> Tensor:
        """Rows of the embedding as the first block reads them."""
        scale = self.cfg.head.embed_scale
        return rows_ID if scale == 1 else rows_ID * scale

    def mixtures(self) -> list[MoE]:
        """The mixture layers, in the order of the Routings."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def recomputes(self) -> bool:
        """Whether blocks keep no activations now."""
        return self.checkpoint_activations and self.training

    def logits(self, x_BSD: Tensor) -> Tensor:
        """Predict from the last hidden state, normalised: [B, S, D] → [B, S, V]."""
        if self.cfg.head.scale != 1:
            x_BSD = x_BSD * self.cfg.head.scale
        logits_BSV: Tensor = self.head(x_BSD)
        return logits_BSV

    def reset_parameters(self) -> None:
        """Draw new weights: each module its own."""
        _tie(self)
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None and module is not self:
                reset()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        _tie(self)
        return self


def _tie(network: nn.Module, _: object = None) -> None:
    assert isinstance(network, Network)
    if network.cfg.head.tied and isinstance(network.head, Linear):  # else it is packed
        network.head.weight = network.embed.weight


def check_tokens(name: str, tokens_BS: Tensor, valid_BS: Tensor | None) -> None:
    """Refuse what is not a batch of tokens.

    Raises:
        ShapeError: ids are not [B, S] integers, or the mask does not fit.
    """
    if tokens_BS.dim() != 2 or tokens_BS.is_floating_point():
        raise ShapeError(
            f"the {name} takes int64 ids [B, S]; given {tokens_BS.dtype} {list(tokens_BS.shape)}"
        )
    if valid_BS is not None and (valid_BS.shape != tokens_BS.shape or valid_BS.dtype != torch.bool):
        raise ShapeError(
            f"the {name}'s valid mask must be bool {list(tokens_BS.shape)}, False for padding; "
            f"given {valid_BS.dtype} {list(valid_BS.shape)}"
        )
