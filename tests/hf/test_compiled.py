"""Under a compiler or exported, in one graph: outputs and gradients are those without."""

import copy
import shutil
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

import moestro.hf as hf
from moestro.errors import BackendError
from moestro.foreign import layouts
from moestro.hf import compute
from moestro.kernels import native_cpu

from .test_experts import LAYOUTS, E, close, draw, gradients, make, make_layout, run
from .zoo import build, tokens

NATIVE = native_cpu.available() is None
# With a gate that no kernel takes between the two products: left to the compiler.
SPLIT = [name for name, _, activation, _ in LAYOUTS if activation is None]
SPLIT += ["GptOssExperts", "MuseSparkExperts"]


@pytest.fixture(autouse=True)
def _fresh():
    hf.install()
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*moestro's torch kernels")
        yield


def compiled(module, backend="aot_eager"):
    return torch.compile(module, fullgraph=True, backend=backend)


def draw_with_other_ranks():
    """Poison where nobody may read."""
    x_TD, experts_TK, weights_TK = draw()
    experts_TK[0, 1] = E
    experts_TK[4] = E
    weights_TK[experts_TK == E] = x_TD[4] = float("nan")
    return x_TD, experts_TK, weights_TK


# Read as another one is: compiled once.
TWINS = ("Glm5NextTextExperts", "HYV4VLExperts", "DiffusionGemmaTextExperts")


@pytest.mark.parametrize(
    "row", [row[:3] for row in LAYOUTS if row[0] not in TWINS], ids=lambda row: row[0]
)
def test_every_layout(row):
    """Whole mixtures to the bit; a gate left to the compiler up to the order of its sums."""
    name, experts, inputs = row[0], make_layout(*row), draw_with_other_ranks()
    experts.config._experts_implementation = "moestro"
    fast = compiled(experts)
    with torch.no_grad():
        pairs = [(fast(*inputs), experts(*inputs))]
    assert not pairs[0][0][4].any()
    theirs = gradients(experts, "moestro", *inputs)
    pairs += zip(gradients(fast, "moestro", *inputs), theirs, strict=True)
    for ours, expected in pairs:
        if name not in SPLIT:
            assert torch.equal(ours, expected)
        close(ours, expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("name", "module"), [("MixtralExperts", "mixtral"),
                                              ("GptOssExperts", "gpt_oss")])  # fmt: skip
def test_dtypes_and_autocast(name, module, dtype):
    experts, (x_TD, *routing) = make(name, module), draw()
    experts.config._experts_implementation = "moestro"
    fast, autocast = compiled(experts), torch.autocast("cpu", dtype=torch.bfloat16)
    with torch.no_grad(), autocast:
        assert torch.equal(fast(x_TD, *routing), experts(x_TD, *routing))
    experts.to(dtype)
    with torch.no_grad():
        close(fast(x_TD.to(dtype), *routing), experts(x_TD.to(dtype), *routing), 1e-12)


