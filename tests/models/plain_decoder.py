"""The decoder's blocks written out in plain PyTorch, in float64."""

import torch
from torch.nn import functional as F

from moestro.kernels import reference
from moestro.models.relative import bucket
from moestro.models.rotary import rotary

from .plain_delta import plain_delta


def plain_norm(x, module, eps):
    if hasattr(module, "bias"):
        x = x - x.mean(-1, keepdim=True)
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * module.weight + module.bias
    gain = 1 + module.weight if module.zero_centred else module.weight
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * gain


def plain_heads(module, cfg, x_BSD):
    """Queries, keys, values [B, S, H or G, A], normalised where they are; gates [B, S, H·A]."""
    heads, groups, width = cfg.attention.num_heads, cfg.num_kv_heads, cfg.head_dim
    qkv = F.linear(x_BSD, module.qkv.weight, module.qkv.bias)
    gates = 1
    if cfg.attention.delta:
        both = qkv[..., : 2 * heads * width].unflatten(-1, (heads, 2, width))
        gates = both[..., 1, :].flatten(2).sigmoid()
        qkv = torch.cat([both[..., 0, :].flatten(2), qkv[..., 2 * heads * width :]], -1)
    parts = qkv.split([heads * width, groups * width, groups * width], dim=-1)
    if cfg.attention.qk_norm == "full":
        norms = (module.q_norm, module.k_norm)
        normed = [plain_norm(x, n, cfg.norm.eps) for x, n in zip(parts, norms, strict=False)]
        parts = [*normed, parts[2]]
    q, k, v = (x.unflatten(-1, (-1, width)) for x in parts)
    if cfg.attention.qk_norm == "head":
        q, k = (plain_norm(x, n, cfg.norm.eps) for x, n in ((q, module.q_norm), (k, module.k_norm)))
    return q, k, v, gates


def plain_attention(module, cfg, x_BSD, layer, shared):
    """Dense [S, S] scores, softmax, and rotation by complex numbers."""
    settings, length, width = cfg.attention, x_BSD.shape[1], cfg.head_dim
    q, k, v, gates = plain_heads(module, cfg, x_BSD)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    bias, scale = 0, width**-0.5
    if settings.positions.kind == "relative":
        own = bucket(-distance, 8, 6, bidirectional=False)
        bias, scale = (shared or module.relative).weight[own].permute(2, 0, 1), 1
    else:
        scale = settings.positions.score_scale or scale
        width = int(width * settings.positions.fraction)
        frequencies = settings.positions.theta ** (-torch.arange(0, width, 2).double() / width)
        turns = torch.polar(torch.ones(()).double(), torch.arange(length)[:, None] * frequencies)

        def turn(x):
            pairs = torch.complex(x[..., : width // 2], x[..., width // 2 : width])
            pairs = pairs * turns[:, None]
            return torch.cat([pairs.real, pairs.imag, x[..., width:]], -1)

        if cfg.is_rotary(layer):
            q, k = turn(q), turn(k)
        growth = settings.positions.temperature
        if settings.qk_norm == "unit" and cfg.is_rotary(layer):
            q, k = (x / (x.square().mean(-1, keepdim=True) + cfg.norm.eps).sqrt() for x in (q, k))
        if growth is not None and not cfg.is_rotary(layer):
            passed = torch.arange(1, length + 1).div(growth.length, rounding_mode="floor").double()
            q = q * (1 + growth.scale * (1 + passed).log())[:, None, None]
        if settings.qk_norm == "rotated":
            norms = ((q, module.q_norm), (k, module.k_norm))
            q, k = (plain_norm(x, norm, cfg.norm.eps) for x, norm in norms)
    k, v = (t.repeat_interleave(settings.num_heads // cfg.num_kv_heads, dim=2) for t in (k, v))
    scores = torch.einsum("bshd,bphd->bhsp", q, k) * scale + bias
    seen = (distance >= 0) & (distance < min(settings.context, cfg.window(layer) or 99))
    if cfg.window(layer) and settings.window.chunked:
        pieces = torch.arange(length) // cfg.window(layer)
        seen = (distance >= 0) & (pieces[:, None] == pieces)
    scores = scores.masked_fill(~seen, -torch.inf)
    sinks = module.sinks[:, None, None] if settings.sinks else torch.tensor(-torch.inf)
    total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), sinks)
    mixed = torch.einsum("bhsp,bphd->bshd", (scores - total).exp(), v).flatten(2) * gates
    return F.linear(mixed, module.out.weight, module.out.bias)


def plain_conv(module, x_SD):
    """LFM2's gated convolution, token by token."""
    b, c, x = F.linear(x_SD, module.inputs.weight).chunk(3, dim=-1)
    weight, outputs = module.conv_weight[:, 0], []
    for t in range(len(x_SD)):
        past = [(t - n, weight[:, -1 - n]) for n in range(weight.shape[1]) if t >= n]
        outputs.append(c[t] * sum(b[n] * x[n] * w for n, w in past))
    return F.linear(torch.stack(outputs), module.out.weight)


def plain_ffn(weights, x_TD, activation):
    hidden = reference.activate(x_TD @ weights.gate_up[0].T, activation)
    return hidden @ weights.down[0].T


def plain_decoder(model, tokens_BS):
    """Logits, and (experts, weights) chosen by each mixture layer, in float64."""
    cfg, eps, added = model.cfg, model.cfg.norm.eps, model.cfg.norm.residual_scale
    x = model.embed.weight[tokens_BS] * cfg.head.embed_scale
    for n, block in enumerate(model.blocks):
        h = plain_norm(x, block.attention_norm, eps)
        if cfg.attention.latent:  # It has its own tests.
            x = x + block.attention(h, rotary(0, x.shape[1], cfg, x.device, x.dtype))
        elif cfg.is_delta_layer(n):
            x = x + torch.stack([plain_delta(block.delta, cfg, h_SD) for h_SD in h])
        elif cfg.is_conv_layer(n):
            x = x + torch.stack([plain_conv(block.conv, h_SD) for h_SD in h])
        else:
            x = x + added * plain_attention(block.attention, cfg, h, n, model.relative)
        h_TD = plain_norm(x, block.ffn_norm, eps).flatten(0, 1)
        if not cfg.is_moe_layer(n):
            x = x + added * plain_ffn(block.ffn, h_TD, cfg.dense.activation).view_as(x)
            continue
        _, routing = block.ffn(h_TD, token_ids=tokens_BS.flatten())
        rows_TD, weights_R = h_TD, routing.weights_R
        if cfg.moe.router.weighs == "input":
            rows_TD, weights_R = h_TD * weights_R[:, None], torch.ones_like(weights_R)
        y_TD = reference.mixture(
            rows_TD,
            routing.tokens_R,
            routing.experts_R,
            weights_R,
            block.ffn.experts.gate_up,
            block.ffn.experts.down,
            cfg.moe.activation,
        )
        if cfg.moe.shared:
            gate_T1 = (h_TD @ block.ffn.shared_gate.weight.T).sigmoid()
            y_TD = y_TD + gate_T1 * plain_ffn(block.ffn.shared, h_TD, cfg.moe.activation)
        x = x + added * y_TD.view_as(x)
    head = model.embed.weight if cfg.head.tied else model.head.weight
    return F.linear(plain_norm(x, model.norm, eps) * cfg.head.scale, head, model.head.bias)
