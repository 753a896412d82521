"""Mixtures made of dense models: the same function at step 0, in our reader and transformers'."""

import pytest
import torch

from moestro.checkpoints.reading import read_model
from moestro.errors import ConfigError
from moestro.surgery.layers import Layers
from moestro.surgery.upcycle import Recipe, rounds_to, upcycled

from ..checkpoints.families import tiny

TOKENS = torch.randint(0, tiny.VOCABULARY, (3, 13), generator=torch.Generator().manual_seed(4))
RECIPES = [
    Recipe(6, 2),
    Recipe(8, 4, granularity=2),
    Recipe(6, 2, shared=True),
    Recipe(8, 8, granularity=4, shared=True),
]
CASES = [
    ("llama", RECIPES[0], "mixtral"),
    ("llama", RECIPES[1], "mixtral"),
    ("llama", RECIPES[2], "glm4_moe"),  # its heads are not D / H wide
    ("llama_scaled", RECIPES[3], "qwen2_moe"),
    ("mistral", RECIPES[1], "mixtral"),
    ("qwen2", RECIPES[2], "qwen2_moe"),
    ("qwen3", RECIPES[1], "qwen3_moe"),
    ("qwen3", RECIPES[3], "dots1"),
    ("lfm2", RECIPES[0], "lfm2_moe"),
    ("lfm2", RECIPES[1], "lfm2_moe"),
]


@pytest.mark.parametrize(("name", "recipe", "family"), CASES)
def test_computes_what_the_dense_model_did(name, recipe, family, tmp_path):
    dense = tiny.build(name)
    tiny.save(dense.double(), tmp_path / "dense")
    layers = Layers(tmp_path / "dense")
    change, written = upcycled(layers, recipe)
    assert written == family
    layers.write(change, tmp_path / "mixture", written)
    before, after = read_model(tmp_path / "dense"), read_model(tmp_path / "mixture")
    assert (before(TOKENS).logits - after(TOKENS).logits).abs().max() <= 1e-12
    routing = after(TOKENS).routings[0]
    assert len(routing.experts_R.unique()) == recipe.experts  # all are in use
    theirs = tiny.load(tmp_path / "mixture").double()  # its norms stay fp32
    with torch.no_grad():
        gap = (theirs(TOKENS).logits - dense(TOKENS).logits).abs().max()
    # There LFM2-MoE adds 1e-6 to the sum that a token's weights are divided by.
    assert gap <= (5e-5 if written == "lfm2_moe" else 1e-5)
    assert theirs.config.eos_token_id == dense.config.eos_token_id


def experts_of(folder, recipe):
    layers = Layers(folder)
    change, _ = upcycled(layers, recipe)
    first, again = (layers.block(1, change) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)  # when, and how often
    return layers.block(1, layers.unchanged()), first


def test_noise_and_drop_change_a_share_of_each_expert(tmp_path):
    tiny.save(tiny.build("llama").double(), tmp_path)
    old, noisy = experts_of(tmp_path, Recipe(6, 2, method="noise", share=0.25))
    for name in ("gate_up", "down"):
        added = noisy[f"ffn.experts.{name}"] - old[f"ffn.{name}"]
        assert (added != 0).double().mean() == pytest.approx(0.25, abs=0.03)
        assert added[added != 0].std() == pytest.approx(0.02, rel=0.1)
    old, drop = experts_of(tmp_path, Recipe(6, 2, method="drop", share=0.3))
    gates, ups = (drop["ffn.experts.gate_up"] != old["ffn.gate_up"]).all(2).chunk(2, dim=1)
    downs = (drop["ffn.experts.down"] != old["ffn.down"]).all(1)
    assert torch.equal(gates, ups)
    assert torch.equal(gates, downs)
    assert gates.sum(1).tolist() == [6] * 6  # of 20 units
    assert len({tuple(row) for row in gates.tolist()}) > 1
    new_F = drop["ffn.experts.down"][0][:, downs[0]]
    was_F = old["ffn.down"][0][:, downs[0]]
    assert abs(new_F.mean() - was_F.mean()) < 0.3 * was_F.std()
    assert 0.8 < new_F.std() / was_F.std() < 1.2