def test_gradients_of_gradients_are_refused():
    experts, (x_TD, *routing) = make(), draw()
    experts.config._experts_implementation = "moestro"
    y_TD = compiled(experts, "eager")(x_TD.requires_grad_(), *routing)
    (grad,) = torch.autograd.grad(y_TD.square().sum(), x_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        grad.sum().backward()


def test_frozen_weights_and_inputs():
    """Only what asks for a gradient gets one."""
    experts, (x_TD, *routing) = make(), draw()
    experts.config._experts_implementation = "moestro"
    experts.down_proj.requires_grad_(False)
    fast, found = compiled(experts), []
    for each in (experts, fast):
        each(x_TD, *routing).square().sum().backward()
        found.append(experts.gate_up_proj.grad)
        experts.gate_up_proj.grad = None
    assert torch.equal(*found)
    assert experts.down_proj.grad is None


def test_one_graph_serves_every_layer_and_any_number_of_tokens():
    model, counter = build("mixtral", layers=10), CompileCounter()
    model.set_experts_implementation("moestro")
    ids = [tokens(2, length) for length in (9, 5, 7, 3)]
    with torch.no_grad():
        theirs = [model(each, use_cache=False).logits for each in ids]
        for layer in model.model.layers:
            layer.compile(fullgraph=True, backend=counter)
        for each, expected in zip(ids, theirs, strict=True):
            assert torch.equal(model(each, use_cache=False).logits, expected)
    assert counter.frame_count <= 2  # the sizes of the first call, then any


def test_check_looks_into_a_compiled_model():
    model, ids = build("mixtral", layers=2), tokens()
    model.set_experts_implementation("moestro")
    model.forward = compiled(model.forward)
    with torch.no_grad():
        model(ids, use_cache=False)
    assert hf.check(model, {"input_ids": ids, "use_cache": False}).calls == 2


@pytest.mark.skipif(not NATIVE, reason="no native library on this machine")
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_packed(name):
    model, ids = build(name), tokens()
    hf.quantize(model, "int8", linears=True)
    with torch.no_grad():
        theirs = model(ids, use_cache=False).logits
        ours = compiled(model.forward)(ids, use_cache=False).logits
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("grad", [False, True])
def test_exported(name, grad):
    model, ids = build(name), tokens()
    model.set_experts_implementation("moestro")
    with torch.set_grad_enabled(grad):
        exported = torch.export.export(model, (ids,), {"use_cache": False})
        ours = exported.module()(ids, use_cache=False).logits
        theirs = model(ids, use_cache=False).logits
    close(ours.detach(), theirs.detach(), 1e-6)
    assert "moestro" in str(exported.graph)


def test_tensors_without_numbers():
    """Shapes can be asked for where there is nothing to compute with."""
    experts, inputs = make(), draw()
    on_meta = copy.deepcopy(experts).to("meta")
    assert run(on_meta, "moestro", *(each.to("meta") for each in inputs)).shape == inputs[0].shape
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(each) for each in inputs]
        assert run(experts, "moestro", *fake).shape == inputs[0].shape
    with torch.no_grad():
        close(run(experts, "moestro", *inputs), run(experts, "eager", *inputs))


def test_a_default_device_leaves_nothing_behind():
    """What is kept for the next call lies where it computes, not where the first call was made."""
    experts, inputs = make(), [each[:7] for each in draw()]
    compute._tokens.cache_clear()
    with torch.no_grad():
        with torch.device("meta"):
            inside = run(experts, "moestro", *inputs)
        outside = run(experts, "moestro", *inputs)
        close(outside, run(experts, "eager", *inputs))
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_transforms_of_functions_are_refused(transform):
    experts, (x_TD, *routing) = make(), draw()
    experts.config._experts_implementation = "moestro"
    wrapped = {
        "grad": lambda: torch.func.grad(lambda x: experts(x, *routing).sum())(x_TD),
        "vmap": lambda: torch.vmap(lambda x: experts(x, *routing))(x_TD[None]),
    }[transform]
    with pytest.raises(BackendError, match=r'torch\.func.*"eager"'):
        wrapped()


def test_sharded_weights_are_refused(monkeypatch):
    class Sharded(torch.Tensor):
        placements = ("shard",)

    experts, inputs = make(), draw()
    read = layouts.read
    monkeypatch.setattr(
        layouts, "read", lambda module: read(module)._replace(
            up_EHD=module.gate_up_proj.detach().as_subclass(Sharded)
        ),
    )  # fmt: skip
    with pytest.raises(BackendError, match=r"DTensor.*FSDP2"), torch.no_grad():
        run(experts, "moestro", *inputs)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in its own files
@pytest.mark.parametrize(("name", "module"), [("MixtralExperts", "mixtral"),
                                              ("GptOssExperts", "gpt_oss")])  # fmt: skip
def test_generated_code(name, module):
    experts, inputs = make(name, module), draw()
    theirs = gradients(experts, "moestro", *inputs)
    ours = gradients(compiled(experts, "inductor"), "moestro", *inputs)
    for grad, expected in zip(ours, theirs, strict=True):
        close(grad, expected)
