"""The decoder against its blocks written out (plain_decoder.py), its cache, and its masks."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from moestro import Decoder, ModelConfig
from moestro.errors import ShapeError
from moestro.moe import balance

from .plain_decoder import plain_decoder

MOE = {"hidden_dim": 12, "num_experts": 4, "top_k": 2}
HEADS = {"num_heads": 4, "context": 32}
RELATIVE = {"kind": "relative", "buckets": 8, "max_distance": 6}
DELTA = {
    "kind": "delta",
    "key_heads": 2,
    "value_heads": 4,
    "key_dim": 5,
    "value_dim": 3,
    "full_every": 2,
}
LATENT = {"q_rank": 7, "kv_rank": 6, "nope_dim": 5, "rope_dim": 4, "value_dim": 3}
SIZES = {
    "vocab_size": 30,
    "dim": 16,
    "num_layers": 3,
    "dense": {"hidden_dim": 20},
    "attention": HEADS,
}
VARIANTS = {
    "dense": {},
    "mixture": {"moe": MOE},
    "untied": {"moe": MOE, "head": {"tied": False}},
    "every second": {"moe": MOE, "moe_every": 2, "num_layers": 4},
    "dense first": {"moe": MOE, "dense_first": 1},
    "shared and GQA": {
        "moe": {**MOE, "shared": {"hidden_dim": 6, "gate": True}},
        "attention": {**HEADS, "num_kv_heads": 2, "qk_norm": "head"},
    },
    "sliding window": {"moe": MOE, "attention": {"num_heads": 4, "context": 4}},
    "sigmoid, plain experts": {
        "moe": {**MOE, "activation": "relu", "router": {"kind": "sigmoid", "scale": 2.5}},
        "dense_first": 1,
        "dense": {"hidden_dim": 20, "activation": "gelu"},
    },
    "hash": {"moe": {**MOE, "router": {"kind": "hash"}}},
    "alternating windows, sinks, biases": {
        "moe": MOE,
        "attention": {
            **HEADS,
            "num_kv_heads": 2,
            "bias": "all",
            "sinks": True,
            "window": {"size": 4, "full_every": 2},
        },
    },
    "layer norm, head bias": {
        "norm": {"kind": "layer", "eps": 0.1},
        "head": {"tied": False, "bias": True},
        "attention": {**HEADS, "bias": "qkv"},
    },
    "norm of all heads": {"moe": MOE, "attention": {**HEADS, "qk_norm": "full"}},
    "relative": {"attention": {**HEADS, "positions": RELATIVE}, "head": {"scale": 0.25}},
    "relative, shared, windows": {
        "attention": {
            **HEADS,
            "context": 8,
            "window": {"size": 5, "full_every": 3},
            "positions": {**RELATIVE, "shared": True},
        }
    },
    "norm after a part of a head turns": {
        "moe": MOE,
        "attention": {**HEADS, "head_dim": 6, "qk_norm": "rotated", "positions": {"fraction": 0.4}},
    },
    "scales": {
        "moe": MOE,
        "dense_first": 1,
        "head": {"scale": 0.7, "embed_scale": 1.3},
        "norm": {"residual_scale": 0.4},
        "attention": {**HEADS, "positions": {"score_scale": 0.8}},
    },
    "latent": {"moe": MOE, "attention": {**HEADS, "context": 6, "latent": LATENT}},
    "pieces of a text, layers without positions": {
        "moe": {**MOE, "top_k": 1, "router": {"kind": "sigmoid", "weighs": "input"}},
        "attention": {
            **HEADS,
            "qk_norm": "unit",
            "window": {"size": 4, "full_every": 2, "chunked": True},
            "positions": {"skipped_every": 3, "temperature": {"scale": 0.8, "length": 3}},
        },
    },
    "short convolutions beside attention": {
        "moe": MOE,
        "attention": {**HEADS, "window": {"kind": "conv", "attention_layers": [1]}},
    },
    "delta beside gated attention": {
        "moe": {**MOE, "shared": {"hidden_dim": 6, "gate": True}},
        "norm": {"zero_centred": True, "eps": 1e-3},
        "attention": {
            **HEADS,
            "num_kv_heads": 2,
            "head_dim": 8,
            "qk_norm": "head",
            "bias": "all",
            "positions": {"fraction": 0.5},
            "window": DELTA,
        },
    },
}


def model_of(variant, dtype=torch.float64):
    return Decoder(ModelConfig(**{**SIZES, **VARIANTS[variant]})).to(dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_its_blocks_written_out(variant):
    model = model_of(variant)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif "sinks" in name or "relative" in name:
            torch.nn.init.normal_(parameter)
    tokens_BS = torch.randint(0, 30, (2, 9))
    expected = plain_decoder(model, tokens_BS)
    actual = model(tokens_BS)
    # The shared gate is fp32.
    torch.testing.assert_close(actual.logits, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(expected)
    parameters = dict(model.named_parameters())
    left = torch.autograd.grad(actual.logits, parameters.values(), grad, allow_unused=True)
    right = torch.autograd.grad(expected, parameters.values(), grad, allow_unused=True)
    for name, ours, plain in zip(parameters, left, right, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("variant", "layers"),
    [
        ("dense", ()),
        ("mixture", (0, 1, 2)),
        ("every second", (1, 3)),
        ("dense first", (1, 2)),
    ],
)
def test_one_routing_per_mixture_layer(variant, layers):
    model = model_of(variant)
    output = model(torch.randint(0, 30, (2, 5)))
    assert model.moe_layers == layers
    assert len(output.routings) == len(model.mixtures()) == len(layers)
    assert all(routing.num_tokens == 10 for routing in output.routings)
    assert output.logits.shape == (2, 5, 30)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 4, 2], [12], [1, 11]], ids=str)
def test_the_cache_gives_what_the_whole_text_gives(variant, chunks):
    """The sliding window's context is 4: most of these texts are longer."""
    model = model_of(variant).eval()
    tokens_BS = torch.randint(0, 30, (2, 12))
    expected = model(tokens_BS).logits
    cache = model.new_cache(2)
    parts = [model(part, cache=cache).logits for part in tokens_BS.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-6, atol=1e-6)
    assert cache.position == 12


