"""Keys and values as int8: native steps against the model's own forward, bits, bytes, forks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.config import ModelConfig
from moestro.errors import ShapeError
from moestro.infer.decoding import Decoding, NativeDecoding
from moestro.infer.native_decoder import NativeDecoder, supports
from moestro.kernels import native_cpu, native_library
from moestro.kernels.native_library import PATHS
from moestro.kernels.whole import from_whole, to_whole
from moestro.models.blocks import cache_as
from moestro.models.budget import cache_bytes
from moestro.models.cache import KVCache, LayerCache, WholeCache
from moestro.models.decoder import Decoder

MOE = {"hidden_dim": 16, "num_experts": 3, "top_k": 3}  # all: no near tie turns a choice
HEADS = {"num_heads": 4, "num_kv_heads": 2, "context": 64}
LATENT = {"kv_rank": 24, "nope_dim": 8, "rope_dim": 4, "value_dim": 10}
DELTA = {"kind": "delta", "key_heads": 2, "value_heads": 4, "key_dim": 7, "value_dim": 5}
VARIANTS: dict[str, dict[str, Any]] = {
    "whole lines": {"attention": {**HEADS, "head_dim": 64}},
    "five heads, 70 wide": {"attention": {"num_heads": 5, "num_kv_heads": 1, "head_dim": 70}},
    "windows and sinks": {
        "attention": {**HEADS, "head_dim": 6, "sinks": True, "window": {"size": 37}}
    },
    "latent": {"attention": {"num_heads": 3, "latent": LATENT, "context": 64}},
    "delta": {"attention": {**HEADS, "window": {**DELTA, "full_every": 2}}},
}
PATHS_HERE = range(native_library.library().moestro_best_path() + 1)

needs_native = pytest.mark.skipif(
    native_cpu.available() is not None, reason=str(native_cpu.available())
)


def decoder(name: str, kind: Any = "int8", dtype: torch.dtype = torch.float32) -> Decoder:
    sizes = {"vocab_size": 70, "dim": 32, "num_layers": 2, "moe": MOE}
    model = Decoder(ModelConfig(**{**sizes, **VARIANTS[name]})).eval().to(dtype)
    cache_as(model, kind)
    return model


@pytest.mark.parametrize("width", [1, 64, 70])
def test_rows_as_bytes(width: int) -> None:
    x_RA = torch.randn(9, width) * torch.logspace(-20, 20, 9)[:, None]
    whole_RA, scale_R1 = to_whole(x_RA)
    error_RA = (from_whole(whole_RA, scale_R1, torch.float32) - x_RA).abs()
    assert (error_RA <= x_RA.abs().amax(-1, keepdim=True) / 127 * 0.501).all()
    assert whole_RA.abs().amax(-1).tolist() == [127] * 9


def test_ties_zeros_and_what_is_not_finite() -> None:
    rows = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0, 0, 0, 0], [1, torch.inf, 0, 0]])
    rows = torch.cat([rows, torch.tensor([[torch.nan, 1, 0, 0]])])
    whole, scale = to_whole(rows)
    assert whole.tolist() == [[127, 0, 2, -2], [0] * 4, [0] * 4, [0] * 4]
    assert scale[:2, 0].tolist() == [1.0, 0.0]
    assert scale[2:].isnan().all()


@needs_native
@pytest.mark.parametrize("name", VARIANTS)
def test_native_steps_are_those_of_the_forward(name: str) -> None:
    model = decoder(name)
    assert supports(model) is None
    python, native, exact = Decoding(model), NativeDecoding(model), Decoding(decoder(name))
    exact.model.load_state_dict(model.state_dict())
    cache_as(exact.model, "as-is")
    prompt = torch.randint(0, 70, (50,)).tolist()
    pairs = [way.begin(prompt) for way in (python, native, exact)]
    pasts, passed = zip(*pairs, strict=True)
    for token in torch.randint(0, 70, (4,)).tolist():
        want, got, other = (each.logits_NV for each in passed)
        assert (got - want).norm() <= 2e-3 * want.norm()
        assert 0 < (other - want).norm() <= 0.05 * want.norm()
        passed = [
            way.step([[token]], [past])[0]
            for way, past in zip((python, native, exact), pasts, strict=True)
        ]


@needs_native
def test_what_is_written_is_the_definition() -> None:
    """Bit by bit, of the first layer, which sees the same in both."""
    whole, plain = decoder("whole lines"), decoder("whole lines", "as-is")
    plain.load_state_dict(whole.state_dict())
    tokens, caches = torch.randint(0, 70, (40,)).tolist(), []
    for model in (whole, plain):
        caches.append(model.new_cache(1))
        NativeDecoder(model).step([tokens], [caches[-1]])
    layer, numbers = caches[0].layers[0], caches[1].layers[0]
    assert isinstance(layer, WholeCache)
    assert isinstance(numbers, LayerCache)
    kept = LayerCache.held(layer)
    expected = [to_whole(each) for each in numbers.held()]
    for place, (whole_RA, scale_R1) in enumerate(expected):
        assert torch.equal(kept[place], whole_RA)
        assert torch.equal(kept[place + 2], scale_R1)


@pytest.fixture
def library():
    library = native_library.library()
    path, threads = library.moestro_path(), library.moestro_threads()
    yield library
    library.moestro_use_path(path)
    library.moestro_use_threads(threads, native_library._team())


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_bits_for_any_cut_path_and_threads(
    name: str, dtype: torch.dtype, library: Any
) -> None:
    model = decoder(name, dtype=dtype)
    way, tokens = NativeDecoding(model), torch.randint(0, 70, (75,)).tolist()

    def cut(*sizes: int) -> Tensor:
        past, at = way.new(), 0
        for size in sizes:
            (last,) = way.step([tokens[at : at + size]], [past])
            at += size
        return last.logits_NV

    want = cut(*[1] * 75)
    for path in PATHS_HERE:
        library.moestro_use_path(path)
        for sizes in ([75], [3, 1, 40, 31]):
            assert torch.equal(cut(*sizes), want), (PATHS[path], sizes)
    library.moestro_use_threads(3, None)
    past, other = way.new(), way.new()
    way.step([tokens[:40], tokens[:7]], [past, other])
    twin = past.fork(33) if past.can_cut(33) else None
    outputs = way.step([tokens[40:], tokens[7:]], [past, other])
    assert all(torch.equal(each.logits_NV, want) for each in outputs)
    if twin is not None:
        assert torch.equal(way.step([tokens[33:]], [twin])[0].logits_NV, want)


@needs_native
def test_another_kind_of_cache_is_refused() -> None:
    model = decoder("whole lines")
    native, other = NativeDecoder(model), decoder("whole lines", "as-is")
    cache = other.new_cache(1)
    with torch.inference_mode():
        other(torch.tensor([[1, 2]]), cache=cache)
    for tokens in ([1], [1] * 40):  # within its room and beyond
        with pytest.raises(ShapeError, match="keeps 2 tensors; given 4"):
            native.step([tokens], [cache])


@pytest.mark.parametrize("name", ["whole lines", "latent"])
def test_bytes_are_those_planned(name: str) -> None:
    model = decoder(name)
    cache: KVCache = model.new_cache(2)
    with torch.inference_mode():
        model(torch.randint(0, 70, (2, 30)), cache=cache)
    held = [LayerCache.held(each) for each in cache.layers if isinstance(each, LayerCache)]
    size = sum(each.nbytes for layer in held for each in layer)
    assert size == cache_bytes(model.cfg, 30, 2, 4, "int8")
    assert 3 * size < cache_bytes(model.cfg, 30, 2, 4)


def test_forward_in_pieces_is_the_whole_forward() -> None:
    model, tokens_1S = decoder("windows and sinks"), torch.randint(0, 70, (1, 60))
    with torch.inference_mode():
        whole = model(tokens_1S, cache=model.new_cache(1)).logits
        cache = model.new_cache(1)
        parts = [model(each, cache=cache).logits for each in tokens_1S.split([1, 44, 15], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-3, rtol=1e-3)
