from typing import Any

import pytest
import torch

from moestro.config import ModelConfig
from moestro.infer.decoding import NativeDecoding, decoding_of
from moestro.infer.prefixes import SHORTEST, Prefixes
from moestro.kernels import native_cpu
from moestro.models.cache import KVCache, LayerCache
from moestro.models.decoder import Decoder

pytestmark = pytest.mark.skipif(
    native_cpu.available() is not None, reason=str(native_cpu.available())
)

SIZES: dict[str, Any] = {
    "vocab_size": 70,
    "dim": 32,
    "num_layers": 3,
    "moe": {"hidden_dim": 24, "num_experts": 5, "top_k": 2},
    "attention": {"num_heads": 4, "num_kv_heads": 2, "context": 128},
}


def decoding(**attention: Any) -> NativeDecoding:
    torch.manual_seed(0)
    sizes = {**SIZES, "attention": {**SIZES["attention"], **attention}}
    found = decoding_of(Decoder(ModelConfig(**sizes)).eval())
    assert isinstance(found, NativeDecoding)
    return found


def text(length: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(0, 70, (length,), generator=generator).tolist()
    return tokens


@pytest.mark.parametrize("shared", [SHORTEST, 17, 39])
def test_a_known_beginning_changes_no_bit(shared: int) -> None:
    model, prefixes = decoding(), Prefixes(1 << 30)
    first = text(40)
    past, _ = model.begin(first)
    prefixes.keep(first, past)
    second = [*first[:shared], 69, *text(20, 2)]
    found = prefixes.find(second)
    assert found is not None
    assert found.position >= shared
    position = found.position
    logits_1V = model.read(found, second[position:]).logits_NV
    assert torch.equal(logits_1V, model.begin(second)[1].logits_NV)
    # What was kept is untouched by what went on from it.
    again = prefixes.find(second)
    assert again is not None
    assert torch.equal(model.read(again, second[position:]).logits_NV, logits_1V)
    assert prefixes.hits == 2 * position
    assert prefixes.asked == 2 * len(second)


def test_the_last_token_is_always_left() -> None:
    model, prefixes = decoding(), Prefixes(1 << 30)
    tokens = text(30)
    past, passed = model.begin(tokens)
    prefixes.keep(tokens, past)
    found = prefixes.find(tokens)
    assert found is not None
    assert found.position == 29
    assert torch.equal(model.read(found, tokens[29:]).logits_NV, passed.logits_NV)


def test_a_running_text_is_taken_up_too() -> None:
    model, prefixes = decoding(), Prefixes(0)
    tokens = text(30)
    past, _ = model.begin(tokens)
    found = prefixes.find([*tokens[:25], 3], [(tokens, past)])
    assert found is not None
    assert found.position >= 25
    assert prefixes.nbytes == 0


def test_too_short_or_unknown() -> None:
    model, prefixes = decoding(), Prefixes(1 << 30)
    tokens = text(40)
    prefixes.keep(tokens, model.begin(tokens)[0])
    assert prefixes.find([*tokens[: SHORTEST - 1], (tokens[SHORTEST - 1] + 1) % 70, 1]) is None
    assert prefixes.find(text(40, 5)) is None
    assert prefixes.find([1]) is None


def test_windows_that_have_slid_on() -> None:
    """A window of 8 keeps enough to be cut by few tokens, not by many."""
    model = decoding(window={"size": 8, "full_every": 2})
    tokens = text(90)
    past, _ = model.begin(tokens[:80])
    for token in tokens[80:]:
        model.read(past, [token])
    assert past.can_cut(90)
    cuts = [position for position in range(91) if past.can_cut(position)]
    assert cuts[-1] == 90
    assert 0 < cuts[0] < 90
    for position in (cuts[0], 90):
        twin = past.fork(position)
        logits_1V = model.read(twin, [5, 6]).logits_NV
        assert torch.equal(logits_1V, model.begin([*tokens[:position], 5, 6])[1].logits_NV)
    prefixes = Prefixes(1 << 30)
    prefixes.keep(tokens, past)
    assert prefixes.find([*tokens[:30], 1]) is None
    assert prefixes.find([*tokens, 1]) is not None


def test_memory_is_honoured_and_the_least_used_goes() -> None:
    model = decoding()
    texts = [text(40, seed) for seed in range(4)]
    pasts = [model.begin(each)[0] for each in texts]
    size = pasts[0].nbytes + 40 * 8
    prefixes = Prefixes(3 * size)
    for tokens, past in zip(texts[:3], pasts[:3], strict=True):
        prefixes.keep(tokens, past)
    assert prefixes.nbytes == 3 * size
    assert prefixes.find([*texts[0], 1]) is not None
    prefixes.keep(texts[3], pasts[3])
    assert prefixes.nbytes == 3 * size
    assert prefixes.find([*texts[1], 1]) is None
    assert all(prefixes.find([*texts[n], 1]) is not None for n in (0, 2, 3))
    small = Prefixes(size - 1)
    small.keep(texts[0], pasts[0])
    assert small.nbytes == 0


def test_a_longer_text_takes_the_place_of_its_beginning() -> None:
    model, prefixes = decoding(), Prefixes(1 << 30)
    tokens = text(60)
    prefixes.keep(tokens[:30], model.begin(tokens[:30])[0])
    past, _ = model.begin(tokens)
    prefixes.keep(tokens, past)
    assert prefixes.nbytes == past.nbytes + 60 * 8


def test_a_cut_needs_what_the_next_position_looks_at() -> None:
    layer = LayerCache(4)
    for _ in range(10):
        layer.extend(torch.zeros(1, 1, 2))
    cache = KVCache(())
    cache.layers, cache.position = [layer], 10
    assert [position for position in range(12) if cache.can_cut(position)] == [9, 10]
