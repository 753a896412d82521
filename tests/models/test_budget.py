"""What is counted for a model in use, against what it really makes."""

import pytest
import torch

from moestro.config import ModelConfig
from moestro.models.budget import Mixture, Needs, Use, fit, needs, smallest
from moestro.models.cache import WholeCache

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
