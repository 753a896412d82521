"""Packed in place: outputs are those of the weights that the packed ones stand for."""

import copy
import warnings
import weakref

import pytest
import torch

import moestro.hf as hf
from moestro.errors import BackendError, MoestroError, ShapeError
from moestro.hf import forward
from moestro.hf.packed import PackedProjection
from moestro.kernels import native_cpu, native_packing
from moestro.kernels.packing import Format

from .test_experts import LAYOUTS
from .zoo import NAMES, build, experts_of, tokens

native = pytest.mark.skipif(
    native_cpu.available() is not None, reason="no native library on this machine"
)


def interleave(up_HX):
    half = len(up_HX) // 2
    return torch.stack([up_HX[:half], up_HX[half:]], dim=1).flatten(0, 1)


def unpack_into(module, original):
    """Write what the packed weights of `module` stand for into `original`."""
    packed = vars(module)[forward.PACKED]
    with torch.no_grad():
        for expert in range(packed.num_experts):
            up_HD, down_DF = native_cpu.unpack_expert(packed, expert)
            if not original.is_concatenated:
                up_HD = interleave(up_HD)
            if original.is_transposed:
                up_HD, down_DF = up_HD.t(), down_DF.t()
            original.gate_up_proj[expert].copy_(up_HD)
            original.down_proj[expert].copy_(down_DF)


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@native
@pytest.mark.parametrize("kind", ["int8", "int4", "bfloat16", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_the_unpacked_weights(name, kind):
    """Rows are rounded to 8 bits too (int8, int4): 2^-8 of a group's largest, a percent of it."""
    model, ids = build(name), tokens()
    unpacked = copy.deepcopy(model)
    done = hf.quantize(model, kind)
    assert done.experts == tuple(hf.check(model, ids).ran)
    assert done.linears == ()
    for module, original in zip(experts_of(model), experts_of(unpacked), strict=True):
        unpack_into(module, original)
    with torch.no_grad():
        ours, theirs = model(ids).logits, unpacked(ids).logits
    bound = {"int8": 0.02, "int4": 0.02, "bfloat16": 0.01, "float32": 1e-5}[kind]
    assert relative(ours, theirs) < bound


@native
@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.03), ("int4", 0.4)])
def test_outputs_are_close_to_the_model_before(kind, bound):
    model, ids = build("mixtral", hidden_size=96, intermediate_size=64).bfloat16(), tokens()
    with torch.no_grad():
        before = model(ids).logits
        hf.quantize(model, kind, linears=True)
        after = model(ids).logits
    assert after.dtype == torch.bfloat16
    assert 0 < relative(after, before) < bound


@native
def test_what_is_packed():
    model = build("qwen2_moe", layers=2, hidden_size=64, moe_intermediate_size=64).bfloat16()
    size = sum(each.numel() for module in experts_of(model) for each in module.parameters())
    done = hf.quantize(model, "int4", 64)
    assert done.experts == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    assert done.bytes_before == 2 * size
    assert done.format == Format("int4", 64)
    assert size * 4.25 / 8 <= done.bytes_after <= size * 4.25 / 8 + 2 * 6 * 4096
    assert model.get_experts_implementation() == {"": "moestro"}
    assert not any(each.requires_grad for each in model.parameters())
    assert not any(
        "experts" in name for name, _ in model.named_parameters() if "shared" not in name
    )


@native
def test_projections_are_packed_when_asked():
    model, ids = build("gpt_oss", layers=2), tokens()
    unpacked = copy.deepcopy(model)
    done = hf.quantize(model, "int8", linears=True)
    assert len(done.linears) == 2 * 4 + 1
    packed = [each for each in model.modules() if isinstance(each, PackedProjection)]
    assert len(packed) == 9
    assert model.lm_head.out_features == unpacked.lm_head.out_features
    for name in done.linears:
        ours, original = model.get_submodule(name), unpacked.get_submodule(name)
        x = torch.randn(2, 3, original.in_features)
        with torch.no_grad():
            original.weight.copy_(native_cpu.unpack_matrix(ours.weights))
            assert relative(ours(x), original(x)) < 0.02
    assert hf.check(model, ids).calls == 2


@native
def test_a_tied_head_leaves_the_embedding():
    model, ids = build("mixtral", tie_word_embeddings=True), tokens()
    before = model.model.embed_tokens.weight.clone()
    hf.quantize(model, "int8", linears=True)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert isinstance(model.lm_head, PackedProjection)
    hf.check(model, ids)


