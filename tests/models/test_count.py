"""Counted parameters and FLOPs against real modules and torch's own FLOP counter."""

import warnings

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moestro.config import EncDecConfig, ModelConfig
from moestro.errors import ConfigError
from moestro.models.count import Span, count
from moestro.models.decoder import Decoder
from moestro.models.encdec import EncDec
from moestro.models.twin import dense_twin

ACTIVATIONS = st.sampled_from(["swiglu", "geglu", "clamped_swiglu", "relu", "gelu"])
TOKEN_CHOICE = ["softmax", "sigmoid", "noisy_top_k", "sparsemixer", "hash"]


@st.composite
def mixtures(draw, kinds=(*TOKEN_CHOICE, "expert_choice")):
    """Settings of any small mixture."""
    kind = draw(st.sampled_from(kinds))
    num_experts = draw(st.integers(2 if kind == "sparsemixer" else 1, 6))
    scored = kind in ("softmax", "sigmoid")
    shared = {"hidden_dim": draw(st.integers(1, 9)), "gate": draw(st.booleans())}
    return {
        "hidden_dim": draw(st.integers(1, 9)),
        "num_experts": num_experts,
        "top_k": 2 if kind == "sparsemixer" else draw(st.integers(1, num_experts)),
        "activation": draw(ACTIVATIONS),
        "router": {
            "kind": kind,
            "jitter": 0.01 if kind == "sparsemixer" else 0.0,
            "bias": kind != "hash" and draw(st.booleans()),
            "selection_bias": scored and draw(st.booleans()),
        },
        "experts": {"bias": draw(st.booleans())},
        "shared": draw(st.sampled_from([None, shared])),
    }


@st.composite
def deltas(draw):
    """Settings of small delta layers beside those with attention."""
    heads = draw(st.integers(1, 3))
    return {
        "kind": "delta",
        "key_heads": heads,
        "value_heads": heads * draw(st.integers(1, 3)),
        "key_dim": draw(st.integers(1, 5)),
        "value_dim": draw(st.integers(1, 5)),
        "conv_width": draw(st.integers(1, 5)),
        "full_every": draw(st.integers(0, 3)),
        "gated_attention": draw(st.booleans()),
    }


@st.composite
def attentions(draw):
    """Settings of any small attention of a decoder."""
    heads = draw(st.sampled_from([1, 2, 4]))
    if draw(st.booleans()) and draw(st.booleans()):
        # Of a rank below half of nope + value the module computes no keys: other FLOPs.
        ranks = {"q_rank": draw(st.sampled_from([None, 5])), "kv_rank": draw(st.integers(4, 9))}
        dims = {"nope_dim": draw(st.integers(1, 2)), "value_dim": draw(st.integers(5, 6))}
        latent = {**ranks, **dims, "rope_dim": 4}
        if ranks["q_rank"] is not None and draw(st.booleans()):
            latent["indexer"] = {"num_heads": 3, "head_dim": 6, "top_k": draw(st.integers(1, 9))}
        return {"num_heads": heads, "latent": latent}
    relative = {"kind": "relative", "buckets": 8, "shared": draw(st.booleans())}
    window = {
        "size": draw(st.integers(1, 9)),
        "full_every": draw(st.integers(0, 3)),
        "chunked": draw(st.booleans()),
    }
    positions = draw(st.sampled_from([{"kind": "rope", "skipped_every": 2}, relative]))
    norms = ["none", "head", "full"] + ([] if positions is relative else ["unit"])
    conv = {"kind": "conv", "width": draw(st.integers(1, 5)), "attention_layers": [0, 2]}
    mixes = [None, window] if positions is relative else [None, window, conv, draw(deltas())]
    return {
        "num_heads": heads,
        "num_kv_heads": draw(st.sampled_from([None, 1, heads])),
        "head_dim": draw(st.sampled_from([None, 6])),
        "qk_norm": draw(st.sampled_from(norms)),
        "bias": draw(st.sampled_from(["none", "qkv", "all"])),
        "sinks": draw(st.booleans()),
        "positions": positions,
        "window": draw(st.sampled_from(mixes)),
    }


def networks(draw, moe):
    """Settings that decoders and encoder-decoders share."""
    return {
        "vocab_size": draw(st.integers(1, 50)),
        "dim": 8 * draw(st.integers(1, 3)),
        "dense": {"hidden_dim": draw(st.integers(1, 30)), "activation": draw(ACTIVATIONS)},
        "moe": moe,
        "norm": {"kind": draw(st.sampled_from(["rms", "layer"]))},
        "head": {"tied": draw(st.booleans()), "bias": draw(st.booleans())},
    }