@pytest.mark.parametrize(
    "recipe", [Recipe(8, 8, 4), Recipe(6, 2, shared=True), Recipe(8, 4, 2, shared=True)]
)
def test_noise_is_on_the_weights_as_written(recipe, tmp_path):
    """Whatever they were multiplied by before."""
    tiny.save(tiny.build("llama").double(), tmp_path)
    layers = Layers(tmp_path)
    copies, noisy = (
        layers.block(1, upcycled(layers, recipe._replace(method=method, share=1.0))[0])
        for method in ("copy", "noise")
    )
    for name in ("gate_up", "down"):
        added = noisy[f"ffn.experts.{name}"] - copies[f"ffn.experts.{name}"]
        assert added.std() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("dtype", "recipe", "rounded"),
    [
        (torch.bfloat16, Recipe(4, 2), None),
        (torch.bfloat16, Recipe(4, 4, 2), None),
        (torch.bfloat16, Recipe(6, 3, 3), torch.bfloat16),
        (torch.bfloat16, Recipe(8, 4, 4, shared=True), None),
        (torch.bfloat16, Recipe(6, 3, 3, shared=True), torch.bfloat16),
        (torch.float32, Recipe(6, 3, 3), None),
    ],
)
def test_copies_are_exact_unless_a_factor_needs_more_bits(
    dtype, recipe, rounded, tmp_path, monkeypatch
):
    kind, changes = tiny.TINY["llama"]
    monkeypatch.setitem(tiny.TINY, "llama", (kind, {**changes, "intermediate_size": 24}))
    tiny.save(tiny.build("llama").to(dtype), tmp_path / "dense")
    layers = Layers(tmp_path / "dense")
    assert rounds_to(layers, recipe) == rounded
    change, family = upcycled(layers, recipe)
    layers.write(change, tmp_path / "mixture", family)
    before, after = (
        read_model(tmp_path / name, dtype=torch.float32) for name in ("dense", "mixture")
    )
    gap = (before(TOKENS).logits - after(TOKENS).logits).abs().max()
    assert gap < 1e-5 if rounded is None else gap > 1e-4


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(6, 1), "top_k is 1; it must be 2 to 6"),
        (Recipe(6, 7), "top_k is 7; it must be 2 to 6"),
        (Recipe(6, 3, granularity=3), "granularity 3 does not divide the network's 20 hidden"),
        (Recipe(8, 3, granularity=2), "8 experts, 3 per token, do not make whole copies of 2"),
        (Recipe(6, 2, method="drop", share=0.0), "share to change is 0.0"),
        (
            Recipe(6, 2, method="drop", share=0.02),
            r"0\.02 of the 20 hidden units .* least is 0\.05$",
        ),
        (Recipe(8, 4, 2, "drop", 0.05), r"0\.05 of the 10 hidden units .* least is 0\.1$"),
        (
            Recipe(6, 2, method="noise", share=1e-4),
            r"0\.0001 of the 960 weights .* least is 0\.001$",
        ),
    ],
)
def test_numbers_that_do_not_go_together(recipe, message, tmp_path):
    tiny.save(tiny.build("llama"), tmp_path)
    with pytest.raises(ConfigError, match=message):
        upcycled(Layers(tmp_path), recipe)


@pytest.mark.parametrize(
    ("name", "recipe", "message"),
    [
        (
            "qwen2",
            RECIPES[0],
            r"of mixtral: .*attention\.bias.*\. With a shared expert qwen2_moe can$",
        ),
        ("lfm2", RECIPES[2], r"of mixtral: .*kind conv\. Without a shared expert lfm2_moe can$"),
        ("biased", RECIPES[0], r"attention\.bias.*\. Nor can one with a shared expert; name a fam"),
        ("biased", RECIPES[2], r"attention\.bias.*\. Nor can one without a shared expert; name a"),
    ],
)
def test_what_no_layout_can_express_is_refused(name, recipe, message, tmp_path, monkeypatch):
    kind, changes = tiny.TINY["llama"]
    monkeypatch.setitem(tiny.TINY, "biased", (kind, {**changes, "attention_bias": True}))
    tiny.save(tiny.build(name), tmp_path)
    with pytest.raises(ConfigError, match=message):
        upcycled(Layers(tmp_path), recipe)


def test_a_family_that_cannot_and_a_mixture_are_refused(tmp_path):
    tiny.save(tiny.build("qwen2"), tmp_path / "dense")
    with pytest.raises(ConfigError, match=r"attention\.bias is 'qkv'; only"):
        upcycled(Layers(tmp_path / "dense"), Recipe(6, 2), "qwen3_moe")
    tiny.save(tiny.build("mixtral"), tmp_path / "mixture")
    with pytest.raises(ConfigError, match="a mixture of 6 experts already"):
        upcycled(Layers(tmp_path / "mixture"), Recipe(6, 2))
