"""Tensors stored wider than the embedding: surgery neither writes nor runs them rounded."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from moestro.checkpoints.gguf.writing import write_gguf
from moestro.checkpoints.hub import find_checkpoint
from moestro.checkpoints.reading import read_model
from moestro.surgery.calibration import LayerStatistics
from moestro.surgery.layers import Layers
from moestro.surgery.merge import merged
from moestro.surgery.prune import pruned
from moestro.surgery.rounding import rounded
from moestro.surgery.upcycle import Recipe, upcycled

from ..checkpoints.families import tiny

TOKENS = torch.randint(0, tiny.VOCABULARY, (6, 13), generator=torch.Generator().manual_seed(4))
ROUTER, NORM, OUT = "gate.weight", "input_layernorm.weight", "o_proj.weight"
DOWN = "down_proj.weight"
MANY = torch.ones(6, dtype=torch.float64)
SEEN = LayerStatistics(MANY, MANY, MANY, torch.eye(6), None)
KEPT = torch.tensor([0, 2, 3, 5])


def stored(name, folder, *wide):
    """A model in bf16, those of these endings in fp32 with numbers that bf16 does not hold."""
    tiny.save(tiny.build(name).bfloat16(), folder)
    path, draw = folder / "model.safetensors", torch.Generator().manual_seed(2)
    tensors = load_file(path)
    for key in tensors:
        if key.endswith(wide):
            base = 0.2 * torch.randn(tensors[key].shape[-1], generator=draw)
            # Rows of a router that are alike: bf16 rounds what they differ by.
            tensors[key] = base + 1e-3 * torch.randn(tensors[key].shape, generator=draw)
    save_file(tensors, path, metadata={"format": "pt"})
    return Layers(folder), tensors


def changed(layers, kind, folder):
    """(the change, the family to write)."""
    every = range(layers.cfg.num_layers)
    if kind == "prune":
        return pruned(layers.cfg, dict.fromkeys(every, KEPT)), None
    if kind == "merge":
        groups = {layer: [[0, 1], [2], [3, 4], [5]] for layer in every}
        return merged(layers.cfg, groups, dict.fromkeys(every, SEEN)), None
    if kind == "round":
        folder.mkdir()
        return rounded(layers, TOKENS, 32, folder).change, None
    return upcycled(layers, Recipe(6, 2))


@pytest.mark.parametrize("kind", ["prune", "merge", "round", "upcycle"])
def test_each_tensor_keeps_the_dtype_it_is_stored_in(kind, tmp_path):
    name = "mistral" if kind == "upcycle" else "mixtral"
    layers, before = stored(name, tmp_path / "old", ROUTER, NORM, OUT)
    change, family = changed(layers, kind, tmp_path / "blocks")
    layers.write(change, tmp_path / "new", family)
    after = load_file(tmp_path / "new" / "model.safetensors")
    moves = kind == "round"  # all matrices but routers and the embedding
    same = [key for key in after if key in before and ".experts." not in key]
    for key in same:
        assert after[key].dtype == before[key].dtype, key
        if key.endswith(ROUTER):
            rows = KEPT if kind in ("prune", "merge") else slice(None)
            assert torch.equal(after[key], before[key][rows]), key
        elif not (moves and before[key].dim() > 1 and "embed" not in key):
            assert torch.equal(after[key], before[key]), key
    wide = {key for key in before if key.endswith((ROUTER, NORM, OUT))}
    assert len(wide & set(same)) == len(wide) == 3 * (2 if kind == "upcycle" else 3)
    experts = [key for key in after if ".experts." in key]
    assert experts
    assert {after[key].dtype for key in experts} == {torch.bfloat16}


def test_experts_of_a_network_in_fp32_are_not_rounded(tmp_path):
    layers, before = stored("mistral", tmp_path / "old", DOWN)
    change, family = upcycled(layers, Recipe(6, 2))
    layers.write(change, tmp_path / "new", family)
    after = load_file(tmp_path / "new" / "model.safetensors")
    down = before["model.layers.1.mlp.down_proj.weight"]
    assert down.dtype == torch.float32
    assert torch.equal(after["model.layers.1.block_sparse_moe.experts.3.w2.weight"], down)


def test_a_stack_in_several_dtypes_is_held_in_the_widest(tmp_path):
    layers, before = stored(
        "mixtral", tmp_path / "old", "layers.1.block_sparse_moe.experts.2.w2.weight"
    )
    (key,) = (key for key, one in before.items() if one.dtype == torch.float32)
    layers.write(pruned(layers.cfg, dict.fromkeys(range(3), KEPT)), tmp_path / "new")
    after = load_file(tmp_path / "new" / "model.safetensors")
    assert torch.equal(after[key.replace("experts.2", "experts.1")], before[key])


def bits_of(model):
    with torch.no_grad():
        logits_NSV = model(TOKENS[:, :-1]).logits.float()
    nats = F.cross_entropy(logits_NSV.transpose(1, 2), TOKENS[:, 1:], reduction="none")
    return nats.double().sum(1) / torch.tensor(2.0, dtype=torch.float64).log()


def test_the_whole_model_runs_with_its_router_as_stored(tmp_path):
    layers, tensors = stored("mixtral", tmp_path, ROUTER, NORM)
    assert layers.dtype == torch.bfloat16  # routers and norms do not make the rest slower
    found = layers.bits(TOKENS, [layers.unchanged()])[0]
    with pytest.warns(UserWarning, match="rounded"):
        model = read_model(tmp_path)
    as_rounded = bits_of(model)
    for layer, block in enumerate(model.blocks):
        keys = f"model.layers.{layer}."
        (router,) = (tensors[key] for key in tensors if key.startswith(keys) and ROUTER in key)
        block.ffn.router.weight.data = router
        block.attention_norm.weight.data = tensors[keys + NORM]
    assert (found - bits_of(model)).abs().max() < 0.02 * (found - as_rounded).abs().max()


def test_other_wide_tensors_are_computed_as_wide(tmp_path):
    layers, _ = stored("mixtral", tmp_path, OUT)
    assert layers.dtype == torch.float32
    found = layers.bits(TOKENS, [layers.unchanged()])[0]
    assert torch.allclose(found, bits_of(read_model(tmp_path, dtype=torch.float32)), atol=1e-4)


@pytest.mark.parametrize("wide", [(), (ROUTER,)])
def test_fp32_of_gguf_alone_makes_nothing_wider(wide, tmp_path):
    """There norms and routers are always fp32: those whose numbers bf16 holds were not before."""
    stored("mixtral", tmp_path / "old", *wide)
    model = read_model(tmp_path / "old", dtype=torch.float32)
    write_gguf(model, tmp_path / "m.gguf", family="mixtral", kind="bf16")
    layers = Layers(find_checkpoint(tmp_path / "m.gguf"))
    layers.write(pruned(layers.cfg, dict.fromkeys(range(3), KEPT)), tmp_path / "new")
    after = load_file(tmp_path / "new" / "model.safetensors")
    before = load_file(tmp_path / "old" / "model.safetensors")
    for key, tensor in after.items():
        if key.endswith(ROUTER):
            assert torch.equal(tensor, before[key][KEPT]), key
        assert tensor.dtype == (torch.float32 if key.endswith(wide) else torch.bfloat16), key