@st.composite
def decoders(draw, moe=None):
    """Any small decoder."""
    num_layers = draw(st.integers(1, 4))
    every = draw(st.integers(1, num_layers))
    last = num_layers // every * every
    return ModelConfig(
        **networks(draw, draw(mixtures()) if moe is None else draw(moe)),
        num_layers=num_layers,
        moe_every=every,
        dense_first=draw(st.integers(0, last - 1)),
        attention=draw(attentions()),
    )


@st.composite
def encdecs(draw, moe=None):
    """Any small encoder-decoder."""
    encoder, decoder = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = draw(st.sampled_from([1, 2, 4]))
    return EncDecConfig(
        **networks(draw, draw(mixtures()) if moe is None else draw(moe)),
        encoder_layers=encoder,
        decoder_layers=decoder,
        moe_every=draw(st.integers(1, min(encoder, decoder))),
        attention={
            "num_heads": heads,
            "num_kv_heads": draw(st.sampled_from([None, 1, heads])),
            "head_dim": draw(st.sampled_from([None, 6])),
            "positions": {"kind": "relative", "buckets": 8, "shared": True},
        },
    )


NO_MIXTURE = st.none()
MODELS = st.one_of(decoders(), encdecs(), decoders(NO_MIXTURE), encdecs(NO_MIXTURE))


def build(cfg, device="cpu", backend="auto"):
    kind = EncDec if isinstance(cfg, EncDecConfig) else Decoder
    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")  # expert choice warns that it sees the future
        return kind(cfg, backend)


def held(model):
    """Parameters of a module, and its routers' selection biases."""
    biases = [b for name, b in model.named_buffers() if name.endswith("router.bias")]
    return sum(x.numel() for x in (*model.parameters(), *biases))


@settings(max_examples=150)
@given(MODELS)
def test_total_and_active_parameters(cfg):
    """Active: the parameters of the same model if it had only K experts (router as it is)."""
    model, cost = build(cfg, "meta"), count(cfg)
    assert cost.total == held(model)
    experts = sum(p.numel() for layer in model.mixtures() for p in layer.experts.parameters())
    assert cost.expert == experts
    active = experts * cfg.moe.top_k // cfg.moe.num_experts if experts else 0
    assert cost.active == cost.total - experts + active


@settings(max_examples=30)
@given(MODELS)
def test_conventions_of_published_figures(cfg):
    model, cost = build(cfg, "meta"), count(cfg)
    table = model.embed.weight.numel()
    assert cost.parameters() == (cost.total, cost.active)
    if cfg.head.tied:
        assert cost.parameters("output") == (cost.total, cost.active)
        assert cost.parameters("none") == (cost.total - table, cost.active - table)
    else:
        assert cost.parameters("output") == (cost.total - table, cost.active - table)
        assert cost.parameters("none") == (cost.total - 2 * table, cost.active - 2 * table)


def forward(model, cfg, seq_len):
    tokens = torch.zeros(2, seq_len, dtype=torch.int64)
    model(tokens, tokens) if isinstance(cfg, EncDecConfig) else model(tokens)


def mv_flops(matrix, vector, *, out_shape=None, **_):
    return 2 * matrix[0] * matrix[1]


TOKEN_CHOICE_MODELS = st.one_of(
    decoders(NO_MIXTURE), encdecs(NO_MIXTURE), decoders(mixtures(TOKEN_CHOICE)),
    encdecs(mixtures(TOKEN_CHOICE)),
)  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(TOKEN_CHOICE_MODELS, st.integers(1, 20))
def test_flops(cfg, seq_len):
    """The plain attention that torch counts computes the whole S x S square of scores.

    A causal one needs part of it only, which `Span.positions` tells (tested below). Everything
    else must agree exactly. In training, since a noisy router's second matrix serves there alone.
    Latent attention runs with values as wide as keys, zeros after them: only such are compared.
    Kernels by their definition, row by row, and gradients on: faster paths use what torch does not
    count. Delta layers have a test of their own.
    """
    latent = cfg.attention.latent
    assume(cfg.attention.delta is None and cfg.attention.conv is None)
    assume(latent is None or latent.value_dim == latent.nope_dim + latent.rope_dim)
    assume(latent is None or latent.indexer is None)  # all its scores are computed, and masked
    model = build(cfg, backend="reference")
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mv: mv_flops})
    with counter, sdpa_kernel(SDPBackend.MATH):
        forward(model, cfg, seq_len)
    cost = count(cfg)
    assert counter.get_total_flops() == 2 * seq_len * (2 * cost.matmul + cost.attention * seq_len)


