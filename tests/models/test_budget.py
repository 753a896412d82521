"""What is counted for a model in use, against what it really makes."""

import pytest
import torch

from moestro.config import ModelConfig
from moestro.kernels import attention
from moestro.models import budget
from moestro.models.budget import Mixture, Needs, Use, fit, needs, smallest
from moestro.models.cache import WholeCache
from moestro.models.indexer import Indexer
from moestro.models.rotary import rotary

CONTEXT, DIM, HIDDEN, EXPERTS, TOP_K = 256, 64, 96, 8, 2
USE = Use(texts=3, tokens=16)
WEIGHTS = 3 * DIM * HIDDEN  # of an expert


def config(**attention: object) -> ModelConfig:
    moe = {"hidden_dim": HIDDEN, "num_experts": EXPERTS, "top_k": TOP_K}
    heads = {"num_heads": 4, "num_kv_heads": 2, "context": CONTEXT}
    return ModelConfig(
        vocab_size=64, dim=DIM, num_layers=2, attention={**heads, **attention}, moe=moe
    )


def counted(cfg: ModelConfig, use: Use, weight: int = 2) -> Needs:
    return needs(cfg, 2, 0, [Mixture(weight * WEIGHTS, EXPERTS, TOP_K)] * 2, use)


PYTHON = {"positions": {"skipped_every": 2}}


@pytest.mark.parametrize(
    ("attention", "scored", "read_back"),
    [({}, False, False), (PYTHON, False, True), ({}, True, True)],
)
def test_numbers_read_back_from_an_int8_cache_are_counted_where_they_are_made(
    attention: dict[str, object], scored: bool, read_back: bool
) -> None:
    cfg, use = config(**attention), USE._replace(scored=scored)
    plain, whole = (counted(cfg, use._replace(cache=kind)) for kind in ("as-is", "int8"))
    assert whole.cache < plain.cache
    if not read_back:
        assert whole.buffers == plain.buffers
        return
    cache = WholeCache(CONTEXT)
    keys_values = torch.randn(2, use.texts, 2, CONTEXT, DIM // 4).bfloat16()
    made = cache.extend(*keys_values)
    # Both as numbers, and while one is made, it and its product in fp32.
    most = sum(each.nbytes for each in made) + 2 * 4 * made[0].numel()
    assert whole.buffers - plain.buffers == most


@pytest.mark.parametrize(("weight", "row"), [(1, 1 + 2 / 8), (2, 2 + 4), (4, 4 + 2)])
def test_rows_of_experts_take_what_a_kind_of_weights_multiplies(weight: int, row: float) -> None:
    """An expert's rows enter in that form, and leave as fp32; buffers are counted for all."""
    cfg, few, many = config(), USE, USE._replace(tokens=USE.tokens + 1000)
    rows = 1000 * TOP_K
    wanted = rows * (4 + row) * (DIM + HIDDEN)
    found = counted(cfg, many, weight).buffers - counted(cfg, few, weight).buffers
    others = 1000 * 4 * (8 * DIM + 3 * 8 * DIM // 4 + EXPERTS)
    assert wanted <= found - others <= 1.2 * wanted


def test_the_smallest_amount_keeps_one_expert_of_each_mixture() -> None:
    wanted = counted(config(), USE)
    assert fit(wanted, smallest(wanted)).kept >= (1, 1)


def test_what_an_indexer_chooses_with_is_counted() -> None:
    """At least its keys in fp32, and scores, products, a mask and what the ties are counted by."""
    assert budget._ROWS == attention.ROWS  # which it cannot import without torch
    latent = {"kv_rank": 8, "nope_dim": 4, "rope_dim": 4, "value_dim": 4, "q_rank": 8}
    index = {"num_heads": 2, "head_dim": 8, "top_k": 4}
    plain, cfg = (
        ModelConfig(dim=DIM, attention={"num_heads": 4, "context": 1024, "latent": each})
        for each in (latent, {**latent, "indexer": index})
    )
    assert cfg.attention.latent is not None
    use, length = Use(texts=2, tokens=2 * 300), 300
    indexer = Indexer(DIM, cfg.attention.latent).bfloat16()
    x_BSD, q_BSR = (torch.randn(2, length, width).bfloat16() for width in (DIM, 8))
    angles = rotary(1024 - length, length, cfg, torch.device("cpu"))
    keys_BPA = torch.randn(2, 1024, 8).bfloat16()
    with torch.profiler.profile(profile_memory=True) as seen:
        choose = indexer(x_BSD, q_BSR, angles, keys_BPA)
        own, keys = range(1024 - attention.ROWS, 1024), range(1024)
        mask = choose(own, keys, attention.visible(own, keys, 1024, None, x_BSD.device))
    assert mask.shape == (2, 1, attention.ROWS, 1024)
    live = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    found = counted(cfg, use).buffers - counted(plain, use).buffers
    assert most <= found <= 1.5 * most
