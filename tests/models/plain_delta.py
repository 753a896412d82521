"""A gated DeltaNet written out: one token and one head at a time."""

import torch
from torch.nn import functional as F


def plain_delta(module, cfg, x_SD):
    """Outputs [S, D] of one text, in float64."""
    delta, eps = cfg.attention.delta, cfg.norm.eps
    shared = delta.value_heads // delta.key_heads
    projected = F.linear(x_SD, module.qkvz.weight)
    qkv, z = projected[:, : delta.conv_channels], projected[:, delta.conv_channels :]
    b, a = F.linear(x_SD, module.ba.weight).split(delta.value_heads, dim=1)
    states = [torch.zeros(delta.value_dim, delta.key_dim).double() for _ in range(shared * 99)]
    outputs = []
    for t in range(len(x_SD)):
        mixed = 0
        for w in range(delta.conv_width):
            past = t - delta.conv_width + 1 + w
            mixed = mixed + (qkv[past] * module.conv_weight[:, 0, w] if past >= 0 else 0)
        mixed = mixed * mixed.sigmoid()
        q, k, v = mixed.split([delta.key_width, delta.key_width, delta.value_width])
        heads = []
        for h in range(delta.value_heads):
            g = h // shared
            query, key = (
                x[g * delta.key_dim :][: delta.key_dim] / _length(x[g * delta.key_dim :], delta)
                for x in (q, k)
            )
            value = v[h * delta.value_dim :][: delta.value_dim]
            beta = b[t, h].sigmoid()
            alpha = -module.log_rate[h].exp() * (1 + (a[t, h] + module.time_bias[h]).exp()).log()
            erased = torch.eye(delta.key_dim).double() - beta * torch.outer(key, key)
            states[h] = alpha.exp() * states[h] @ erased + beta * torch.outer(value, key)
            y = states[h] @ query / delta.key_dim**0.5
            y = y * (y.square().mean() + eps).rsqrt() * module.norm.weight
            gate = z[t, h * delta.value_dim :][: delta.value_dim]
            heads.append(y * gate * gate.sigmoid())
        outputs.append(F.linear(torch.cat(heads), module.out.weight))
    return torch.stack(outputs)


def _length(x, delta):
    return (x[: delta.key_dim].square().sum() + 1e-6).sqrt()
