"""Switch Transformers, whose experts are modules of their own: the same numbers, and one memory."""

import copy
import warnings

import pytest
import torch
from torch import nn

import moestro.hf as hf
from moestro.errors import BackendError
from moestro.hf import forward
from moestro.kernels import native_cpu

from ..checkpoints.families.tiny import build_switch

transformers = pytest.importorskip("transformers")

NATIVE = native_cpu.available() is None
SHAPES = [(1, 1, 1), (3, 7, 5), (2, 21, 1)]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch kernels")
        yield


def build(**changes):
    """Room for two tokens of a sequence in each expert: many are dropped."""
    hf.install()
    return build_switch(
        **{"expert_capacity": 2, "dropout_rate": 0.0, "router_jitter_noise": 0.0, **changes}
    ).eval()


def exact(model):
    """In float64, the routers too, which settings do not allow."""
    for each in model.modules():
        if type(each).__name__.endswith("Top1Router"):
            each.dtype = torch.float64
    return model.double()


def texts(batch=3, length=7, decoded=5):
    return {
        "input_ids": torch.randint(3, 61, (batch, length)),
        "decoder_input_ids": torch.randint(3, 61, (batch, decoded)),
    }


def experts_of(model):
    return [each for each in model.modules() if type(each).__name__ == "SwitchTransformersExperts"]


def one_hot(experts_T):
    """A choice as the experts are handed it."""
    return torch.nn.functional.one_hot(experts_T, 6)[:, None]


@torch.no_grad()
def output(model, inputs):
    return model(**inputs)[0]


def routed(model, inputs):
    """The output, and what every router decided."""
    decided = []
    routers = [each for each in model.modules() if type(each).__name__.endswith("Top1Router")]
    hooks = [each.register_forward_hook(lambda *of: decided.extend(of[2])) for each in routers]
    y = output(model, inputs)
    for hook in hooks:
        hook.remove()
    return y, decided


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_and_routing(dtype):
    """Of odd shapes, with tokens that are dropped; and by transformers again afterwards."""
    model = build() if dtype == torch.float32 else exact(build())
    inputs = [texts(*shape) for shape in SHAPES]
    theirs = [routed(model, each) for each in inputs]
    assert any((one_hot.sum(-1) == 0).any() for _, decided in theirs for one_hot in decided[::3])
    before = dict(model.named_parameters())
    values = {name: each.detach().clone() for name, each in before.items()}
    model.set_experts_implementation("moestro")
    checked = hf.check(model, inputs[0])
    assert checked.calls == len(checked.ran) == len(experts_of(model)) == 4
    native = NATIVE and dtype == torch.float32
    assert all(line.startswith("native") == native for line in checked.ran.values()), checked
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    for each, (y, decided) in zip(inputs, theirs, strict=True):
        ours, again = routed(model, each)
        torch.testing.assert_close(ours, y, rtol=tolerance, atol=tolerance)
        choices = list(zip(again[::3], decided[::3], strict=True))
        assert choices
        assert all(torch.equal(*pair) for pair in choices)
    model.set_experts_implementation("eager")
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is each and torch.equal(each, values[name])
               for name, each in before.items())  # fmt: skip
    with forward.watching() as calls:
        for each, (y, _) in zip(inputs, theirs, strict=True):
            assert torch.equal(output(model, each), y)
    assert not calls


def test_all_gradients():
    model, inputs = exact(build()).train(), texts()

    def gradients():
        model.zero_grad()
        model(**inputs)[0].square().mean().backward()
        return {key: each.grad for key, each in model.named_parameters() if each.grad is not None}

    theirs = gradients()
    model.set_experts_implementation("moestro")
    with forward.watching() as calls:
        ours = gradients()
    assert {line for lines in calls.values() for line in lines} == {
        "torch kernels: gradients are wanted"
    }
    # An expert without a token: transformers leaves no gradient, stacked weights one of zeros.
    assert theirs.keys() <= ours.keys()
    assert sum("router.classifier" in key for key in theirs) == 4
    assert sum(".experts." in key for key in theirs) > 16
    for key, grad in ours.items():
        expected = theirs.get(key, torch.zeros_like(grad))
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12, msg=key)


def test_experts_in_bf16():
    model = build().bfloat16()
    experts = experts_of(model)[0]
    inputs = (torch.randn(33, 40).bfloat16(), one_hot(torch.arange(33) % 6), torch.rand(33, 1))
    with torch.no_grad():
        theirs = experts(*inputs).float()
        model.set_experts_implementation("moestro")
        ours = experts(*inputs)
    assert ours.dtype == torch.bfloat16
    bound = 2**-6 * float(theirs.abs().max())
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=bound)


