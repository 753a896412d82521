"""Balancers around what loops do to models: copies, wrappers, failed passes, compilation."""

import copy
import io
import pickle
import types
from contextlib import contextmanager, nullcontext

import pytest
import torch
import transformers
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


def saved(model):
    """What another process, or a later one, makes of a model."""
    return torch.load(io.BytesIO(dumped(model)), weights_only=False)


def dumped(model):
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_a_copy_routes_alike_and_is_not_balanced(copied, name):
    model, batch = training(name), tokens()
    balancer = hf.balance(model, switch=0.1, bias_rate=0.1)
    step(model, balancer, batch)
    model.router_aux_loss_coef = 0.5
    twin = copied(model)
    with torch.no_grad():
        assert torch.equal(twin(batch).logits, model(batch).logits)  # with a bias of its own
    with pytest.warns(UserWarning, match="copy of a model that moestro"):
        twin(batch)
    twin(batch)  # said once
    assert not balancer.waiting
    assert twin.router_aux_loss_coef == 0.5

    twin, before = copied(model), balancer.state_dict()
    other = hf.balance(twin, switch=0.1, bias_rate=0.1)
    torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0)
    health, gone = step(twin, other, batch), other.state_dict()
    assert all((gone[each] - before[each]).abs().max() > 0.09 for each in before)
    torch.testing.assert_close(balancer.state_dict(), before, rtol=0, atol=0)
    assert step(model, balancer, batch) == health
    torch.testing.assert_close(balancer.state_dict(), gone, rtol=0, atol=0)
    other.remove()
    balancer.remove()
    if name == "qwen3_moe":  # no bias stays behind
        assert not any(each._forward_hooks for each in (*twin.modules(), *model.modules()))


def test_a_model_is_copied_while_a_trainer_runs():
    model, batch = training(), tokens()
    callback = hf.balance(model, switch=0.1).callback()
    settings = types.SimpleNamespace(n_gpu=0, output_dir="")
    state = transformers.TrainerState()
    callback.on_train_begin(settings, state, transformers.TrainerControl(), model=model)
    twin = saved(model)
    with pytest.warns(UserWarning, match="copy"):
        own = twin(batch, labels=batch).loss
    assert own < model(batch, labels=batch).loss  # that has the balance loss in it


def test_a_balancer_is_not_copied():
    balancer = hf.balance(training(), switch=0.1, bias_rate=0.1)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(MoestroError, match=r"balance on the copy.*state_dict"):
            copied(balancer)


def test_a_bias_that_was_kept_is_copied_too():
    model, batch = training(), tokens()
    balancer = hf.balance(model, switch=0.1, bias_rate=0.1)
    step(model, balancer, batch)
    balancer.remove(keep_bias=True)
    twin = copy.deepcopy(model)
    kept = model(batch).logits
    balancer.remove()
    assert torch.equal(twin(batch).logits, kept)
    assert not torch.equal(model(batch).logits, kept)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize(
    "around", [lambda: default_dtype(torch.bfloat16), lambda: torch.device("meta")]
)
def test_what_surrounds_a_balancer_changes_nothing(name, around):
    batch, found = tokens(7, 13), []
    for place in (nullcontext, around):
        model = training(name)
        with place():
            balancer = hf.balance(model, switch=0.0, z=0.3, bias_rate=0.001)
        for _ in range(3):
            model(batch)
            with place():
                balancer.loss().backward()
                balancer.step()
        gradient, biases = model.model.layers[0].mlp.gate.weight.grad, balancer.state_dict()
        assert all(value.dtype == torch.float32 for value in biases.values())
        found.append((biases, balancer.parts, gradient, list(balancer.health().values())))
        with place():
            nothing = hf.balance(copy.deepcopy(model), switch=0.0)
        nothing.model(batch)
        with place():
            assert (nothing.loss() + gradient.sum()).dtype == torch.float32
    assert found[0][-1] == found[1][-1]
    torch.testing.assert_close(found[0][:-1], found[1][:-1], rtol=0, atol=0)


def test_a_pass_for_shapes_alone_leaves_no_trace():
    model = training(layers=1)
    balancer = hf.balance(model, switch=0.0, bias_rate=0.1)
    state = {name: torch.randn(value.shape) for name, value in balancer.state_dict().items()}
    balancer.load_state_dict(state)
    gate, weights = model.model.layers[0].mlp.gate, copy.deepcopy(model.state_dict())
    assert gate.to("meta")(torch.empty(7, 48, device="meta"))[2].shape == (7, 3)
    torch.testing.assert_close(balancer.state_dict(), state, rtol=0, atol=0)
    model.load_state_dict(weights, assign=True)
    model(tokens())


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
