"""Routers and experts inside of wrappers: found by what they do, whatever wraps them is called."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import moestro.hf as hf
from moestro.errors import BackendError, MoestroError
from moestro.kernels import native_cpu
from moestro.probe.recording.passages import Passage
from moestro.probe.recording.record import record

from .zoo import build, tokens

NAMES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "ernie4_5_moe")


class Delta(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.delta = nn.Parameter(torch.randn_like(weight) * 0.3)

    def forward(self, weight):
        return weight + self.delta


class Adapter(nn.Module):
    """Runs a module with something added to one of its weights, as LoRA on parameters does."""

    def __init__(self, base_layer, weight):
        super().__init__()
        self.base_layer, self.weight = base_layer, weight
        self.added = Delta(getattr(self.innermost(), weight))

    def innermost(self):
        inner = self.base_layer
        return inner.innermost() if isinstance(inner, Adapter) else inner

    def forward(self, x, *args, **kwargs):
        inner = self.innermost()
        parametrize.register_parametrization(inner, self.weight, self.added)
        try:
            with parametrize.cached():
                return self.base_layer(x, *args, **kwargs)
        finally:
            parametrize.remove_parametrizations(inner, self.weight, False)


class Either(nn.Module):
    """Holds a module and the copy of it that is trained, and shows the latter's attributes."""

    def __init__(self, module):
        super().__init__()
        self.original_module = module
        self.trained = nn.ModuleDict({"default": copy.deepcopy(module)})

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.trained["default"], name)

    def forward(self, x, *args, **kwargs):
        return self.trained["default"](x, *args, **kwargs)


def blocks(model):
    return [
        each for each in model.modules() if isinstance(getattr(each, "experts", None), nn.Module)
    ]


def wrapped(model, *parts, wrap=Either):
    """The model with the experts or routers of its mixtures in wrappers."""
    for block in blocks(model):
        router = "router" if hasattr(block, "router") else "gate"
        for name in (router if part == "router" else part for part in parts):
            setattr(block, name, wrap(getattr(block, name)))
    return model


def step(model, balancer, batch):
    (model(batch).logits.mean() + balancer.loss()).backward()
    balancer.step()
    return list(balancer.health().values()), balancer.parts, balancer.state_dict()


def twice(experts):
    """Two weights, a wrapper around a wrapper."""
    return Adapter(Adapter(experts, "gate_up_proj"), "down_proj")


@pytest.mark.parametrize("parts", [("experts",), ("router",), ("experts", "router")])
@pytest.mark.parametrize("name", NAMES)
def test_a_mixture_in_wrappers_is_balanced_as_it_is(name, parts):
    batch, found = tokens(), []
    for adapted in (False, True):
        model = build(name, 2).train()
        model = wrapped(model, *parts) if adapted else model
        balancer = hf.balance(model, switch=0.5, z=0.1, bias_rate=0.01)
        found.append(step(model, balancer, batch))
        assert list(found[-1][2]) == [f"model.layers.{n}.mlp.experts" for n in range(2)]
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1:], found[1][1:], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["deepseek_v3", "ernie4_5_moe"])
def test_the_bias_of_the_router_that_runs_moves(name):
    model = wrapped(build(name, 2).train(), "router")
    balancer = hf.balance(model, switch=0.5, bias_rate=0.01)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    step(model, balancer, tokens())
    moved = [
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    ]
    assert len(moved) == 2
    assert all("trained.default" in key for key in moved)


def test_classes_made_at_run_time_are_what_they_are_made_of():
    model, batch = build("qwen3_moe", 2).train(), tokens()
    plain = step(model, hf.balance(model, switch=0.5, bias_rate=0.01), batch)
    sharded = build("qwen3_moe", 2).train()
    for block in blocks(sharded):
        for part in (block.gate, block.experts):
            part.__class__ = type(f"FSDP{type(part).__name__}", (type(part),), {})
    assert step(sharded, hf.balance(sharded, switch=0.5, bias_rate=0.01), batch)[0] == plain[0]
    other = build("qwen3_moe", 1).train()
    gate = blocks(other)[0].gate
    gate.__class__ = type("Own", (type(gate),), {"forward": lambda self, x: (x, x, x)})
    with pytest.raises(MoestroError, match=r"mlp\.experts \(Own\) chooses is not known"):
        hf.balance(other, switch=0.5)


def test_wrapped_mixtures_are_recorded_as_they_are():
    model, text = build("qwen3_moe", 2), [Passage(tokens(1)[0])]
    plain = record(model, text)
    again = record(wrapped(model, "experts", "router"), text)
    assert (plain.experts_TLK == again.experts_TLK).all()
    assert (plain.weights_TLK == again.weights_TLK).all()


def test_of_two_experts_in_a_wrapper_one_runs():
    hf.install()
    model = build("qwen3_moe", 2)
    model.set_experts_implementation("moestro")
    assert hf.check(wrapped(model, "experts"), tokens()).calls == 2
    blocks(model)[1].experts.forward = lambda x, *args: x
    with pytest.raises(BackendError, match=r"layers\.1\.mlp\.experts\..*was not reached"):
        hf.check(model, tokens())


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_the_plug_computes_what_adapters_make_of_the_weights(name):
    hf.install()
    model, ids = build(name, 2), tokens()
    with torch.no_grad():
        before = model(ids).logits
        model = wrapped(model, "experts", wrap=twice)
        eager = model(ids).logits
        model.set_experts_implementation("moestro")
        assert len(hf.check(model, ids).ran) == 2
        torch.testing.assert_close(model(ids).logits, eager, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, eager, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(native_cpu.available() is not None, reason="no native library")
def test_experts_are_not_packed_under_an_adapter():
    model = wrapped(build("qwen3_moe"), "experts", wrap=twice)
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(BackendError, match=r"inside of Adapter.*merge_and_unload"):
        hf.quantize(model, "int8")
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "targets",
    [
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        {"target_parameters": ["mlp.gate.weight"]},
        {"modules_to_save": ["gate"]},
        {"modules_to_save": ["experts"]},
    ],
)
def test_adapters_of_peft(targets):
    peft = pytest.importorskip("peft")
    hf.install()
    batch, config = tokens(), {"r": 2, "target_modules": ["q_proj"], **targets}
    plain = build("qwen3_moe", 2).train()
    wanted = step(plain, hf.balance(plain, switch=0.5, bias_rate=0.01), batch)
    base = build("qwen3_moe", 2)
    if "experts" in targets.get("modules_to_save", ()):  # their configuration is a copy too
        base.set_experts_implementation("moestro")
    model = peft.get_peft_model(base, peft.LoraConfig(**config)).train()
    balancer = hf.balance(model, switch=0.5, bias_rate=0.01)
    found = step(model, balancer, batch)
    for layer, same in zip(found[0], wanted[0], strict=True):
        assert layer == pytest.approx(same, rel=1e-5)
    for value, same in zip(found[2].values(), wanted[2].values(), strict=True):
        assert torch.equal(value, same)
    balancer.remove()
    model.set_experts_implementation("moestro")
    assert hf.check(model, batch).calls == 2
