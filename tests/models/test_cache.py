"""The cache against a list of everything: what it returns, how much it copies, what it holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro import Decoder, ModelConfig
from moestro.errors import ShapeError
from moestro.models.cache import LayerCache


def positions(start, length):
    """Two tensors [2, 3, S, A] whose every number names its position."""
    numbers = torch.arange(start, start + length).float()
    return numbers[:, None].expand(2, 3, -1, 5).clone(), -numbers[:, None].expand(2, 3, -1, 4)


def nbytes(cache):
    return sum(buffer.untyped_storage().nbytes() for buffer in cache._buffers)


@given(st.integers(1, 40), st.lists(st.integers(1, 60), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_returns_what_the_new_positions_may_see(limit, lengths):
    cache, passed = LayerCache(limit), 0
    for length in lengths:
        seen = cache.extend(*positions(passed, length))
        first = max(0, passed - (limit - 1))
        passed += length
        for actual, expected in zip(seen, positions(first, passed - first), strict=True):
            assert torch.equal(actual, expected)


def test_memory_stays_bounded():
    limit, cache = 50, LayerCache(50)
    bound = (limit + limit // 8 + 16) * 2 * 3 * (5 + 4) * 4
    for passed in range(0, 1200, 3):
        cache.extend(*positions(passed, 3))
        assert nbytes(cache) <= bound
    cache.extend(*positions(1200, 900))
    assert nbytes(cache) <= bound, "a long prompt is not kept alive"


def test_short_texts_take_little_memory():
    cache = LayerCache(1_000_000)
    for passed in range(100):
        cache.extend(*positions(passed, 1))
    assert nbytes(cache) <= 200 * 2 * 3 * (5 + 4) * 4


@pytest.mark.parametrize("limit", [64, 4000])
def test_a_token_copies_few_positions(limit, monkeypatch):
    """Over 3000 tokens: growing copies less than 3 positions a token, sliding less than 9."""
    moved = []
    move = LayerCache._move
    monkeypatch.setattr(
        LayerCache,
        "_move",
        lambda self, new, kept, total: moved.append(kept) or move(self, new, kept, total),
    )
    cache = LayerCache(limit)
    for passed in range(3000):
        cache.extend(*positions(passed, 1))
    assert moved
    assert sum(moved) < (3 if limit > 3000 else 9) * 3000


def test_gradients_pass_through():
    cache = LayerCache(4)
    parts = [torch.randn(1, 3, 2, requires_grad=True) for _ in range(3)]
    total = sum(cache.extend(part)[0].square().sum() for part in parts)
    total.backward()
    # Seen: 0-2; then 0-5; then the last three of those, and 6-8.
    for part, times in zip(parts, [[2, 2, 2], [2, 2, 2], [1, 1, 1]], strict=True):
        torch.testing.assert_close(part.grad, 2 * part * torch.tensor(times)[:, None])


def test_filled_in_inference_mode_and_used_outside():
    cache = LayerCache(10)
    with torch.inference_mode():
        cache.extend(*positions(0, 3))
    with torch.no_grad():
        seen = cache.extend(*positions(3, 2))
    assert torch.equal(seen[0], positions(0, 5)[0])


def test_another_batch_is_refused():
    cache = LayerCache(10)
    cache.extend(torch.randn(2, 3, 5))
    with pytest.raises(ShapeError, match=r"batch of 2, and 1"):
        cache.extend(torch.randn(1, 1, 5))
    model = Decoder(ModelConfig(dim=16, num_layers=1, vocab_size=9)).eval()
    whole = model.new_cache(2)
    model(torch.zeros(2, 3, dtype=torch.int64), cache=whole)
    with pytest.raises(ShapeError, match=r"batch of 2, and 1"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=whole)


def test_each_layer_keeps_its_window():
    attention = {"context": 30, "window": {"size": 4, "full_every": 2}}
    model = Decoder(ModelConfig(dim=16, num_layers=4, attention=attention))
    assert [layer.limit for layer in model.new_cache().layers] == [4, 30, 4, 30]
    wide = {"context": 3, "window": {"size": 4}}
    model = Decoder(ModelConfig(dim=16, num_layers=2, attention=wide))
    assert [layer.limit for layer in model.new_cache().layers] == [3, 3]


def test_who_writes_in_place_finds_room_after_what_is_kept():
    """As the native step does: whole buffers, the place of the next position, then `advance`."""
    limit, cache, like = 20, LayerCache(20), tuple(each[:, :, :0] for each in positions(0, 1))
    for passed in range(100):
        buffers, place = cache.room(1, *like)
        for buffer, new in zip(buffers, positions(passed, 1), strict=True):
            buffer[:, :, place] = new[:, :, 0]
        cache.length += 1
        first = max(0, passed + 1 - limit)
        for held, expected in zip(cache.held(), positions(first, passed + 1 - first), strict=True):
            assert torch.equal(held, expected)


def test_more_positions_than_are_kept_find_room_for_as_long_as_they_are_needed():
    limit, cache, like = 20, LayerCache(20), tuple(each[:, :, :0] for each in positions(0, 1))
    passed = 0
    for added in (3, 70, 1, 50, 7):
        buffers, place = cache.room(added, *like)
        assert place + added <= buffers[0].shape[-2]
        for buffer, new in zip(buffers, positions(passed, added), strict=True):
            buffer[:, :, place : place + added] = new
        cache.length += added
        passed += added
        first = max(0, passed - limit)
        for held, expected in zip(cache.held(), positions(first, passed - first), strict=True):
            assert torch.equal(held[..., -(passed - first) :, :], expected)
    for _ in range(40):  # the long buffers go
        buffers, _ = cache.room(1, *like)
        cache.length += 1
    assert buffers[0].shape[-2] <= limit + limit // 8 + 16


def test_a_fork_has_memory_of_its_own():
    cache = LayerCache(20)
    cache.extend(*positions(0, 30))
    twin = cache.fork()
    seen = cache.extend(*positions(30, 2))
    other = twin.extend(*positions(30, 3))
    for mine, theirs, expected in zip(seen, other, positions(11, 22), strict=True):
        assert torch.equal(mine, expected[:, :, :21])
        assert torch.equal(theirs, expected)
