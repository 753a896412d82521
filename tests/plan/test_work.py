"""What a step computes and reads, against torch's own counter and real modules."""

import random

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moestro.config import EncDecConfig, ModelConfig
from moestro.models.count import count
from moestro.models.decoder import Decoder
from moestro.models.encdec import EncDec
from moestro.plan.bounds import bound
from moestro.plan.devices import DEVICES, Device, device
from moestro.plan.memory import cache_bytes
from moestro.plan.work import decode, prefill, share_hit

MOE = {"hidden_dim": 24, "num_experts": 8, "top_k": 2}
# Enough sequences that products of matrices, which torch counts, are faster than those of vectors.
S, B = 20, 16


def decoder(moe=None, **attention) -> ModelConfig:
    attention = {"num_heads": 4, "context": 64, **attention}
    return ModelConfig(
        vocab_size=50, dim=32, num_layers=3, attention=attention, moe=moe, head={"tied": False}
    )


def encdec(moe=None, **attention) -> EncDecConfig:
    attention = {
        "num_heads": 4,
        "positions": {"kind": "relative", "shared": True},
        **attention,
    }
    return EncDecConfig(
        vocab_size=50,
        dim=32,
        encoder_layers=3,
        decoder_layers=2,
        attention=attention,
        moe=moe,
        dense={"hidden_dim": 40, "activation": "relu"},
    )


def tokens(length: int) -> torch.Tensor:
    return torch.zeros(B, length, dtype=torch.int64)


def flops(call) -> float:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("attention", [{}, {"num_kv_heads": 2}], ids=["plain", "grouped"])
def test_decoding_computes_what_torch_counts(attention):
    cfg = decoder(**attention)
    model = Decoder(cfg).eval()
    cache = model.new_cache(B)
    with torch.no_grad():
        model(tokens(S - 1), cache=cache)
    counted = flops(lambda: model(tokens(1), cache=cache))
    assert decode(cfg, S, B, "fp32").flops == counted


def test_latent_attention_decodes_absorbed():
    """Ours carries the rotary part through the sum as well, so it does slightly more."""
    latent = {"q_rank": 16, "kv_rank": 24, "nope_dim": 16, "rope_dim": 4, "value_dim": 16}
    cfg = decoder(latent=latent)
    model = Decoder(cfg).eval()
    cache = model.new_cache(B)
    with torch.no_grad():
        model(tokens(S - 1), cache=cache)
    counted = flops(lambda: model(tokens(1), cache=cache))
    assert counted / 1.05 < decode(cfg, S, B, "fp32").flops <= counted


GROUPS = pytest.mark.parametrize("groups", [{}, {"num_kv_heads": 2}], ids=["plain", "grouped"])


@GROUPS
def test_an_encoder_decoder_reads_with_one_side_and_writes_with_the_other(groups):
    cfg = encdec(**groups)
    model = EncDec(cfg).eval()
    counted = flops(lambda: model.new_cache(model.encode(tokens(S)).memory))
    assert prefill(cfg, S, B, "fp32").flops == counted
    with torch.no_grad():
        cache = model.new_cache(model.encode(tokens(S)).memory)
        model.decode(tokens(S - 1), cache)
    counted = flops(lambda: model.decode(tokens(1), cache))
    assert decode(cfg, S, B, "fp32").flops == counted


@GROUPS
def test_an_encoder_decoder_reads_the_bytes_of_the_side_at_work(groups):
    """All experts of a side for many tokens; the embedding is read as the head alone."""
    cfg = encdec({**MOE, "activation": "relu"}, **groups)
    model = EncDec(cfg)
    size = {name: p.nbytes for name, p in model.named_parameters()}
    encoder = sum(n for name, n in size.items() if name.startswith("encoder"))
    look = sum(n for name, n in size.items() if "cross.kv" in name)
    many = prefill(cfg, 500, 1, "fp32")
    assert many.read_bytes == pytest.approx(encoder + look)
    rest = sum(size.values()) - encoder - look
    many = decode(cfg, S, 500, "fp32")
    assert many.read_bytes - cache_bytes(cfg, S, 500, "fp32") == pytest.approx(rest)


def test_prompts_need_the_head_once():
    cfg, head = decoder(MOE), 50 * 32
    counted = count(cfg)
    work = prefill(cfg, S, 3, "bf16")
    assert work.tokens == 3 * S
    assert work.flops == 3 * (S * counted.forward_flops(S) - (S - 1) * 2 * head)


