"""Causal convolutions of a few tokens, and the gated one that stands in place of attention in LFM2.

Letters: B batch, S new positions, P with those before them, D width, I channels, W width of the
convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moestro.config import NetworkConfig
from moestro.models.cache import StateCache
from moestro.models.linear import Linear


class ShortConv(nn.Module):
    """y = W · (c ⊙ conv(b ⊙ x)), where b, c and x are projections of the input (LFM2, 2025).

    Args:
        cfg: of the model.
        out_scale: of the output's weights at the start.
    """

    def __init__(self, cfg: NetworkConfig, out_scale: float = 1.0) -> None:
        super().__init__()
        settings = cfg.attention.conv
        assert settings is not None
        self.inputs = Linear(cfg.dim, 3 * cfg.dim)  # b, c, x
        self.conv_weight = nn.Parameter(torch.empty(cfg.dim, 1, settings.width))
        self.out = Linear(cfg.dim, cfg.dim, scale=out_scale)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the convolution anew."""
        draw(self.conv_weight)

    def forward(
        self,
        x_BSD: Tensor,
        valid_BS: Tensor | None = None,
        cache: StateCache | None = None,
    ) -> Tensor:
        """Mix the last W positions into each. [B, S, D] → [B, S, D].

        Args:
            x_BSD: normalised hidden states.
            valid_BS: bool, False for padding, which counts as zero.
            cache: of earlier positions; set to the last of the new ones.
        """
        if valid_BS is not None:
            x_BSD = x_BSD.masked_fill(~valid_BS[..., None], 0)
        b_BSD, c_BSD, x_BSD = self.inputs(x_BSD).chunk(3, dim=-1)
        held = () if cache is None else cache.held(len(x_BSD))
        y_BSD, last_BWD = causal_convolution(b_BSD * x_BSD, self.conv_weight, *held)
        if cache is not None:
            cache.keep(last_BWD)
        out: Tensor = self.out(c_BSD * y_BSD)
        return out


def draw(weight_I1W: Tensor) -> None:
    """The start of a convolution's weights, as torch's own: a uniform within 1 / sqrt(W)."""
    bound = weight_I1W.shape[-1] ** -0.5
    nn.init.uniform_(weight_I1W, -bound, bound)


def causal_convolution(
    x_BSI: Tensor, weight_I1W: Tensor, before_BWI: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each channel's sum of its last W numbers by their weights.

    Args:
        x_BSI: the new positions.
        weight_I1W: of the oldest number first.
        before_BWI: the W - 1 positions before; None: zeros, before the first of a text.

    Returns:
        The sums [B, S, I], and the last W - 1 positions, for the next call.
    """
    before = weight_I1W.shape[-1] - 1
    if before_BWI is None:
        joined_BPI = F.pad(x_BSI, (0, 0, before, 0))
    else:
        joined_BPI = torch.cat([before_BWI.to(x_BSI.dtype), x_BSI], dim=1)
    y_BIS = F.conv1d(
        joined_BPI.transpose(1, 2), weight_I1W.to(joined_BPI.dtype), groups=len(weight_I1W)
    )
    return y_BIS.transpose(1, 2), joined_BPI[:, joined_BPI.shape[1] - before :]