@pytest.mark.parametrize("name", ["alternating windows, sinks, biases", "latent", "relative"])
def test_16_bits_through_the_cache(name):
    model = model_of(name, torch.bfloat16).eval()
    tokens_BS = torch.randint(0, 30, (2, 12))
    with torch.inference_mode():
        expected, cache = model(tokens_BS).logits, model.new_cache(2)
        parts = [model(part, cache=cache).logits for part in tokens_BS.split(1, dim=1)]
    error = (torch.cat(parts, 1) - expected).abs().max()
    assert error < 0.1 * expected.abs().max()


def test_any_number_of_tokens_may_pass_the_context():
    """Far beyond it, only the last positions matter: layers · (context - 1) + 1 of them."""
    model = model_of("sliding window").eval()
    tokens_BS = torch.randint(0, 30, (1, 60))
    cache = model.new_cache()
    for position in range(60):
        last = model(tokens_BS[:, position : position + 1], cache=cache).logits[:, -1]
    torch.testing.assert_close(last, model(tokens_BS).logits[:, -1], rtol=1e-6, atol=1e-6)
    tokens_BS[:, : 60 - (3 * 3 + 1)] = 7
    torch.testing.assert_close(last, model(tokens_BS).logits[:, -1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_position_sees_the_future(variant):
    model = model_of(variant).eval()
    tokens_BS = torch.randint(0, 30, (1, 10))
    before = model(tokens_BS).logits
    tokens_BS[0, 6:] = (tokens_BS[0, 6:] + 1) % 30
    torch.testing.assert_close(model(tokens_BS).logits[:, :6], before[:, :6])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_does_not_change_real_tokens(variant, side):
    model = model_of(variant).eval()
    tokens_BS = torch.randint(0, 30, (2, 6))
    padding_BS = torch.randint(0, 30, (2, 3))
    valid_BS = torch.ones(2, 9, dtype=torch.bool)
    if side == "left":
        padded_BS, real = torch.cat([padding_BS, tokens_BS], 1), slice(3, 9)
        valid_BS[:, :3] = False
    else:
        padded_BS, real = torch.cat([tokens_BS, padding_BS], 1), slice(0, 6)
        valid_BS[:, 6:] = False
    plain, padded = model(tokens_BS), model(padded_BS, valid_BS=valid_BS)
    assert padded.logits.isfinite().all()
    torch.testing.assert_close(padded.logits[:, real], plain.logits, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(padded.routings, plain.routings, strict=True):
        assert torch.equal(ours.counts_E(), theirs.counts_E())


@pytest.mark.parametrize(
    "moe",
    [
        MOE,
        {**MOE, "capacity": {"factor": 0.8}},
        {**MOE, "router": {"kind": "noisy_top_k"}},
        {**MOE, "router": {"jitter": 0.1}, "experts": {"dropout": 0.3}},
    ],
    ids=["plain", "capacity", "noisy", "dropout"],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_recomputed_activations_give_the_same_step(moe, autocast):
    """Loss, every gradient and every Routing; nothing is counted twice."""
    model = Decoder(ModelConfig(**{**SIZES, "moe": moe})).train()
    tokens_BS = torch.randint(0, 30, (3, 8))
    results = []
    for recompute in (False, True):
        model.checkpoint_activations = recompute
        model.zero_grad()
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits, routings = model(tokens_BS)
            loss = F.cross_entropy(logits.float().flatten(0, 1), tokens_BS.flatten())
            loss = loss + sum(balance.switch_loss(r) + balance.z_loss(r) for r in routings)
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        fields = [t for r in routings for t in r if isinstance(t, torch.Tensor)]
        counts = [r.counts_E() for r in routings]
        results.append([loss, *gradients, *fields, *counts])
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


def test_tied_embeddings_are_one_tensor():
    tied, untied = model_of("mixture"), model_of("untied")
    assert tied.head.weight is tied.embed.weight
    assert untied.head.weight is not untied.embed.weight


def test_the_untrained_model_knows_nothing():
    """At the start the loss lies near log V, so that the first steps do not undo a bias."""
    model = Decoder(ModelConfig(vocab_size=256, dim=64, moe=MOE))
    tokens_BS = torch.randint(0, 256, (4, 64))
    logits = model(tokens_BS).logits
    targets_T = torch.randint(0, 256, (256,))
    loss = F.cross_entropy(logits.flatten(0, 1), targets_T).item()
    assert abs(loss - torch.tensor(256.0).log().item()) < 0.75


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    torch.manual_seed(1)  # no near tie, which rounding would decide another way
    model = model_of("shared and GQA", dtype)
    tokens_BS = torch.randint(0, 30, (2, 9))
    output = model(tokens_BS)
    assert output.logits.dtype == dtype
    assert all(r.logits_TE.dtype == torch.float32 for r in output.routings)
    exact = model_of("shared and GQA", torch.float64)
    exact.load_state_dict(model.state_dict())
    expected = exact(tokens_BS).logits
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert (output.logits - expected).abs().max() < tolerance * expected.abs().max()


def test_bad_input():
    model = model_of("mixture")
    with pytest.raises(ShapeError, match=r"\[B, S\].*float32"):
        model(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match=r"\[3\]"):
        model(torch.zeros(3, dtype=torch.int64))
    valid_BS = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ShapeError, match="not both"):
        model(torch.zeros(1, 3).long(), valid_BS=valid_BS, cache=model.new_cache())


@pytest.mark.parametrize("variant", ["dense", "mixture"])
@pytest.mark.parametrize(
    "valid_BS",
    [torch.ones(2, 4, dtype=torch.bool), torch.ones(1, 5, dtype=torch.bool), torch.ones(2, 5)],
    ids=["short", "one for all", "float"],
)
def test_a_mask_that_does_not_fit(variant, valid_BS):
    with pytest.raises(ShapeError, match="valid"):
        model_of(variant)(torch.zeros(2, 5).long(), valid_BS=valid_BS)


def test_expert_choice_can_be_built_and_warns():
    cfg = ModelConfig(**{**SIZES, "moe": {**MOE, "router": {"kind": "expert_choice"}}})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = Decoder(cfg)
    assert caught
    assert model(torch.randint(0, 30, (2, 5))).logits.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_is_built_on_the_meta_device(variant):
    """For counting: all names and shapes, and no memory."""
    with torch.device("meta"):
        model = Decoder(ModelConfig(**{**SIZES, **VARIANTS[variant]}))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {n: t.shape for n, t in model_of(variant).state_dict().items()}
    assert all(parameter.is_meta for parameter in model.parameters())


def test_names_beside_the_layers():
    names = {name for name, _ in model_of("relative, shared, windows").named_parameters()}
    assert {name for name in names if "blocks" not in name} == {
        "embed.weight",
        "relative.weight",
        "norm.weight",
    }
    names = {name for name, _ in model_of("layer norm, head bias").named_parameters()}
    assert {name for name in names if "blocks.0" in name or "blocks" not in name} == {
        *("embed.weight", "head.weight", "head.bias", "norm.weight", "norm.bias"),
        *(f"blocks.0.{n}_norm.{kind}" for n in ("attention", "ffn") for kind in ("weight", "bias")),
        *(f"blocks.0.attention.{n}" for n in ("qkv.weight", "qkv.bias", "out.weight")),
        *(f"blocks.0.ffn.{n}" for n in ("gate_up", "down")),
    }