def test_a_window_spares_arithmetic_and_cache():
    wide, narrow = decoder(), decoder(window={"size": 5})
    near, far = (decode(cfg, S, 1, "bf16") for cfg in (narrow, wide))
    assert far.flops - near.flops == count(wide).attention * (S - 5)
    assert far.read_bytes - near.read_bytes == 2 * 3 * 2 * 32 * (S - 5)


def pieces(size: int, **attention) -> ModelConfig:
    return decoder(window={"size": size, "full_every": 3, "chunked": True}, **attention)


@pytest.mark.parametrize("earlier", [3, 6, 7, 11, 12, 20, 62])
def test_a_token_looks_at_the_earlier_ones_of_its_own_piece(earlier):
    """Counted one by one; the cache in memory still holds a whole piece."""
    size, wide, cfg = 6, decoder(), pieces(6)
    seen = sum(place // size == earlier // size for place in range(earlier))
    far, near = (decode(each, earlier, 7, "bf16", "int8") for each in (wide, cfg))
    spared = 2 * (earlier - seen)  # in two of three layers
    assert far.flops - near.flops == 7 * count(wide).attention / 3 * spared
    row = 2 * 4 * (8 + 4)  # of a position: keys and values, four heads of 8 bytes and a scale
    assert far.read_bytes - near.read_bytes == pytest.approx(7 * row * spared)
    held = [cache_bytes(each, earlier, 7, "bf16", "int8") for each in (wide, cfg)]
    assert held[0] - held[1] == 7 * row * 2 * max(0, earlier - size)


@pytest.mark.parametrize("size", [64, 65, 1000])
def test_a_piece_as_long_as_the_context_spares_nothing_before_its_end(size):
    earlier = 63 if size == 64 else 64
    assert decode(pieces(size), earlier, 2, "bf16") == decode(decoder(), earlier, 2, "bf16")


def test_an_indexer_spares_reading_the_vectors_that_it_does_not_choose():
    """It reads its own key of every position."""
    latent = {"q_rank": 16, "kv_rank": 24, "nope_dim": 16, "rope_dim": 4, "value_dim": 16}
    index = {"num_heads": 2, "head_dim": 8, "top_k": 5}
    cfg = decoder(latent={**latent, "indexer": index})
    for earlier, cache, row in ((5, "as-is", 56), (20, "as-is", 56), (20, "int8", 28 + 4)):
        held = cache_bytes(cfg, earlier, 2, "bf16", cache)
        read = decode(cfg, earlier, 2, "bf16", cache).read_bytes
        all_weights = decode(cfg, earlier, 1, "bf16", cache)
        one = cache_bytes(cfg, earlier, 1, "bf16", cache)
        spared = 3 * row * (earlier - 5)  # each of three layers
        assert (read - held) - (all_weights.read_bytes - one) == pytest.approx(-spared)


@pytest.mark.parametrize("batch", [1, 2, 7, 40])
def test_experts_hit_by_a_batch(batch):
    draw = random.Random(0)
    hit = [len({e for _ in range(batch) for e in draw.sample(range(16), 3)}) for _ in range(3000)]
    assert sum(hit) / len(hit) == pytest.approx(16 * share_hit(16, 3, batch), rel=0.02)


def test_one_token_reads_the_active_weights():
    cfg = decoder(MOE)
    counted = count(cfg)
    read = decode(cfg, S, 1, "bf16").read_bytes - cache_bytes(cfg, S, 1, "bf16")
    assert read == pytest.approx(2 * (counted.active - counted.input_embedding))


def test_the_bound_is_the_slower_of_two():
    cfg = decoder(MOE)
    work = decode(cfg, S, 4, "bf16")
    narrow = bound(work, Device("", 0, work.read_bytes / 2, 1e30, ""), usd_per_hour=7.2)
    assert (narrow.limit, narrow.tokens_per_s) == ("bandwidth", pytest.approx(2.0))
    # Two tokens a second are 7200 an hour.
    assert narrow.usd_per_million == pytest.approx(1000)
    slow = bound(work, Device("", 0, 1e30, work.flops / 8, ""), usd_per_hour=None)
    assert (slow.limit, slow.tokens_per_s) == ("arithmetic", pytest.approx(0.5))
    assert slow.usd_per_million is None


def test_devices_by_name():
    assert device("RTX 4090") == device("rtx-4090") == DEVICES["rtx4090"]
    with pytest.raises(ValueError, match="did you mean h100"):
        device("h1000")
    with pytest.raises(ValueError, match="h100, h200"):
        device("abacus")


def test_every_device_says_where_its_numbers_are_from():
    for entry in DEVICES.values():
        assert entry.source
        assert entry.memory_bytes > 2**34
        assert 1e11 < entry.bytes_per_s < 1e13 < entry.flops_per_s < 1e16
