"""Gated DeltaNet: a layer that looks back through a state of fixed size instead of attention.

Yang, Kautz and Hatamizadeh 2024, as in Qwen3-Next: a short convolution before the delta rule, and a
gated norm after it. Letters: B batch, S new positions, D width, H value heads, G heads of queries
and keys, A width of a key, O width of a value, W width of the convolution, I its channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moestro.config import NetworkConfig
from moestro.kernels import delta
from moestro.models.cache import StateCache
from moestro.models.conv import causal_convolution, draw
from moestro.models.linear import Linear, PlainLinear
from moestro.models.norms import RMSNorm

# Added to the squared length of queries and keys.
LENGTH_EPS = 1e-6
# Where decay starts, as in Mamba-2: rates from 1 to 16, times from 0.001 to 0.1.
RATES, TIMES = (1.0, 16.0), (1e-3, 1e-1)


class DeltaNet(nn.Module):
    """Convolution, gated delta rule, gated norm; causal.

    Args:
        cfg: of the model.
        out_scale: of the output's weights at the start.
    """

    def __init__(self, cfg: NetworkConfig, out_scale: float = 1.0) -> None:
        super().__init__()
        settings = cfg.attention.delta
        assert settings is not None
        self.settings = settings
        # Queries, keys, values, and the gates of the outputs.
        self.qkvz = Linear(cfg.dim, settings.conv_channels + settings.value_width)
        # What β and the decay are made of; too narrow to be packed.
        self.ba = PlainLinear(cfg.dim, 2 * settings.value_heads)
        self.conv_weight = nn.Parameter(torch.empty(settings.conv_channels, 1, settings.conv_width))
        self.log_rate = nn.Parameter(torch.empty(settings.value_heads))
        self.time_bias = nn.Parameter(torch.empty(settings.value_heads))
        self.norm = RMSNorm(settings.value_dim, cfg.norm.eps)
        self.out = Linear(settings.value_width, cfg.dim, scale=out_scale)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the convolution, and how fast each head's state decays, anew."""
        draw(self.conv_weight)
        nn.init.uniform_(self.log_rate, RATES[0], RATES[1])
        nn.init.uniform_(self.time_bias, math.log(TIMES[0]), math.log(TIMES[1]))
        with torch.no_grad():
            self.log_rate.log_()
            # softplus(time_bias) is the time that was drawn.
            self.time_bias.copy_(self.time_bias.exp().expm1().log())

    def forward(
        self,
        x_BSD: Tensor,
        valid_BS: Tensor | None = None,
        cache: StateCache | None = None,
    ) -> Tensor:
        """Mix what came before into each position. [B, S, D] → [B, S, D].

        Args:
            x_BSD: normalised hidden states.
            valid_BS: bool, False for padding, which leaves the state as it is.
            cache: of earlier positions; set to the last of the new ones.
        """
        settings = self.settings
        if valid_BS is not None:
            x_BSD = x_BSD.masked_fill(~valid_BS[..., None], 0)
        qkv_BSI, z_BSO = self.qkvz(x_BSD).split_with_sizes(
            [settings.conv_channels, settings.value_width], dim=-1
        )
        held = () if cache is None else cache.held(len(x_BSD))
        before_BWI, state_BHAO = held or (None, None)
        convolved_BSI, last_BWI = causal_convolution(qkv_BSI, self.conv_weight, before_BWI)
        q_BSGA, k_BSGA, v_BSHO = self._heads(F.silu(convolved_BSI))
        log_decay_BSH, beta_BSH = self._rates(x_BSD, valid_BS)
        with torch.autocast(x_BSD.device.type, enabled=False):  # a state adds up its rounding
            y_BSHO, state_BHAO = delta.gated_delta(
                q_BSGA, k_BSGA, v_BSHO, log_decay_BSH, beta_BSH, state_BHAO
            )
        if cache is not None:
            cache.keep(last_BWI, state_BHAO)
        z_BSHO = z_BSO.view(y_BSHO.shape)
        gated_BSHO = self.norm(y_BSHO.to(z_BSHO.dtype)) * F.silu(z_BSHO)
        out: Tensor = self.out(gated_BSHO.flatten(2))
        return out

    def _heads(self, qkv_BSI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of length 1 / sqrt(A), keys of length 1, and values."""
        settings = self.settings
        keys = settings.key_width
        q_BSI, k_BSI, v_BSI = qkv_BSI.split_with_sizes([keys, keys, settings.value_width], dim=-1)
        q_BSGA, k_BSGA = (
            _unit(x.view(*x.shape[:2], settings.key_heads, settings.key_dim))
            for x in (q_BSI, k_BSI)
        )
        v_BSHO = v_BSI.view(*v_BSI.shape[:2], settings.value_heads, settings.value_dim)
        return q_BSGA * settings.key_dim**-0.5, k_BSGA, v_BSHO

    def _rates(self, x_BSD: Tensor, valid_BS: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ln α and β in at least fp32, [B, S, H] each; both 0 for padding."""
        ba_BSI: Tensor = self.ba(x_BSD)
        ba_BSI = ba_BSI.to(torch.promote_types(ba_BSI.dtype, torch.float32))
        b_BSH, a_BSH = ba_BSI.chunk(2, dim=-1)
        rate_H = self.log_rate.to(a_BSH.dtype).exp()
        log_decay_BSH = -rate_H * F.softplus(a_BSH + self.time_bias)
        beta_BSH = b_BSH.sigmoid()
        if valid_BS is None:
            return log_decay_BSH, beta_BSH
        padding_BS1 = ~valid_BS[..., None]
        return log_decay_BSH.masked_fill(padding_BS1, 0), beta_BSH.masked_fill(padding_BS1, 0)


def _unit(x_BSGA: Tensor) -> Tensor:
    """Vectors of length 1, in at least fp32."""
    x_BSGA = x_BSGA.to(torch.promote_types(x_BSGA.dtype, torch.float32))
    return x_BSGA * (x_BSGA.square().sum(-1, keepdim=True) + LENGTH_EPS).rsqrt()
