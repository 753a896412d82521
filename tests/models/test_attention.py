"""Attention against an explicit softmax, one query at a time, with complex-number rotation."""

import math

import pytest
import torch

from moestro.config import ModelConfig
from moestro.models.attention import Attention
from moestro.models.cache import LayerCache
from moestro.models.relative import bucket
from moestro.models.rotary import rotary

CPU = torch.device("cpu")
YARN = {"kind": "yarn", "factor": 4.0, "original_context": 16}
GATED = {
    "kind": "delta",
    "key_heads": 1,
    "value_heads": 1,
    "key_dim": 2,
    "value_dim": 2,
    "full_every": 1,
}
CASES = [
    {},
    {"num_kv_heads": 2},
    {"num_kv_heads": 1, "qk_norm": "head"},
    {"qk_norm": "head", "head_dim": 6},
    {"qk_norm": "full", "num_kv_heads": 2},
    {"positions": {"theta": 50.0}},
    {"positions": {"theta": 50.0, "scaling": {"kind": "linear", "factor": 3.0}}},
    {"context": 3},
    {"context": 1, "num_kv_heads": 2},
    {"bias": "qkv", "num_kv_heads": 2},
    {"bias": "all"},
    {"sinks": True, "num_kv_heads": 2},
    {"window": {"size": 4}},
    {"window": {"size": 4, "full_every": 1}},
    {"window": {"size": 4}, "sinks": True, "bias": "all", "num_kv_heads": 2},
    {"positions": {"theta": 50.0, "fraction": 0.5}, "num_kv_heads": 2},
    {"window": GATED},
    {"window": GATED, "bias": "all", "num_kv_heads": 2, "qk_norm": "head"},
    {"window": GATED, "sinks": True, "qk_norm": "full"},
    {"positions": {"kind": "relative", "buckets": 8, "max_distance": 6}},
    {"positions": {"kind": "relative", "buckets": 4, "max_distance": 3}, "window": {"size": 5}},
]


def module_of(dim=16, **attention):
    cfg = ModelConfig(dim=dim, attention={"num_heads": 4, "context": 32, **attention})
    module = Attention(cfg, *cfg.stacks()).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return cfg, module


def angles_of(cfg, start, length):
    if cfg.attention.positions.kind == "relative":
        return None
    return rotary(start, length, cfg, CPU, torch.float64)


def turn(x_A, position, positions):
    """RoPE as the paper writes it: pair (i, i + A/2) is a complex number turned by m·θ^(-2i/A)."""
    if positions.kind == "relative":
        return x_A
    width = int(len(x_A) * positions.fraction)
    half = width // 2
    pairs = torch.complex(x_A[:half], x_A[half:width])
    slow = positions.scaling.factor if positions.scaling else 1
    angles = [position / slow * positions.theta ** (-2 * i / width) for i in range(half)]
    turned = pairs * torch.polar(
        torch.ones(half).double(), torch.tensor(angles, dtype=torch.float64)
    )
    return torch.cat([turned.real, turned.imag, x_A[width:]])


def rms(x_A, weight_A, eps):
    return x_A * (x_A.square().mean() + eps).rsqrt() * weight_A


def projected_by_loop(module, cfg, x_SD):
    """Queries [S][H], keys [S][G] and values [S][G], before they turn; gates [S][H·A]."""
    heads, groups, width = cfg.attention.num_heads, cfg.num_kv_heads, cfg.head_dim
    kind, eps = cfg.attention.qk_norm, cfg.norm.eps
    rows = [[], [], [], []]
    for x_D in x_SD:
        qkv = module.qkv.weight @ x_D
        if cfg.attention.bias != "none":
            qkv = qkv + module.qkv.bias
        gates = torch.ones(())
        if cfg.attention.delta:
            both = qkv[: 2 * heads * width].view(heads, 2, width)
            gates = both[:, 1].flatten().sigmoid()
            qkv = torch.cat([both[:, 0].flatten(), qkv[2 * heads * width :]])
        q, k, v = qkv.split([heads * width, groups * width, groups * width])
        if kind == "full":
            q, k = rms(q, module.q_norm.weight, eps), rms(k, module.k_norm.weight, eps)
        q, k, v = (list(vector.split(width)) for vector in (q, k, v))
        if kind == "head":
            q = [rms(head, module.q_norm.weight, eps) for head in q]
            k = [rms(head, module.k_norm.weight, eps) for head in k]
        for row, vectors in zip(rows, (q, k, v, gates), strict=True):
            row.append(vectors)
    return rows


def attention_by_loop(module, cfg, x_SD, valid_S=None, layer=0):
    heads, groups, width = cfg.attention.num_heads, cfg.num_kv_heads, cfg.head_dim
    positions = cfg.attention.positions
    reach = min(cfg.attention.context, cfg.window(layer) or 1_000)
    queries, keys, values, gates = projected_by_loop(module, cfg, x_SD)
    rows = []
    for s in range(len(x_SD)):
        parts = []
        for h in range(heads):
            g = h // (heads // groups)
            query = turn(queries[s][h], s, positions)
            seen = range(max(0, s - reach + 1), s + 1)
            seen = [p for p in seen if valid_S is None or valid_S[p] or p == s]
            scores = [query @ turn(keys[p][g], p, positions) for p in seen]
            if positions.kind == "relative":
                table, sizes = module.relative.weight, (positions.buckets, positions.max_distance)
                own = [bucket(torch.tensor(p - s), *sizes, bidirectional=False) for p in seen]
                scores = [score + table[n, h] for score, n in zip(scores, own, strict=True)]
            else:
                scores = [score / math.sqrt(width) for score in scores]
            exps = torch.stack(scores).exp()
            total = exps.sum()
            if cfg.attention.sinks:
                total = total + module.sinks[h].exp()
            parts.append((exps / total) @ torch.stack([values[p][g] for p in seen]))
        y_D = module.out.weight @ (torch.cat(parts) * gates[s])
        rows.append(y_D + module.out.bias if cfg.attention.bias == "all" else y_D)
    return torch.stack(rows)


