"""Attention against an explicit softmax, one query at a time, with complex-number rotation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.config import ModelConfig
from moestro.kernels.pointwise import rotate
from moestro.models.attention import Attention, KVCache, rotary


def cfg_of(dim=16, **attention):
    return ModelConfig(dim=dim, attention={"num_heads": 4, "context": 32, **attention})


def turn(x_A, position, theta):
    """RoPE as the paper writes it: pair (i, i + A/2) is a complex number turned by m·θ^(-2i/A)."""
    half = len(x_A) // 2
    pairs = torch.complex(x_A[:half], x_A[half:])
    angles = torch.tensor([position * theta ** (-2 * i / len(x_A)) for i in range(half)])
    turned = pairs * torch.polar(torch.ones(half, dtype=x_A.dtype), angles.to(x_A.dtype))
    return torch.cat([turned.real, turned.imag])


def rms(x_A, weight_A, eps):
    return x_A * (x_A.square().mean() + eps).rsqrt() * weight_A


def attention_by_loop(module, cfg, x_SD, valid_S=None):
    heads, groups, width = cfg.attention.num_heads, cfg.num_kv_heads, cfg.head_dim
    theta, context = cfg.attention.positions.theta, cfg.attention.context
    projected = x_SD @ module.qkv.weight.T
    q, k, v = projected.split([heads * width, groups * width, groups * width], dim=1)
    rows = []
    for s in range(len(x_SD)):
        parts = []
        for h in range(heads):
            g = h // (heads // groups)
            query = q[s, h * width : (h + 1) * width]
            if cfg.attention.qk_norm == "head":
                query = rms(query, module.q_norm.weight, cfg.norm.eps)
            query = turn(query, s, theta)
            scores, values = [], []
            for p in range(max(0, s - context + 1), s + 1):
                if valid_S is not None and not valid_S[p] and p != s:
                    continue
                key = k[p, g * width : (g + 1) * width]
                if cfg.attention.qk_norm == "head":
                    key = rms(key, module.k_norm.weight, cfg.norm.eps)
                scores.append(query @ turn(key, p, theta) / math.sqrt(width))
                values.append(v[p, g * width : (g + 1) * width])
            exps = (torch.stack(scores) - max(scores)).exp()
            parts.append((exps / exps.sum()) @ torch.stack(values))
        rows.append(module.out.weight @ torch.cat(parts))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "attention",
    [
        {},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "qk_norm": "head"},
        {"qk_norm": "head", "head_dim": 6},
        {"positions": {"theta": 50.0}},
        {"context": 3},
        {"context": 1, "num_kv_heads": 2},
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_loop(attention, padded):
    cfg = cfg_of(**attention)
    module = Attention(cfg).double()
    if cfg.attention.qk_norm == "head":
        torch.nn.init.normal_(module.q_norm.weight)
        torch.nn.init.normal_(module.k_norm.weight)
    x_BSD = torch.randn(2, 9, 16, dtype=torch.float64)
    valid_BS = None
    if padded:
        valid_BS = torch.rand(2, 9) < 0.7
    y_BSD = module(x_BSD, rotary(0, 9, cfg, x_BSD.device), valid_BS)
    for b in range(2):
        expected_SD = attention_by_loop(module, cfg, x_BSD[b], valid_BS[b] if padded else None)
        # The angles are stored in fp32.
        torch.testing.assert_close(y_BSD[b], expected_SD, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 5000), st.integers(0, 3000))
def test_rotation_keeps_lengths_and_depends_on_distance(position, shift):
    cfg = cfg_of()
    q, k = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4)

    def score(query_at, key_at):
        angles = [rotary(at, 1, cfg, q.device) for at in (query_at, key_at)]
        return (rotate(q, *angles[0]) * rotate(k, *angles[1])).sum()

    near, far = score(position + 3, position), score(position + shift + 3, position + shift)
    torch.testing.assert_close(near, far, rtol=1e-3, atol=2e-3)
    turned = rotate(q, *rotary(position, 1, cfg, q.device))
    torch.testing.assert_close(turned.norm(), q.norm())


def test_far_positions_keep_their_precision():
    """fp32 angles at position 100 000 would be off by 0.004; these come from fp64."""
    angles = rotary(100_000, 1, cfg_of(), torch.device("cpu"))
    exact = [math.cos(100_000 * 10_000.0 ** (-i / 4)) for i in (0, 2)]
    assert angles.cos_SA[0].tolist() == pytest.approx(exact, abs=1e-6)


def test_the_cache_stays_bounded():
    cfg = cfg_of(context=5)
    cache = KVCache(1, 5).layers[0]
    module = Attention(cfg)
    for start in range(0, 60, 3):
        module(torch.randn(2, 3, 16), rotary(start, 3, cfg, torch.device("cpu")), cache=cache)
        assert cache.keys_BPGA.shape[1] == cache.values_BPGA.shape[1] == min(start + 3, 5)
    # What it keeps is a view of the last call's keys: context + 3 positions of 2 x 16 floats.
    for kept in (cache.keys_BPGA, cache.values_BPGA):
        assert kept.untyped_storage().nbytes() <= (5 + 3) * 2 * 16 * 4


def test_layout_of_the_weights():
    module = Attention(cfg_of(dim=24, num_kv_heads=2, qk_norm="head", head_dim=8))
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {
        "qkv.weight": ((4 + 2 + 2) * 8, 24),
        "out.weight": (24, 32),
        "q_norm.weight": (8,),
        "k_norm.weight": (8,),
    }