def test_nothing_is_moved_among_several_processes(monkeypatch):
    model, inputs = build(), texts()
    theirs = output(model, inputs)
    places = [each.data_ptr() for each in model.parameters()]
    model.set_experts_implementation("moestro")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    torch.testing.assert_close(output(model, inputs), theirs, rtol=1e-4, atol=1e-4)
    assert [each.data_ptr() for each in model.parameters()] == places


def test_generated_tokens():
    model, ids = build(), texts()["input_ids"]
    model.generation_config.eos_token_id = None
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    theirs = model.generate(ids, **settings)
    model.set_experts_implementation("moestro")
    assert torch.equal(model.generate(ids, **settings), theirs)


@pytest.mark.skipif(not NATIVE, reason="no native library on this machine")
def test_weights_are_moved_once_and_seen_as_they_change(monkeypatch):
    model, inputs, given, mixture = build(), texts(), [], native_cpu.mixture
    monkeypatch.setattr(
        native_cpu, "mixture", lambda packed, *rest: given.append(packed) or mixture(packed, *rest)
    )
    model.set_experts_implementation("moestro")
    before, first = output(model, inputs), experts_of(model)[0]
    places = [each.wi.weight.data_ptr() for each in first.values()]
    step = first.expert_0.wi.weight.nbytes
    assert places == list(range(places[0], places[0] + 6 * step, step))
    assert given[0].data.data_ptr() == places[0]
    with torch.no_grad():
        for each in first.values():
            each.wo.weight.zero_()
    assert not torch.equal(output(model, inputs), before)
    assert [each.wi.weight.data_ptr() for each in first.values()] == places
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, inputs), output(model, inputs))
    assert experts_of(twin)[0].expert_0.wi.weight.data_ptr() not in places


def test_it_trains_after_it_ran():
    """Also where it ran under inference_mode; the moved weights are the model's parameters."""
    model, inputs = build(), texts()
    model.set_experts_implementation("moestro")
    with torch.inference_mode():
        before = model(**inputs)[0].clone()
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs)[0].square().mean().backward()
    step.step()
    ours = output(model, inputs)
    assert not torch.equal(ours, before)
    model.set_experts_implementation("eager")
    torch.testing.assert_close(ours, output(model, inputs), rtol=1e-4, atol=1e-4)


def test_saved_and_loaded_after_it_ran(tmp_path):
    model, inputs = build(), texts()
    model.set_experts_implementation("moestro")
    ours = output(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, experts_implementation="moestro")
    assert hf.check(loaded, inputs).calls == 4
    assert torch.equal(output(loaded, inputs), ours)


@pytest.mark.skipif(not NATIVE, reason="no native library on this machine")
def test_packed():
    model, inputs = build(), texts()
    theirs = output(model, inputs)
    packed = hf.quantize(model, "float32")
    assert len(packed.experts) == 4
    assert not [name for name, _ in model.named_parameters() if ".experts." in name]
    torch.testing.assert_close(output(model, inputs), theirs, rtol=1e-4, atol=1e-4)


def test_dropout_follows_the_activation():
    model = build(dropout_rate=0.5).train()
    model.set_experts_implementation("moestro")
    experts = experts_of(model)[0]
    inputs = (torch.randn(9, 40), one_hot(torch.arange(9) % 6), torch.ones(9, 1))
    kept = experts.eval()(*inputs)
    assert torch.equal(experts(*inputs), kept)
    dropped = experts.train()(*inputs)
    assert not torch.isclose(dropped, kept).all(-1).any()
    experts.expert_0.dropout.p = 1.0
    assert not experts(*inputs).any()


def test_compiled():
    model = build()
    model.set_experts_implementation("moestro")
    chosen = one_hot(torch.arange(9) % 5)
    chosen[4] = 0
    inputs = (torch.randn(9, 40), chosen, torch.rand(9, 1))
    experts = experts_of(model)[0]
    with torch.no_grad():
        compiled = torch.compile(experts.forward, backend="aot_eager", fullgraph=True)(*inputs)
        torch.testing.assert_close(compiled, experts(*inputs))
    assert not compiled[4].any()


def test_an_adapter_on_an_expert_is_not_passed_by():
    class Adapted(nn.Linear):
        """Adds to what it is around."""

    model = build()
    experts_of(model)[1].expert_3.wi = Adapted(40, 22, bias=False)
    model.set_experts_implementation("moestro")
    with pytest.raises(BackendError, match=r"expert_3\.wi .* is a Adapted, .* merge"):
        output(model, texts())


def test_weights_made_in_inference_mode_stay_where_they_are():
    with torch.inference_mode():
        model = build()
        given = texts()
        want = model(**given).logits
        model.set_experts_implementation("moestro")
        found = model(**given).logits
    torch.testing.assert_close(found, want)
