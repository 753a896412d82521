"""Pruned models: what they compute, what they cost, how experts are chosen."""

import math

import pytest
import torch
from torch.nn import functional as F

from moestro.checkpoints.folders import atomic_folder
from moestro.checkpoints.reading import read_model
from moestro.checkpoints.writing import save_model
from moestro.config import ModelConfig
from moestro.data.domains import ALL
from moestro.data.windows import HeldOut
from moestro.errors import ConfigError, DataError
from moestro.models.decoder import Decoder
from moestro.surgery.calibration import LayerStatistics
from moestro.surgery.cost import WHOLE, costs, fewest
from moestro.surgery.layers import Layers
from moestro.surgery.prune import CRITERIA, at_random, fewer, highest, possible, pruned

from ..checkpoints.families import tiny

TOKENS = torch.randint(0, tiny.VOCABULARY, (5, 13), generator=torch.Generator().manual_seed(3))
# One of each way to choose: shares of the chosen, plain shares, biases of selection in groups, a
# dense layer before, biases of logits and experts, a shared expert.
NAMES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3 of 12", "gpt_oss", "phimoe")
KIND, DEEPSEEK = tiny.TINY["deepseek_v3"]


def stored(name, folder):
    """A tiny model of a family in float64, and what reads it layer by layer."""
    tiny.save(tiny.build(name).double(), folder)
    return Layers(folder)


def mask(model, keep):
    """Routers that never choose, and give no weight to, experts that are not kept."""
    for layer, block in enumerate(model.blocks):
        if layer in keep:
            router = block.ffn.router
            gone_E = torch.ones(router.cfg.num_experts, dtype=torch.bool)
            gone_E[keep[layer]] = False
            whole = router.logits
            router.logits = lambda *args, whole=whole, gone_E=gone_E, **more: whole(
                *args, **more
            ).masked_fill(gone_E, -math.inf)
            if router.bias is not None:
                router.bias = router.bias.masked_fill(gone_E, -math.inf)


@pytest.mark.parametrize("name", NAMES)
def test_pruned_is_the_whole_model_with_a_masked_router(name, tmp_path, monkeypatch):
    wide = (KIND, {**DEEPSEEK, "n_routed_experts": 12})  # of 8 in 4 groups, none can go
    monkeypatch.setitem(tiny.TINY, "deepseek_v3 of 12", wide)
    layers = stored(name, tmp_path / "whole")
    number = possible(layers.cfg)[-1]
    keep = at_random(layers.cfg, number, seed=5)
    change = pruned(layers.cfg, keep)
    layers.write(change, tmp_path / "pruned")
    whole, smaller = read_model(tmp_path / "whole"), read_model(tmp_path / "pruned")
    before = whole(TOKENS).logits
    mask(whole, keep)
    masked, got = whole(TOKENS).logits, smaller(TOKENS).logits
    assert (masked - got).abs().max() <= 1e-12
    assert (masked - before).abs().max() > 1e-3
    # As it was computed on the way, the bits of the written model, and of the whole one.
    bits_CN = layers.bits(TOKENS, [change])
    nats = F.cross_entropy(got[:, :-1].transpose(1, 2), TOKENS[:, 1:], reduction="none")
    assert (bits_CN[0] - nats.sum(1) / math.log(2)).abs().max() < 1e-11
    # Each number is the stored one: bitwise.
    for layer, kept in keep.items():
        old, new = whole.blocks[layer].ffn, smaller.blocks[layer].ffn
        assert torch.equal(old.experts.down[kept], new.experts.down)
        assert torch.equal(old.router.weight[kept], new.router.weight)
    # And transformers runs it.
    theirs = tiny.load(tmp_path / "pruned").float()(TOKENS).logits
    assert (theirs - got).abs().max() < 1e-3


def test_settings_that_no_family_has_are_refused_with_what_to_do(tmp_path):
    moe = {"hidden_dim": 8, "num_experts": 4, "top_k": 2}
    moe["router"] = {"kind": "sigmoid", "selection_bias": True}
    cfg = ModelConfig(dim=16, num_layers=1, vocab_size=tiny.VOCABULARY, moe=moe)
    with atomic_folder(tmp_path / "own") as inside:
        save_model(Decoder(cfg), inside)
    layers = Layers(tmp_path / "own")
    message = "no family .* in the way, or give a model that one can express: surgery writes"
    with pytest.raises(ConfigError, match=message):
        layers.fields(fewer(cfg, 3))


