"""Merged experts: groups, alignment, and what must not change."""

import itertools

import numpy as np
import pytest
import torch

from moestro.checkpoints.reading import read_model
from moestro.config import ModelConfig
from moestro.surgery.assignment import cheapest
from moestro.surgery.calibration import LayerStatistics, collect
from moestro.surgery.layers import Change, Layers
from moestro.surgery.merge import METHODS, by_output, by_router, groups_of, merged

from ..checkpoints.families import tiny

TOKENS = torch.randint(0, tiny.VOCABULARY, (6, 13), generator=torch.Generator().manual_seed(4))


def statistics(counts, means=None, alike=None):
    counts_E = torch.tensor(counts, dtype=torch.float64)
    alike_EE = torch.eye(len(counts)) if alike is None else alike
    return LayerStatistics(counts_E, counts_E, counts_E, alike_EE, means)


@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_the_assignment_is_the_cheapest_of_all(size):
    draw = np.random.default_rng(size)
    for ties in (0, 3):
        cost_FF = draw.normal(size=(size, size)).round(ties or 8)
        columns = cheapest(cost_FF)
        assert sorted(columns) == list(range(size))
        orders = itertools.permutations(range(size))
        best = min(sum(cost_FF[range(size), order]) for order in orders)
        assert cost_FF[range(size), columns].sum() == pytest.approx(best)


def test_average_linkage_by_its_definition():
    means_ED = torch.randn(9, 4, dtype=torch.float64)
    groups = [[expert] for expert in range(9)]
    for number in range(8, 0, -1):

        def distance(pair):
            return torch.stack(
                [(means_ED[a] - means_ED[b]).norm() for a in pair[0] for b in pair[1]]
            ).mean()

        one, other = min(itertools.combinations(groups, 2), key=distance)
        groups = [group for group in groups if group not in (one, other)] + [sorted(one + other)]
        assert by_output(statistics([1] * 9, means_ED), number) == sorted(groups)


def test_the_rare_join_the_frequent_whose_logits_are_alike():
    logits_TE = torch.tensor([[1.0, 0.9, -1.0, -3.0], [0.0, 0.1, 0.5, 1.0]], dtype=torch.float64)
    seen = statistics([9, 1, 2, 8], alike=logits_TE.T @ logits_TE)
    assert by_router(seen, 2) == [[0, 1], [2, 3]]
    assert by_router(seen, 3) == [[0, 1], [2], [3]]


@pytest.mark.parametrize("method", METHODS)
def test_experts_stay_in_their_group_of_the_router(method):
    """Those of one group are alike to those of the other, and to no other of their own."""
    means_ED = torch.eye(3, dtype=torch.float64).repeat(2, 1)
    means_ED[2] += 0.1
    seen = statistics([9, 8, 1, 1, 8, 9], means_ED, means_ED @ means_ED.T)
    moe = {"hidden_dim": 8, "num_experts": 6, "top_k": 2}
    cfg = ModelConfig(moe={**moe, "router": {"num_groups": 2, "top_groups": 1}})
    groups = groups_of(cfg, seen, method, 4)
    assert sorted(expert for group in groups for expert in group) == list(range(6))
    assert all(len({expert // 3 for expert in group}) == 1 for group in groups)
    assert [len({group[0] // 3}) for group in groups] == [1] * 4
    assert sum(group[0] < 3 for group in groups) == 2
    alone = ModelConfig(moe=moe)
    assert groups_of(alone, seen, method, 4) == METHODS[method](seen, 4)
    assert groups_of(alone, seen, method, 3) != groups_of(cfg, seen, method, 2)


def test_the_mean_is_by_frequency_and_the_row_of_the_most_frequent(tmp_path):
    tiny.save(tiny.build("gpt_oss").double(), tmp_path)
    layers = Layers(tmp_path)
    old = layers.block(1, layers.unchanged())
    groups = [[0, 3], [1], [2, 4], [5]]
    seen = dict.fromkeys(range(3), statistics([1, 5, 0, 3, 0, 2]))
    new = layers.block(1, merged(layers.cfg, dict.fromkeys(range(3), groups), seen))
    for name in ("experts.gate_up", "experts.down", "experts.gate_up_bias", "experts.down_bias"):
        before, after = old[f"ffn.{name}"], new[f"ffn.{name}"]
        assert torch.allclose(after[0], 0.25 * before[0] + 0.75 * before[3], rtol=1e-14)
        assert torch.equal(after[1], before[1])
        assert torch.allclose(after[2], (before[2] + before[4]) / 2, rtol=1e-14)  # none ran
    for name in ("ffn.router.weight", "ffn.router.logit_bias"):
        assert torch.equal(new[name], old[name][[3, 1, 2, 5]])
    assert torch.equal(new["attention.out.weight"], old["attention.out.weight"])


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_merging_identical_experts_changes_nothing(name, align, tmp_path):
    """Experts 4 and 5 are made copies of 1, in another order of hidden units where aligned.

    Their router rows never win, so nobody misses them.
    """
    tiny.save(tiny.build(name).double(), tmp_path / "plain")
    layers = Layers(tmp_path / "plain")

    def copied(layer, tensors):
        made = {key: tensor.clone() for key, tensor in tensors.items()}
        units = made["experts.down"].shape[2]
        order = torch.randperm(units) if align else torch.arange(units)
        rows = torch.cat([order, order + units])
        for expert in (4, 5):
            for key, tensor in made.items():
                if key.startswith("experts."):
                    tensor[expert] = tensor[1]
            made["experts.gate_up"][expert] = made["experts.gate_up"][1][rows]
            made["experts.down"][expert] = made["experts.down"][1][:, order]
            if "experts.gate_up_bias" in made:
                made["experts.gate_up_bias"][expert] = made["experts.gate_up_bias"][1][rows]
        return made

    layers.write(Change.of_networks(layers.cfg, copied), tmp_path / "twice")
    layers = Layers(tmp_path / "twice")
    groups = {layer: [[0], [1, 4, 5], [2], [3]] for layer in range(3)}
    never = dict.fromkeys(range(3), statistics([1, 7, 1, 1, 3, 2]))
    change = merged(layers.cfg, groups, never, align)
    layers.write(change, tmp_path / "merged")
    whole, got = read_model(tmp_path / "twice"), read_model(tmp_path / "merged")
    for block in whole.blocks:
        rows = block.ffn.router.logits
        block.ffn.router.logits = lambda *args, rows=rows: rows(*args).index_fill(
            1, torch.tensor([4, 5]), -torch.inf
        )
    assert (whole(TOKENS).logits - got(TOKENS).logits).abs().max() <= 1e-11
    for before, after in zip(whole.blocks, got.blocks, strict=True):
        assert torch.allclose(
            before.ffn.experts.down[:4], after.ffn.experts.down, rtol=1e-14, atol=0
        )


def test_what_was_merged_runs_in_transformers(tmp_path):
    tiny.save(tiny.build("qwen3_moe"), tmp_path / "whole")
    layers = Layers(tmp_path / "whole")
    seen = collect(layers, TOKENS, every=True, least=1)
    groups = {layer: by_output(each, 4) for layer, each in seen.items()}
    layers.write(merged(layers.cfg, groups, seen, align=True), tmp_path / "merged")
    ours, theirs = read_model(tmp_path / "merged"), tiny.load(tmp_path / "merged")
    assert (ours(TOKENS).logits - theirs(TOKENS).logits).abs().max() < 1e-4
