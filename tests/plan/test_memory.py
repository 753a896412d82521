"""Bytes of weights and cache, against real tensors."""

from typing import get_args

import pytest
import torch

from moestro.checkpoints import packed_files, packed_header
from moestro.checkpoints.quantize import blank_model, random_model
from moestro.cli.plan import Dtype
from moestro.config import EncDecConfig, HeadConfig, ModelConfig, OptimConfig
from moestro.kernels import native_cpu
from moestro.kernels.formats import QUANTISED
from moestro.models.cache import LayerCache
from moestro.models.count import count
from moestro.models.decoder import Decoder
from moestro.models.encdec import EncDec
from moestro.models.materialize import materialize
from moestro.plan.memory import DTYPES, FORMATS, cache_bytes, dtypes, state_bytes, weights
from moestro.plan.presets import preset
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
    assert weights(counted, "uint4").experts == counted.expert // 32 * (16 + 4)
    assert weights(counted, "int4").tables == 2 * counted.input_embedding


PRESETS = (
    "mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v2-lite", "gpt-oss-20b", "qwen3-next-80b-a3b",
    "switch-base-8", "glm-4.5-air", "lfm2-8b-a1b", "llama-4-scout",
)  # fmt: skip


def packed_bytes(cfg, dtype):
    model = blank_model(cfg, lambda path: FORMATS[dtype])
    materialize(model, torch.bfloat16, "meta")
    return sum(tensor.nbytes for tensor in packed_header.tensors(model).values())


@pytest.mark.parametrize("name", PRESETS)
def test_packed_dtypes_are_the_bytes_of_the_packed_tensors(name):
    cfg = preset(name).cfg
    assert weights(count(cfg), "uint4", cfg).total == packed_bytes(cfg, "uint4")


@pytest.mark.parametrize("dtype", [name for name in FORMATS if FORMATS[name].kind in QUANTISED])
@pytest.mark.parametrize("tied", [True, False])
def test_every_packed_dtype(dtype, tied):
    """Odd sizes, that fill no block."""
    attention = {"num_heads": 3, "head_dim": 10, "bias": "all", "context": 64}
    moe = {**MOE, "hidden_dim": 37, "shared": {"hidden_dim": 19}, "experts": {"bias": True}}
    cfg = ModelConfig(
        vocab_size=51, dim=30, num_layers=2, attention=attention, moe=moe, head={"tied": tied}
    )
    assert weights(count(cfg), dtype, cfg).total == packed_bytes(cfg, dtype)


@pytest.mark.skipif(native_cpu.available() is not None, reason="no native library")
def test_they_are_those_of_a_packed_file(tmp_path):
    cfg = decoder()
    packed_files.save(random_model(cfg, FORMATS["int4"]), tmp_path / "model", FORMATS["int4"], {})
    header, start = packed_header.read(tmp_path / "model")
    model, sections = packed_header.unfilled(
        tmp_path / "model", header, (tmp_path / "model").stat().st_size - start
    )
    assert len(sections) == len(packed_header.tensors(model))
    held = sum(section.tensor.nbytes for section in sections.values())
    assert held == weights(count(cfg), "int4", cfg).total


def test_the_command_takes_every_dtype():
    assert set(get_args(get_args(Dtype)[0])) == set(DTYPES)


def test_int4_experts_leave_all_else_in_bf16():
    counted = count(decoder())
    mixed = weights(counted, "int4-experts")
    assert mixed.experts == weights(counted, "int4").experts
    assert mixed.rest == weights(counted, "bf16").rest


def test_each_dtype_is_narrower_than_the_one_before():
    counted = count(decoder())
    sizes = [weights(counted, name).total for name in DTYPES]
    assert sizes == sorted(sizes, reverse=True)
    assert dtypes(counted) == ["fp32", "bf16", "int8", "int4-experts", "int4"]
    assert dtypes(counted, "uint4")[-2:] == ["uint4", "int4"]
    assert "int4-experts" not in dtypes(count(ModelConfig()))


@pytest.mark.parametrize(
    "attention",
    [
        {},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "window": {"size": 9, "full_every": 3}},
        {"latent": LATENT},
        {
            "latent": {
                **LATENT,
                "q_rank": 8,
                "indexer": {"num_heads": 2, "head_dim": 12, "top_k": 4},
            }
        },
        {"context": 16},
    ],
    ids=["plain", "grouped", "windows", "latent", "indexer", "beyond the context"],
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
