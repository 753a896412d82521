"""Bytes of weights and cache, against real tensors."""

import pytest
import torch

from moestro.config import EncDecConfig, HeadConfig, ModelConfig, OptimConfig
from moestro.models.cache import LayerCache
from moestro.models.count import count
from moestro.models.decoder import Decoder
from moestro.models.encdec import EncDec
from moestro.plan.memory import DTYPES, cache_bytes, dtypes, state_bytes, weights
from moestro.train.optim import make_optimizer

MOE = {"hidden_dim": 48, "num_experts": 8, "top_k": 2}
LATENT = {"kv_rank": 24, "nope_dim": 16, "rope_dim": 8, "value_dim": 12}
RELATIVE = {"kind": "relative", "shared": True}
DELTA = {
    "kind": "delta",
    "key_heads": 2,
    "value_heads": 4,
    "key_dim": 6,
    "value_dim": 5,
    "full_every": 3,
}


def decoder(**attention) -> ModelConfig:
    attention = {"num_heads": 4, "context": 64, **attention}
    return ModelConfig(vocab_size=50, dim=32, num_layers=3, attention=attention, moe=MOE)


def numbers(layer: LayerCache) -> int:
    """What a layer's cache needs of its buffers."""
    positions = min(layer.length, layer.limit)
    return sum(x.numel() // x.shape[-2] * positions for x in layer._buffers)


@pytest.mark.parametrize("tied", [True, False])
def test_plain_dtypes_are_the_bytes_of_the_parameters(tied):
    cfg = decoder().model_copy(update={"head": HeadConfig(tied=tied)})
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        model = Decoder(cfg).to(dtype)
        real = sum(p.numel() * p.element_size() for p in model.parameters())
        assert weights(count(cfg), name).total == real
    assert weights(count(cfg), "bf16").experts == 2 * sum(
        p.numel() for layer in model.mixtures() for p in layer.experts.parameters()
    )


def test_groups_of_32_share_a_scale_of_16_bits():
    counted = count(decoder())
    assert weights(counted, "int4").experts == counted.expert // 32 * (16 + 2)
    assert weights(counted, "int8").experts == counted.expert // 32 * (32 + 2)
    assert weights(counted, "int4").tables == 2 * counted.input_embedding


def test_int4_experts_leave_all_else_in_bf16():
    counted = count(decoder())
    mixed = weights(counted, "int4-experts")
    assert mixed.experts == weights(counted, "int4").experts
    assert mixed.rest == weights(counted, "bf16").rest


def test_each_dtype_is_narrower_than_the_one_before():
    sizes = [weights(count(decoder()), name).total for name in DTYPES]
    assert sizes == sorted(sizes, reverse=True)
    assert "int4-experts" not in dtypes(count(ModelConfig()))


@pytest.mark.parametrize(
    "attention",
    [
        {},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "window": {"size": 9, "full_every": 3}},
        {"latent": LATENT},
        {"context": 16},
    ],
    ids=["plain", "grouped", "windows", "latent", "beyond the context"],
)
def test_cache_of_a_decoder(attention):
    """As many numbers as the real cache keeps after 40 tokens."""
    cfg = decoder(**attention)
    model = Decoder(cfg).eval()
    cache = model.new_cache(2)
    with torch.no_grad():
        for tokens in (30, *10 * [1]):
            model(torch.zeros(2, tokens, dtype=torch.int64), cache=cache)
    kept = sum(map(numbers, cache.layers))
    assert cache_bytes(cfg, 40, 2, "fp32") == 4 * kept
    assert cache_bytes(cfg, 40, 2, "int4") == 2 * kept


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "fp32"), (torch.bfloat16, "int4")])
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("window", [DELTA, {"kind": "conv", "attention_layers": [2]}], ids=str)
def test_cache_of_layers_without_attention(dtype, name, tokens, window):
    """States in fp32 whatever the weights; keys and values only where there is attention."""
    cfg = decoder(window=window)
    model = Decoder(cfg).to(dtype).eval()
    cache = model.new_cache(2)
    with torch.no_grad():
        model(torch.zeros(2, tokens, dtype=torch.int64), cache=cache)
    *states, attention = cache.layers
    kept = numbers(attention) * dtype.itemsize
    kept += sum(x.numel() * x.element_size() for state in states for x in state.held(2))
    assert cache_bytes(cfg, tokens, 2, name) == kept


def test_cache_of_an_encoder_decoder():
    attention = {"num_heads": 4, "positions": RELATIVE}
    cfg = EncDecConfig(
        vocab_size=50, dim=32, encoder_layers=3, decoder_layers=2, attention=attention
    )
    model = EncDec(cfg).eval()
    tokens = torch.zeros(2, 7, dtype=torch.int64)
    with torch.no_grad():
        cache = model.new_cache(model.encode(tokens).memory)
        model.decode(tokens, cache)
    kept = sum(tensor.numel() for pair in cache.source.cross for tensor in pair)
    kept += sum(map(numbers, cache.layers))
    assert cache_bytes(cfg, 7, 2, "fp32") == 4 * kept


def test_state_of_training_is_what_our_trainer_holds():
    model = Decoder(decoder())
    optimizer = make_optimizer(model, OptimConfig())
    model(torch.zeros(1, 8, dtype=torch.int64)).logits.sum().backward()
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    size = count(model.cfg).total
    moments = sum(
        state[name].nbytes
        for state in optimizer.state.values()
        for name in ("exp_avg", "exp_avg_sq")
    )
    state = state_bytes(size)
    assert state["weights"] == sum(p.nbytes for p in model.parameters())
    assert state["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    assert state["optimizer"] == moments
    assert sum(state_bytes(1).values()) == 16
