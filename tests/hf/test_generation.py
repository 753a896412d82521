"""What people do with a model of transformers, with the plug and without: the same comes out.

One family for each layout of experts: as the kernels want them, behind a sigmoid router with groups
and shared experts, transposed and interleaved with biases, and with scaled residuals.
"""

import copy
import warnings

import pytest
import torch

import moestro.hf as hf

from .zoo import build, tokens

transformers = pytest.importorskip("transformers")

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe")
NEW = 8
STATIC = {"cache_implementation": "static"}
KINDS = ("eager", "moestro")


@pytest.fixture(autouse=True)
def _quietly():
    hf.install()
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*moestro's torch kernels")
        yield


@pytest.fixture(params=FAMILIES)
def model(request):
    made = build(request.param, layers=2)
    made.generation_config.eos_token_id = None
    return made


def generate(model, ids, **settings):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True, **{"do_sample": False, **settings},
    )  # fmt: skip


def with_and_without(model, act):
    """What `act(model)` gives by transformers' own experts, and by ours."""
    theirs = act(model)
    model.set_experts_implementation("moestro")
    return act(model), theirs


def same(ours, theirs):
    assert ours.sequences.shape[1] > NEW
    assert torch.equal(ours.sequences, theirs.sequences)
    for ours_BV, theirs_BV in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(ours_BV, theirs_BV, rtol=1e-4, atol=1e-4)


def quantised_cache():
    """Settings for one, where a library of those that transformers knows is installed."""
    pytest.importorskip("optimum.quanto")
    return {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}}


@pytest.mark.parametrize("cache", ["dynamic", "static", "quantized", "none"])
def test_greedy(model, cache):
    settings = {
        "dynamic": dict,
        "static": lambda: STATIC,
        "quantized": quantised_cache,
        "none": lambda: {"use_cache": False},
    }[cache]()
    ids = tokens(2, 5)
    same(*with_and_without(model, lambda model: generate(model, ids, **settings)))


@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
def test_beams(model, cache):
    ids = tokens(2, 5)
    same(*with_and_without(model, lambda model: generate(model, ids, num_beams=3, **cache)))


def test_sampling_with_a_seed(model):
    ids = tokens(2, 5)

    def sample(model):
        torch.manual_seed(1)
        return generate(model, ids, do_sample=True, temperature=0.8, top_k=20, top_p=0.9)

    ours, theirs = with_and_without(model, sample)
    same(ours, theirs)
    assert not torch.equal(ours.sequences, generate(model, ids).sequences)


def test_assisted_by_a_smaller_model(model):
    """Several tokens are judged at once, and the rejected ones taken back."""
    assistant = build("mixtral", layers=1)
    assistant.generation_config.eos_token_id = None
    ids = tokens(1, 5)
    alone = generate(model, ids).sequences
    assistant.set_experts_implementation("moestro")
    ours, theirs = with_and_without(
        model, lambda model: generate(model, ids, assistant_model=assistant)
    )
    same(ours, theirs)
    assert torch.equal(ours.sequences, alone)


def test_compiled(model):
    """Each new token by one compiled graph, whose static cache is written in place."""
    ids = tokens(2, 5)
    settings = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    settings._compile_all_devices = True
    theirs = generate(model, ids, **STATIC)
    model.set_experts_implementation("moestro")
    same(generate(model, ids, **STATIC, compile_config=settings), theirs)
    assert model._compiled_call is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(model, reentrant):
    """The same bits, except that a reentrant one first runs without gradients: natively."""
    ids = tokens()
    model.train().set_experts_implementation("moestro")

    def gradients():
        model.zero_grad()
        model(ids, use_cache=False).logits.square().mean().backward()
        return {key: each.grad for key, each in model.named_parameters() if each.grad is not None}

    plain = gradients()
    # Renamed in transformers 5.24.
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    # Reentrant checkpoints pass gradients on only where their inputs ask for one.
    model.enable_input_require_grads()
    again = gradients()
    assert again.keys() == plain.keys()
    assert sum("experts" in key for key in plain) >= 4
    for key, grad in plain.items():
        bound = 1e-5 * float(grad.abs().max()) if reentrant else 0
        torch.testing.assert_close(again[key], grad, rtol=0, atol=bound)


def test_saved_and_loaded(model, tmp_path):
    """By either implementation: what is written are the weights, to the bit."""
    ids, before = tokens(), copy.deepcopy(model.state_dict())
    for kind in KINDS:
        model.set_experts_implementation(kind)
        model.save_pretrained(tmp_path / kind)
    for kind in KINDS:
        model.set_experts_implementation(kind)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "moestro", experts_implementation=kind, attn_implementation="eager"
        )
        assert loaded.state_dict().keys() == before.keys()
        assert all(torch.equal(each, before[key]) for key, each in loaded.state_dict().items())
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, model(ids).logits)
        if kind == "moestro":
            assert hf.check(loaded, ids).calls == 2
    theirs, ours = ((tmp_path / kind / "model.safetensors").read_bytes() for kind in KINDS)
    assert ours == theirs