@native
def test_two_copies_never_exist(monkeypatch):
    """When a layer is packed, the weights of the layer before are gone."""
    model = build("mixtral", layers=3)
    weights = [weakref.ref(each.gate_up_proj) for each in experts_of(model)]
    alive = []

    def slab_bytes(*arguments, pack=native_packing.slab_bytes):
        alive.append(sum(each() is not None for each in weights))
        return pack(*arguments)

    monkeypatch.setattr(native_packing, "slab_bytes", slab_bytes)
    hf.quantize(model, "int8")
    assert alive[0] == 3
    assert alive[-1] == 1
    assert all(each() is None for each in weights)


@native
def test_generation_from_packed_weights():
    """With a cache, token by token, the same as without: results do not depend on the batch."""
    model, ids = build("qwen3_moe", layers=2), tokens(2, 5)
    hf.quantize(model, "int4", linears=True)
    model.generation_config.eos_token_id = None
    settings = {
        "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    cached = model.generate(ids, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))


@native
def test_sentinels_take_no_part():
    model = build("mixtral")
    hf.quantize(model, "int8")
    (experts,) = experts_of(model)
    x_TD, weights_TK = torch.randn(3, 48), torch.rand(3, 2)
    experts_TK = torch.tensor([[0, 1], [2, 6], [6, 6]])
    x_TD[2] = weights_TK[1, 1] = float("nan")
    y_TD = experts(x_TD, experts_TK, weights_TK)
    alone = experts(x_TD[1:2], experts_TK[1:2, :1], weights_TK[1:2, :1])
    assert torch.equal(y_TD[1:2], alone)
    assert torch.equal(y_TD[2], torch.zeros(48))


@native
def test_training_is_refused():
    model, ids = build("mixtral"), tokens()
    with pytest.raises(BackendError, match="training mode"):
        hf.quantize(model.train(), "int8")
    hf.quantize(model.eval(), "int8", linears=True)
    model(ids)  # gradients are on, but nothing asks for any
    model.model.embed_tokens.weight.requires_grad_(True)
    with pytest.raises(MoestroError, match="gradients"):
        model(ids)
    experts = experts_of(model)[0]
    x_TD = torch.randn(2, 48, requires_grad=True)
    places = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    with pytest.raises(BackendError, match="cannot be trained"):
        experts(x_TD, *places)
    experts.train()
    with pytest.raises(BackendError, match="cannot be trained"):
        experts(x_TD.detach(), *places)


@native
def test_a_packed_model_is_not_saved(tmp_path):
    model = build("mixtral")
    hf.quantize(model, "int8")
    with pytest.raises(BackendError, match="cannot save"):
        model.save_pretrained(tmp_path)
    with pytest.raises(BackendError, match="packed already"):
        hf.quantize(model, "int4")


@native
def test_what_is_refused_is_left_as_it_was():
    model = build("mixtral", layers=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ShapeError, match="int5"):
        hf.quantize(model, "int5")
    with pytest.raises(ShapeError, match="48"):
        hf.quantize(model, "int8", 48)
    experts_of(model)[1].act_fn = torch.nn.Tanh()
    with pytest.raises(BackendError, match="MixtralExperts have an activation"):
        hf.quantize(model, "int8")
    experts_of(model)[1].act_fn = torch.nn.SiLU()
    with pytest.raises(BackendError, match="float16"):
        hf.quantize(copy.deepcopy(model).half(), "int8")
    with pytest.raises(BackendError, match="meta"):
        hf.quantize(copy.deepcopy(model).to("meta"), "int8")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with torch.no_grad():
        experts_of(model)[1].down_proj[3, 0, 0] = float("nan")
    with pytest.raises(ShapeError, match=r"layers\.1\.mlp\.experts, expert 3: .*NaN"):
        hf.quantize(model, "int8")


def test_there_has_to_be_a_library(monkeypatch):
    monkeypatch.setattr(native_cpu, "available", lambda: "there is no library")
    with pytest.raises(BackendError, match="there is no library"):
        hf.quantize(build("mixtral"), "int8")


@native
@pytest.mark.parametrize("name", [name for name, _, kind, _ in LAYOUTS if kind is None])
def test_gates_of_their_own_are_refused(name):
    from .test_experts import make

    module = next(row[1] for row in LAYOUTS if row[0] == name)
    model = build("mixtral")
    model.model.layers[0].mlp.experts = make(name, module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BackendError, match=f"{name} have an activation"):
            hf.quantize(model, "int8")
