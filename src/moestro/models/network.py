"""What the decoder and the encoder-decoder share: a head that may be tied, and one reset of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from moestro.models.linear import Embedding, Linear


class Network(nn.Module):
    """A language model whose `head` shares the weights of `embed` where `cfg.head.tied`.

    They stay one tensor when the model gets other memory: from `to_empty`, which ends the tie of
    tensors on meta, or from `load_state_dict(assign=True)`.
    """

    cfg: Any
    embed: Embedding
    head: Linear

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_tie)  # type: ignore[no-untyped-call]

    def reset_parameters(self) -> None:
        """Draw all weights anew: each module inside its own."""
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
