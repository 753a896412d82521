"""Installing, refusing what would run other code, and counting what really ran."""

import re
import runpy
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import moestro.hf as hf
from moestro.errors import BackendError
from moestro.foreign import layouts
from moestro.kernels import native_cpu

from ..checkpoints.families.tiny import BODY
from .zoo import build, tokens

transformers = pytest.importorskip("transformers")


def quietly(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def test_install_says_what_it_did():
    done = hf.install()
    assert done.name == hf.NAME == "moestro"
    assert done.transformers == transformers.__version__
    if native_cpu.available() is None:
        assert (done.native, done.reason) == (native_cpu.path(), None)
    else:
        assert (done.native, done.reason) == (None, native_cpu.available())


def test_the_page_names_the_version_that_is_tested():
    root = Path(__file__).parents[2]
    pinned = re.search(r"^transformers==(\d+\.\d+)", (root / "constraints.txt").read_text(), re.M)
    assert f"Tested with transformers {pinned[1]}." in (root / "docs/transformers.md").read_text()


def test_install_twice_wraps_once():
    hf.install()
    before = transformers.PreTrainedModel.post_init
    hf.install()
    assert transformers.PreTrainedModel.post_init is before


def test_an_older_transformers_is_refused(monkeypatch):
    from transformers.integrations import moe

    monkeypatch.setattr(moe, "use_experts_implementation", lambda kind, is_transposed=False: kind)
    with pytest.raises(ImportError, match=r"pip install --upgrade"):
        runpy.run_path(hf.__file__)


def test_a_model_that_came_with_its_own_code(monkeypatch):
    """A plain list of networks beside a router, and a block by its name alone."""
    model = build("mixtral")
    hf.install()
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    with pytest.raises(BackendError, match="ModuleList"):
        model.set_experts_implementation("moestro")
    model = build("mixtral")
    model.model.layers[0].mlp = type("HomemadeMoE", (nn.Module,), {})()
    with pytest.raises(BackendError, match="HomemadeMoE"):
        model.set_experts_implementation("moestro")


def test_a_subclass_with_a_forward_of_its_own_is_refused():
    model = build("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.__class__ = type("OwnExperts", (type(experts),), {"forward": lambda self, *_: _[0]})
    with pytest.raises(BackendError, match="OwnExperts"):
        hf.check(model, tokens())


def test_shared_experts_are_no_reason_to_refuse():
    for name in ("qwen2_moe", "deepseek_v3"):
        assert len(layouts.find(build(name))) == 1
    model = build("mixtral")
    model.shared_experts = type("InklingSharedExperts", (nn.Module,), {})()
    assert len(layouts.find(model)) == 1


def test_fp8_experts_are_refused():
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import use_experts_implementation

    model = build("mixtral")
    hf.install()

    class FP8Experts(nn.Module):
        def __init__(self, config):
            super().__init__()

        def forward(self, *_):
            return None

    kind = use_experts_implementation(FP8Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    model.model.layers[0].mlp.experts = kind(model.config)
    for act in (lambda: model.set_experts_implementation("moestro"), lambda: hf.quantize(model)):
        with pytest.raises(BackendError, match=r"FP8Experts .* registry of its own"):
            act()


def test_a_model_without_experts():
    config = transformers.LlamaConfig(**{**BODY, "num_hidden_layers": 1, "head_dim": 8})
    model = quietly(lambda: transformers.LlamaForCausalLM(config))
    with pytest.raises(BackendError, match="no mixture"):
        hf.check(model, tokens())


def test_a_setting_that_transformers_drops(monkeypatch):
    """It passes over models whose source it cannot read, without a word."""
    hf.install()
    model = build("mixtral")
    monkeypatch.setattr(
        type(model), "_can_set_experts_implementation", classmethod(lambda _: False)
    )
    with pytest.raises(BackendError, match="did not pass the setting on"):
        model.set_experts_implementation("moestro")
    with pytest.raises(BackendError, match="'eager'"):
        hf.check(model, tokens())


def test_check_counts_every_layer():
    hf.install()
    model = build("qwen3_moe", layers=3)
    model.set_experts_implementation("moestro")
    checked = quietly(lambda: hf.check(model, {"input_ids": tokens()}))
    assert list(checked.ran) == [f"model.layers.{n}.mlp.experts" for n in range(3)]
    assert checked.calls == 3
    if native_cpu.available() is None:
        assert set(checked.ran.values()) == {f"native {native_cpu.path()}, float32"}


def test_check_sees_other_code():
    hf.install()
    model = build("mixtral", layers=2)
    with pytest.raises(BackendError, match="ran 1 times and 0 times by moestro"):
        hf.check(model, tokens())
    model.set_experts_implementation("moestro")
    experts = model.model.layers[1].mlp.experts
    experts.config = types.SimpleNamespace(_experts_implementation="eager")
    with pytest.raises(BackendError, match=r"layers\.1\.mlp\.experts"):
        quietly(lambda: hf.check(model, tokens()))


def test_check_sees_a_block_that_something_else_stands_in_for():
    """As kernels from the hub do."""
    hf.install()
    model = build("mixtral", layers=2)
    model.set_experts_implementation("moestro")
    model.model.layers[1].mlp.forward = lambda hidden: hidden
    with pytest.raises(BackendError, match="was not reached"):
        quietly(lambda: hf.check(model, tokens()))


def test_other_implementations_stay_as_they_were():
    hf.install()
    model, ids = build("mixtral"), tokens()
    with torch.no_grad():
        before = model(ids).logits
        model.set_experts_implementation("grouped_mm")
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    assert model.get_experts_implementation() == {"": "grouped_mm"}
    with pytest.raises(ValueError, match="no_such"):
        model.set_experts_implementation("no_such")


def test_it_is_offered_to_models_that_are_loaded(tmp_path):
    hf.install()
    model, ids = build("olmoe"), tokens()
    with torch.no_grad():
        theirs = model(ids).logits
    quietly(lambda: model.save_pretrained(tmp_path))
    loaded = quietly(
        lambda: transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, experts_implementation="moestro"
        )
    )
    quietly(lambda: hf.check(loaded, ids))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, theirs, rtol=1e-4, atol=1e-4)
