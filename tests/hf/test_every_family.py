"""Every mixture of transformers: what computes it on the plug, and the families with own gates."""

from pathlib import Path

import pytest
import torch

import moestro.hf as hf
from moestro.errors import BackendError
from moestro.foreign import layouts
from moestro.foreign.taps import tapped, taps
from moestro.kernels import native_cpu

from ..probe import foreign_zoo

transformers = pytest.importorskip("transformers")

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"
# Families that the native kernels have no form for: the model_type, and what they lack.
OWN_GATE, OWN_NORM = "an activation or gate of their own", "a norm after each expert"
TORCH = {"beam": OWN_GATE, "inkling2": OWN_GATE, "inkling2_loop": OWN_GATE, "muse_spark": OWN_NORM}
# Those whose gate or activation the native kernels know by name.
NAMED = {
    "DeepseekV4ForCausalLM": "limited_swiglu",
    "Gemma4ForCausalLM": "geglu_tanh",
    "Glm5NextTextModel": "limited_swiglu",
    "HYV4ForCausalLM": "limited_swiglu",
    "HYV4VLTextModel": "limited_swiglu",
    "NemotronHForCausalLM": "relu2",
}


@pytest.fixture(autouse=True)
def _installed():
    hf.install()


def test_what_runs_each_family():
    """All are reached, and all but those that the page names run natively."""
    lacking, count = {}, 0
    for name in foreign_zoo.FAMILIES:
        with torch.device("meta"):
            model = foreign_zoo.build(name)
        for experts in layouts.find(model).values():
            count += 1
            odd = layouts.read(experts).odd()
            if odd is not None:
                kind = type(experts).__module__.split(".")[-2]
                lacking[kind] = odd
    assert count >= len(foreign_zoo.FAMILIES) > 60
    assert lacking == TORCH
    rows = [row for row in PAGE.read_text(encoding="utf-8").splitlines() if "| torch" in row]
    assert set(TORCH) == {kind for kind in TORCH if any(f"`{kind}`" in row for row in rows)}


def doge():
    return foreign_zoo.build("DogeForCausalLM")


def vitpose():
    config = transformers.VitPoseBackboneConfig(num_experts=2, num_hidden_layers=1)
    return transformers.VitPoseBackbone(config)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (doge, "DogeCDMoE cannot run on moestro: each expert is two vectors"),
        (vitpose, "VitPoseNaiveMoe cannot run on moestro: its experts are single linear maps"),
    ],
)
def test_what_is_no_mixture_of_networks_is_refused(make, words):
    with torch.device("meta"):
        model = make()
    with pytest.raises(BackendError, match=words):
        model.set_experts_implementation("moestro")


def texts(*shape):
    return torch.randint(3, foreign_zoo.VOCABULARY, shape)


@torch.no_grad()
def observed(model, ids):
    """The output, and every choice of experts with its weights."""
    seen = []
    with tapped(taps(model), lambda _, choice: seen.append(choice)):
        output = model(ids, use_cache=False)[0]
    return output, seen


@pytest.mark.parametrize("name", NAMED)
def test_outputs_and_routing_of_named_gates(name):
    model, shapes = foreign_zoo.build(name), [(1, 1), (1, 7), (3, 21)]
    found = layouts.find(model)
    assert {layouts.read(each).activation for each in found.values()} == {NAMED[name]}
    inputs = [texts(*shape) for shape in shapes]
    theirs = [observed(model, ids) for ids in inputs]
    before = dict(model.named_parameters())
    model.set_experts_implementation("moestro")
    checked = hf.check(model, {"input_ids": inputs[1], "use_cache": False})
    assert checked.ran.keys() == found.keys()
    if native_cpu.available() is None:
        assert set(checked.ran.values()) == {f"native {native_cpu.path()}, float32"}
    for ids, (output, choices) in zip(inputs, theirs, strict=True):
        ours, again = observed(model, ids)
        torch.testing.assert_close(ours, output, rtol=1e-4, atol=1e-4)
        assert len(again) == len(choices) == len(found)
        for one, other in zip(again, choices, strict=True):
            assert torch.equal(one.experts_TK, other.experts_TK)
    model.set_experts_implementation("eager")
    assert all(before[key] is each for key, each in model.named_parameters())
    for ids, (output, _) in zip(inputs, theirs, strict=True):
        assert torch.equal(observed(model, ids)[0], output)


@pytest.mark.parametrize("name", NAMED)
def test_gradients_of_named_gates(name):
    model, ids = foreign_zoo.build(name).double(), texts(3, 7)

    def gradients():
        model.zero_grad()
        model(ids, use_cache=False)[0].square().mean().backward()
        return {key: each.grad for key, each in model.named_parameters() if each.grad is not None}

    theirs = gradients()
    model.set_experts_implementation("moestro")
    ours = gradients()
    assert ours.keys() == theirs.keys()
    assert sum(".experts." in key for key in ours) >= 2
    for key, grad in theirs.items():
        bound = 1e-6 * float(grad.abs().max()) + 1e-9  # norms and routers compute in fp32
        torch.testing.assert_close(ours[key], grad, rtol=1e-5, atol=bound, msg=key)