def test_windows_in_several_passes_cost_the_same(tmp_path):
    layers = stored("mixtral", tmp_path)
    changes = [layers.unchanged(), pruned(layers.cfg, at_random(layers.cfg, 3, 0))]
    at_once = layers.bits(TOKENS, changes)
    steps = []
    few = layers.bits(TOKENS, changes, memory_bytes=1, progress=lambda *done: steps.append(done))
    assert (at_once - few).abs().max() < 1e-11
    assert steps[-1] == (15, 15)


def test_costs_are_paired_and_by_domain(tmp_path):
    layers = stored("mixtral", tmp_path)
    held_out = {"a": HeldOut(TOKENS[:2], 2.0), "b": HeldOut(TOKENS[2:], 3.0)}
    change = pruned(layers.cfg, at_random(layers.cfg, 3, 0))
    found = costs(layers, held_out, {"less": change})
    whole_N, less_N = layers.bits(TOKENS, [layers.unchanged(), change])
    size = 12 * (2 * 2.0 + 3 * 3.0)
    assert found[WHOLE].bits[ALL] == pytest.approx(float(whole_N.sum()) / size)
    assert found["less"].bits["b"] == pytest.approx(float(less_N[2:].sum()) / (12 * 9))
    more_N = less_N - whole_N
    assert found["less"].change == pytest.approx(float(more_N.sum()) / size)
    assert found["less"].relative == pytest.approx(float(more_N.sum() / whole_N.sum()))
    spread = 2 * more_N[:2].var() + 3 * more_N[2:].var()
    assert found["less"].error == pytest.approx(float(spread) ** 0.5 / size)
    assert found[WHOLE].error == 0
    alone = costs(layers, {"a": HeldOut(TOKENS[:1], 2.0)}, {})
    assert math.isnan(alone[WHOLE].error)
    with pytest.raises(DataError, match="one of 2 domains is called 'all'"):
        costs(layers, {"a": held_out["a"], "all": held_out["b"]}, {})


def test_criteria_in_plain_numbers():
    seen = LayerStatistics(
        counts_E=torch.tensor([4.0, 1.0, 0.0]),
        norms_E=torch.tensor([8.0, 3.0, 0.0]),
        weighted_E=torch.tensor([2.0, 1.5, 0.0]),
        alike_EE=torch.eye(3),
        means_ED=None,
    )
    assert {name: score(seen).tolist() for name, score in CRITERIA.items()} == {
        "reap": [0.5, 1.5, 0.0],
        "frequency": [4.0, 1.0, 0.0],
        "ean": [8.0, 3.0, 0.0],
        "weighted": [2.0, 1.5, 0.0],
    }


def test_each_group_keeps_as_many():
    scores_E = torch.tensor([9.0, 8.0, 7.0, 1.0, 2.0, 3.0])
    assert highest(scores_E, 3).tolist() == [0, 1, 2]
    assert highest(scores_E, 4, groups=2).tolist() == [0, 1, 4, 5]


def test_the_fewest_are_found_by_bisection():
    asked = []
    fits = lambda number: asked.append(number) or number >= 11  # noqa: E731
    assert fewest(list(range(2, 64)), fits) == 11
    assert len(asked) <= 6
    assert fewest([2, 3], lambda _: False) is None


def test_too_few_experts_are_refused():
    moe = {"hidden_dim": 8, "num_experts": 8, "top_k": 3}
    cfg = ModelConfig(moe=moe)
    assert possible(cfg) == [3, 4, 5, 6, 7]
    for number in (2, 8):
        with pytest.raises(ConfigError, match=rf"{number} experts .* left with 3 to 7$"):
            fewer(cfg, number)
    grouped = ModelConfig(moe={**moe, "router": {"num_groups": 4, "top_groups": 2}})
    with pytest.raises(ConfigError, match="none of 8 experts can go"):
        possible(grouped)
    router = {"num_groups": 4, "top_groups": 2, "group_score": "max"}
    grouped = ModelConfig(moe={**moe, "top_k": 2, "router": router})
    with pytest.raises(ConfigError, match="left with 4 to 4, a multiple of its 4 groups"):
        fewer(grouped, 5)
    best_two = {**moe, "num_experts": 16, "top_k": 2, "router": {**router, "group_score": "top2"}}
    assert possible(ModelConfig(moe=best_two)) == [8, 12]
    with pytest.raises(ConfigError, match="dense"):
        possible(ModelConfig())
    with pytest.raises(ConfigError, match="hash"):
        possible(ModelConfig(moe={**moe, "router": {"kind": "hash"}}))
