"""Balancers around what loops do to models: copies, wrappers, failed passes, compilation."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

import moestro.hf as hf
from moestro.errors import MoestroError

from .zoo import build, tokens

# Three tokens of each sequence are padding.
MASK = torch.ones(2, 9, dtype=torch.long)
MASK[:, 6:] = 0


def training(name="qwen3_moe", layers=2, **changes):
    return build(name, layers, **changes).train()


class Wrapper(nn.Module):
    """Passes everything on, as PEFT does without a task."""

    def __init__(self, model):
        super().__init__()
        self.inside = model

    @property
    def config(self):
        return self.inside.config

    def forward(self, *args, **kwargs):
        return self.inside(*args, **kwargs)


def step(model, balancer, *inputs):
    (model(*inputs).logits.mean() + balancer.loss()).backward()
    balancer.step()
    return list(balancer.health().values())


@pytest.mark.parametrize("scope", ["micro", "sequence"])
def test_a_wrapper_need_not_name_its_arguments(scope):
    found, batch = [], tokens()
    for wrap in (lambda model: model, Wrapper):
        model = training()
        wrapped = wrap(model)
        balancer = hf.balance(wrapped, switch=1.0, scope=scope)
        found.append((step(wrapped, balancer, batch, MASK), balancer.parts["switch"]))
        balancer.remove()
    assert found[0] == found[1]


def test_a_balanced_model_is_not_copied():
    model = training()
    balancer = hf.balance(model, switch=0.1, bias_rate=0.1)
    with pytest.raises(MoestroError, match="copied while it is balanced"):
        copy.deepcopy(model)
    batch = tokens()
    step(model, balancer, batch)
    balancer.remove(keep_bias=True)
    twin = copy.deepcopy(model)
    kept = model(batch).logits
    balancer.remove()
    assert torch.equal(twin(batch).logits, kept)  # a copy has biases of its own
    assert not torch.equal(model(batch).logits, kept)


def test_a_part_that_is_balanced_is_noticed():
    model = training("deepseek_v3")
    hf.balance(model.model, switch=0.0, bias_rate=0.1)
    with pytest.raises(MoestroError, match="balanced already"):
        hf.balance(model, switch=0.0, bias_rate=0.1)


def test_a_forward_pass_that_fails_leaves_nothing_behind():
    model = training()
    balancer = hf.balance(model, switch=0.1)

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(tokens())
    hook.remove()
    model.model(tokens())  # past the hooks of the model: not one of its forward passes
    assert len(step(model, balancer, tokens())) == 2


def test_a_step_that_failed_is_done_over():
    batch, found = tokens(), []
    for fails in (False, True):
        model = training()
        balancer = hf.balance(model, switch=0.1, scope="global", bias_rate=0.1)
        if fails:
            model(tokens())
            balancer.loss()
            model(tokens())
            balancer.restart()
        found.append((step(model, balancer, batch), balancer.parts, balancer.state_dict()))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1:], found[1][1:], rtol=0, atol=0)


def test_a_model_that_is_checkpointed_as_a_whole_is_refused():
    model = training()
    balancer = hf.balance(model, switch=0.1)
    out = checkpoint(lambda batch: model(batch).logits.mean(), tokens(), use_reentrant=False)
    with pytest.raises(MoestroError, match="checkpoint its layers"):
        (out + balancer.loss()).backward()


def test_layers_that_are_alike_weigh_as_in_the_family():
    model, shown = training(layers=3), []
    first = model.model.layers[0].mlp.gate
    first.register_forward_hook(lambda m, a, out: shown.append(out))
    for layer in model.model.layers[1:]:  # they route as the first one does
        layer.mlp.gate.register_forward_hook(lambda m, a, out: shown[0])
    balancer = hf.balance(model, switch=hf.converted(0.25, top_k=3, layers=3))
    model(tokens())
    theirs = load_balancing_loss_func((shown[0][0],) * 3, num_experts=6, top_k=3)
    torch.testing.assert_close(balancer.loss(), 0.25 * theirs)


def test_a_coefficient_of_zero_is_no_loss_of_the_familys():
    model = training(router_aux_loss_coef=0.0)
    balancer = hf.balance(model, switch=0.1)
    assert model(tokens(), output_router_logits=True).aux_loss > 0
    balancer.remove()
    assert model.router_aux_loss_coef == 0


def test_a_family_without_a_loss_goes_on_to_show_its_logits():
    model = training("deepseek_v3")
    model.config.output_router_logits = True
    hf.balance(model, switch=0.1)
    assert model.config.output_router_logits


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_model_is_balanced_first_and_compiled_then():
    batch, found = tokens(), []
    for compiles in (False, True):
        model = training(layers=1)
        balancer = hf.balance(model, switch=0.5, bias_rate=0.1)
        called = torch.compile(model, backend="eager") if compiles else model
        health = step(called, balancer, batch)
        found.append((model.model.layers[0].mlp.gate.weight.grad, balancer.state_dict()))
        assert len(health) == 1
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    balancer.remove()
    torch.compiler.reset()
    called = torch.compile(model, backend="eager")
    called(batch)
    hf.balance(model, switch=0.5)
    with pytest.raises(MoestroError, match="compiled"):
        called(batch)
    torch.compiler.reset()
