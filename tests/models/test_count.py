"""Counted parameters and FLOPs against real modules and torch's own FLOP counter."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moestro.config import ModelConfig
from moestro.errors import ConfigError
from moestro.models.count import count
from moestro.models.decoder import Decoder
from moestro.models.twin import dense_twin

ACTIVATIONS = st.sampled_from(["swiglu", "geglu", "relu", "gelu"])


@st.composite
def model_settings(draw, mixture=None):
    """Any small model; `mixture` True or False forces one or none."""
    heads = draw(st.sampled_from([1, 2, 4]))
    num_experts = draw(st.integers(1, 6))
    num_layers = draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["softmax", "sigmoid", "noisy_top_k", "expert_choice", "hash"]))
    shared = {"hidden_dim": draw(st.integers(1, 9)), "gate": draw(st.booleans())}
    moe = {
        "hidden_dim": draw(st.integers(1, 9)),
        "num_experts": num_experts,
        "top_k": draw(st.integers(1, num_experts)),
        "activation": draw(ACTIVATIONS),
        "router": {"kind": kind},
        "shared": draw(st.sampled_from([None, shared])),
    }
    has_mixture = draw(st.booleans()) if mixture is None else mixture
    return ModelConfig(
        vocab_size=draw(st.integers(1, 50)),
        dim=8 * draw(st.integers(1, 3)),
        num_layers=num_layers,
        dense={"hidden_dim": draw(st.integers(1, 30)), "activation": draw(ACTIVATIONS)},
        attention={
            "num_heads": heads,
            "num_kv_heads": draw(st.sampled_from([None, 1, heads])),
            "head_dim": draw(st.sampled_from([None, 6])),
            "qk_norm": draw(st.sampled_from(["none", "head"])),
        },
        moe=moe if has_mixture else None,
        moe_every=draw(st.integers(1, num_layers)),
        dense_first=0,
        head={"tied": draw(st.booleans())},
    )


def build(cfg):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Decoder(cfg)


@settings(max_examples=60)
@given(model_settings())
def test_total_and_active_parameters(cfg):
    """Active: the parameters of the same model if it had only K experts (router as it is)."""
    model = build(cfg)
    assert count(cfg).total == sum(p.numel() for p in model.parameters())
    idle = 0
    for layer in model.mixtures():
        share = 1 - cfg.moe.top_k / cfg.moe.num_experts
        idle += share * sum(p.numel() for p in layer.experts.parameters())
    assert count(cfg).active == pytest.approx(count(cfg).total - idle)


@settings(max_examples=10)
@given(model_settings(mixture=False), st.integers(1, 40))
def test_flops_of_a_dense_model(cfg, seq_len):
    """The plain attention that torch counts computes the whole S x S square of scores.

    A causal one needs the diagonal and what lies below: (S + 1) / 2 positions per token, which is
    what `forward_flops` takes. Everything else must agree exactly.
    """
    model = build(cfg).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(2, seq_len, dtype=torch.int64))
    counted = counter.get_total_flops() / (2 * seq_len)
    cost = count(cfg)
    assert counted == 2 * cost.matmul + cost.attention * seq_len
    above_the_diagonal = cost.attention * (seq_len - 1) / 2
    assert cost.forward_flops(seq_len) == counted - above_the_diagonal


@given(model_settings(mixture=True), st.integers(1, 500))
def test_training_costs_three_forward_passes(cfg, seq_len):
    assert count(cfg).train_flops(seq_len) == 3 * count(cfg).forward_flops(seq_len)


def test_mixtral_8x7b():
    """The published checkpoint's 46,702,792,704 parameters, 12,879,925,248 of them active."""
    mixtral = ModelConfig(
        vocab_size=32_000,
        dim=4096,
        num_layers=32,
        attention={"num_heads": 32, "num_kv_heads": 8},
        moe={"hidden_dim": 14_336, "num_experts": 8, "top_k": 2},
        head={"tied": False},
    )
    assert count(mixtral).total == 46_702_792_704
    assert count(mixtral).active == 12_879_925_248


def test_qwen3_30b_a3b():
    """30,532,122,624 parameters, 3,353,032,704 active: QK-norm per head, wide attention."""
    qwen = ModelConfig(
        vocab_size=151_936,
        dim=2048,
        num_layers=48,
        attention={"num_heads": 32, "num_kv_heads": 4, "head_dim": 128, "qk_norm": "head"},
        moe={"hidden_dim": 768, "num_experts": 128, "top_k": 8},
        head={"tied": False},
    )
    assert count(qwen).total == 30_532_122_624
    assert count(qwen).active == 3_353_032_704


@settings(max_examples=60)
@given(model_settings(mixture=True))
def test_the_twin_has_the_same_active_parameters(cfg):
    twin = dense_twin(cfg)
    assert twin.moe is None
    matrices = 3 if cfg.moe.activation in ("swiglu", "geglu") else 2
    column = cfg.num_layers * matrices * cfg.dim
    assert (
        count(twin).total == count(twin).active == sum(p.numel() for p in build(twin).parameters())
    )
    # Rounded to whole columns; a network has at least one.
    if twin.dense.hidden_dim > 1:
        assert abs(count(twin).active - count(cfg).active) <= column / 2
    assert twin.model_copy(update={"moe": cfg.moe, "dense": cfg.dense}) == cfg
    assert twin.dense.activation == cfg.moe.activation


def test_a_wide_twin_stays_aligned():
    cfg = ModelConfig(dim=256, moe={"hidden_dim": 515, "top_k": 2})
    twin = dense_twin(cfg)
    assert twin.dense.hidden_dim % 8 == 0
    assert count(twin).active == pytest.approx(count(cfg).active, rel=0.005)


def test_a_dense_model_has_no_twin():
    with pytest.raises(ConfigError, match=r"model\.moe"):
        dense_twin(ModelConfig())