@pytest.mark.parametrize("attention", CASES, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_loop(attention, padded):
    """Outputs, and the gradients of the input and of every parameter."""
    cfg, module = module_of(**attention)
    x_BSD = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    valid_BS = torch.rand(2, 9) < 0.7 if padded else None
    y_BSD = module(x_BSD, angles_of(cfg, 0, 9), valid_BS)
    expected_BSD = torch.stack(
        [
            attention_by_loop(module, cfg, x_BSD[b], valid_BS[b] if padded else None)
            for b in range(2)
        ]
    )
    torch.testing.assert_close(y_BSD, expected_BSD)
    names, leaves = zip(("input", x_BSD), *module.named_parameters(), strict=True)
    grad = torch.randn_like(y_BSD)
    ours = torch.autograd.grad(y_BSD, leaves, grad)
    exact = torch.autograd.grad(expected_BSD, leaves, grad)
    for name, a, b in zip(names, ours, exact, strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("attention", [*CASES, {"positions": {"scaling": YARN}}], ids=str)
@pytest.mark.parametrize("chunks", [[1] * 20, [6, 1, 1, 5, 7], [3, 17]], ids=str)
def test_the_cache_gives_what_the_whole_gives(attention, chunks):
    cfg, module = module_of(**attention)
    x_BSD = torch.randn(2, 20, 16, dtype=torch.float64)
    whole_BSD = module(x_BSD, angles_of(cfg, 0, 20))
    cache, start, parts = LayerCache(module.window), 0, []
    with torch.no_grad():
        for part in x_BSD.split(chunks, dim=1):
            parts.append(module(part, angles_of(cfg, start, part.shape[1]), cache=cache))
            start += part.shape[1]
    torch.testing.assert_close(torch.cat(parts, 1), whole_BSD)


def test_a_shared_bias_is_one_of_its_own():
    """For the last keys of a longer stretch, since another layer may look back further."""
    positions = {"kind": "relative", "buckets": 8, "max_distance": 6}
    cfg, own = module_of(positions=positions)
    attention = {**cfg.attention.model_dump(), "positions": {**positions, "shared": True}}
    cfg = ModelConfig(dim=16, attention=attention)
    shared = Attention(cfg, *cfg.stacks()).double()
    assert shared.relative is None
    missing = shared.load_state_dict(own.state_dict(), strict=False)
    assert missing.unexpected_keys == ["relative.weight"]
    x_BSD = torch.randn(1, 5, 16, dtype=torch.float64)
    bias_HSP = own.relative(range(7, 12), range(12))
    torch.testing.assert_close(shared(x_BSD, bias_HSP=bias_HSP), own(x_BSD))


def test_16_bits():
    cfg, module = module_of(sinks=True, window={"size": 4}, num_kv_heads=2, bias="all")
    x_BSD = torch.randn(2, 9, 16, dtype=torch.float64)
    exact = module(x_BSD, angles_of(cfg, 0, 9))
    low = module.bfloat16()(x_BSD.bfloat16(), rotary(0, 9, cfg, CPU))
    assert low.dtype == torch.bfloat16
    assert (low - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("attention", "extra"),
    [
        ({}, {}),
        ({"bias": "qkv"}, {"qkv.bias": (64,)}),
        ({"bias": "all"}, {"qkv.bias": (64,), "out.bias": (24,)}),
        ({"qk_norm": "head"}, {"q_norm.weight": (8,), "k_norm.weight": (8,)}),
        ({"qk_norm": "full"}, {"q_norm.weight": (32,), "k_norm.weight": (16,)}),
        ({"sinks": True}, {"sinks": (4,)}),
        ({"window": GATED}, {"qkv.weight": ((2 * 4 + 2 + 2) * 8, 24)}),
        ({"positions": {"kind": "relative", "buckets": 6}}, {"relative.weight": (6, 4)}),
        ({"positions": {"kind": "relative", "shared": True}}, {}),
    ],
)
def test_layout_of_the_weights(attention, extra):
    _, module = module_of(dim=24, num_kv_heads=2, head_dim=8, **attention)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {"qkv.weight": ((4 + 2 + 2) * 8, 24), "out.weight": (24, 32), **extra}


def test_scores_start_small_where_nothing_scales_them():
    """Relative positions: as large as with the scale of 1/sqrt(A)."""
    cfg = ModelConfig(dim=256, attention={"positions": {"kind": "relative"}})
    module = Attention(cfg, *cfg.stacks())
    module.reset_parameters()
    q, k = (module.qkv.weight[rows].std().item() for rows in (slice(0, 256), slice(256, 512)))
    assert q == pytest.approx(k / math.sqrt(64), rel=0.05)