@given(st.integers(1, 40), st.one_of(st.none(), st.integers(1, 50)))
def test_positions_attended_to(seq_len, window):
    """Position p, from 1, sees min(p, window) positions; an encoder's sees all."""
    seen = [min(p, window or p) for p in range(1, seq_len + 1)]
    causal = Span(1, window, causal=True)
    assert causal.positions(seq_len) == pytest.approx(sum(seen) / seq_len)
    assert Span(1, None, causal=False).positions(seq_len) == seq_len
    seen = [p % (window or seq_len) + 1 for p in range(seq_len)]
    chunked = Span(1, window, causal=True, chunked=True)
    assert chunked.positions(seq_len) == pytest.approx(sum(seen) / seq_len)


def test_latent_attention_scores_by_keys_and_sums_values():
    """One layer of DeepSeek-V3: scores over nope + rope = 192 numbers, sums over 128."""
    latent = {"kv_rank": 512, "nope_dim": 128, "rope_dim": 64, "value_dim": 128}
    cfg = ModelConfig(num_layers=1, attention={"num_heads": 128, "latent": latent})
    assert count(cfg).attention == 2 * 128 * 192 + 2 * 128 * 128


def test_an_indexer_scores_all_positions_and_attention_looks_at_the_best():
    latent = {"q_rank": 8, "kv_rank": 6, "nope_dim": 4, "rope_dim": 2, "value_dim": 3}
    index = {"num_heads": 5, "head_dim": 7, "top_k": 4}
    attention = {"num_heads": 3, "context": 64, "latent": {**latent, "indexer": index}}
    cost = count(ModelConfig(num_layers=2, attention=attention))
    attended, scored = 2 * 2 * 3 * (4 + 2 + 3), 2 * 2 * 5 * 7
    assert set(cost.spans) == {Span(attended, 4, True), Span(scored, 64, True)}
    plain = count(ModelConfig(num_layers=2, attention={**attention, "latent": latent}))
    dim = ModelConfig().dim
    own = 2 * (8 * 5 * 7 + dim * (7 + 5) + 2 * 7)
    assert cost.total - plain.total == own


def test_a_delta_layer_costs_as_much_at_any_position():
    """One token: its matrices, its convolution, and three products of its states.

    torch counts two of the three, since the change of a state is no matrix product.
    """
    delta = {"key_heads": 2, "value_heads": 6, "key_dim": 5, "value_dim": 3, "full_every": 0}
    attention = {"num_heads": 2, "window": {"kind": "delta", **delta}}
    cfg = ModelConfig(vocab_size=20, dim=16, num_layers=3, attention=attention)
    counter = FlopCounterMode(display=False)
    with counter:
        forward(Decoder(cfg), cfg, 1)
    cost, conv = count(cfg), 3 * 4 * (2 * 2 * 5 + 6 * 3)
    assert set(cost.spans) == {Span(3 * 3 * 2 * 6 * 5 * 3, 1, causal=True)}
    assert counter.get_total_flops() == 2 * (2 * cost.matmul + cost.attention * 2 // 3 + 2 * conv)
    assert cost.forward_flops(1000) == pytest.approx(cost.forward_flops(1))


def test_each_layer_has_its_own_window():
    """gpt-oss's pattern: windowed, full, windowed, full. No layer sees beyond the context."""
    attention = {"num_heads": 2, "window": {"size": 4, "full_every": 2}, "context": 16}
    cfg = ModelConfig(dim=16, num_layers=4, attention=attention)
    assert set(count(cfg).spans) == {Span(2 * 4 * 16, 4, True), Span(2 * 4 * 16, 16, True)}
    scores = count(cfg).forward_flops(64) - 2 * count(cfg).matmul
    in_window = 2 * 4 * 16 * (10 + 60 * 4) / 64
    in_context = 2 * 4 * 16 * (16 * 17 / 2 + 48 * 16) / 64
    assert scores == in_window + in_context


@given(MODELS, st.integers(1, 500))
def test_training_costs_three_forward_passes(cfg, seq_len):
    assert count(cfg).train_flops(seq_len) == 3 * count(cfg).forward_flops(seq_len)


@settings(max_examples=60)
@given(st.one_of(decoders(), encdecs()), st.sampled_from(["active", "total"]))
def test_the_twin_has_as_many_parameters(cfg, of):
    twin = dense_twin(cfg, of)
    assert twin.moe is None
    assert count(twin).total == count(twin).active == held(build(twin, "meta"))
    matrices = 3 if cfg.moe.activation in ("swiglu", "geglu", "clamped_swiglu") else 2
    layers = cfg.num_layers if isinstance(cfg, ModelConfig) else 0
    if isinstance(cfg, EncDecConfig):
        layers = cfg.encoder_layers + cfg.decoder_layers
    column = layers * matrices * cfg.dim
    # Rounded to whole columns; a network has at least one.
    if twin.dense.hidden_dim > 1:
        assert abs(count(twin).total - getattr(count(cfg), of)) <= column / 2
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
