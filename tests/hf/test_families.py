"""Every family: logits, generated tokens and gradients are transformers' own."""

import contextlib

import pytest
import torch

import moestro.hf as hf
from moestro.hf import forward
from moestro.kernels import native_cpu

from .zoo import NAMES, build, experts_of, tokens


@pytest.fixture(autouse=True)
def _installed():
    hf.install()


def expected_warning(name):
    """Where the native kernels cannot run, the plug says so."""
    if native_cpu.available() is None:
        return contextlib.nullcontext()
    return pytest.warns(UserWarning, match="torch kernels")


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", NAMES)
def test_logits_in_fp32(name):
    model, ids = build(name, layers=2), tokens()
    theirs = logits(model, ids)
    model.set_experts_implementation("moestro")
    with expected_warning(name):
        checked = hf.check(model, ids)
    assert len(checked.ran) == checked.calls == len(experts_of(model)) == 2
    torch.testing.assert_close(logits(model, ids), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_logits_in_bf16(name):
    model, ids = build(name).bfloat16(), tokens()
    theirs = logits(model, ids).float()
    model.set_experts_implementation("moestro")
    with expected_warning(name):
        ours = logits(model, ids).float()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2**-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_generated_tokens(name):
    model, ids = build(name, layers=2), tokens(batch=2, length=5)
    model.generation_config.eos_token_id = None
    settings = {
        "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    theirs = model.generate(ids, **settings)
    model.set_experts_implementation("moestro")
    with expected_warning(name), forward.watching() as calls:
        ours = model.generate(ids, **settings)
    assert theirs.shape == (2, 17)
    assert torch.equal(ours, theirs)
    assert [len(lines) for lines in calls.values()] == [12, 12]


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    model, ids = build(name, layers=2).train(), tokens()
    # What is drawn at random in training would differ.
    if name == "phimoe":
        model.eval()

    def gradients():
        model.zero_grad()
        model(ids).logits.square().mean().backward()
        return {key: each.grad.clone() for key, each in model.named_parameters()
                if each.grad is not None}  # fmt: skip

    theirs = gradients()
    model.set_experts_implementation("moestro")
    with forward.watching() as calls:
        ours = gradients()
    assert {line for lines in calls.values() for line in lines} == {
        "torch kernels: gradients are wanted"
    }
    assert ours.keys() == theirs.keys()
    assert sum("experts" in key for key in ours) >= 4
    for key, grad in theirs.items():
        bound = 1e-5 * float(grad.abs().max()) + 1e-9
        torch.testing.assert_close(ours[key], grad, rtol=1e-4, atol=bound, msg=key)
