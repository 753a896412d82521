"""Layers whose selection bias, or B of a low-rank pair, is still zero: defects show as ever."""

import copy

import pytest
import torch

from moestro import MoE, MoEConfig
from moestro.check import check
from moestro.check.filling import filled
from moestro.check.packed import of_packed
from moestro.check.targets import of_anything
from moestro.check.trial import Trial
from moestro.checkpoints.quantize import WEIGHTS
from moestro.config import ModelConfig
from moestro.kernels import native_cpu
from moestro.models.decoder import Decoder
from moestro.moe.lora import Adapter
from moestro.moe.routers import TopKRouter

from .defects import CATALOGUE
from .plain_layer import SHAPES, factory

SOME = ["outputs", "weights", "choice", "router-gradient"]


class Fresh:
    """As training starts."""

    def make_bias(self):
        super().make_bias()
        if self.shape.bias:
            self.bias.zero_()

    def add_adapters(self, up, down):
        super().add_adapters(up, down)
        for each in (self.up_b, self.down_b):
            torch.nn.init.zeros_(each)


ROWS = [row for row in CATALOGUE if row.shapes in (("deepseek",), ("tuned",))]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.change.__name__)
def test_a_defect_is_named_in_a_layer_that_is_not_trained_yet(row):
    report = check(factory(SHAPES[row.shapes[0]], Fresh, row.change), only={*row.checks, *SOME})
    assert set(report.wrong) & set(row.checks), report.text()


@pytest.mark.parametrize("name", ["deepseek", "tuned"])
def test_a_clean_layer_that_is_not_trained_yet_is_not_accused(name):
    report = check(factory(SHAPES[name], Fresh))
    assert report.exit_code == 0, report.text()


def test_what_is_given_keeps_its_zeros_and_what_is_trained_its_values():
    layer, about = factory(SHAPES["deepseek"], Fresh)()
    before = copy.deepcopy(layer.state_dict())
    check((layer, about), only=SOME)
    assert all(torch.equal(before[name], each) for name, each in layer.state_dict().items())
    (subject,) = of_anything((layer, about))
    assert set(filled(subject).filled) == {"bias"}
    layer.bias[0] = 1e-3
    assert filled(subject) is subject


def test_a_bias_has_the_spread_of_the_scores_whatever_that_is():
    """So tokens differ in their experts, and the bias changes some of them."""
    for scale in (0.05, 1.0, 3.0):
        layer, about = factory(SHAPES["deepseek"], Fresh)()
        layer.router.data *= scale
        (subject,) = of_anything((layer, about))
        trial, zero = Trial(subject), subject.copied(torch.float64)
        x_TD = trial.normal(200, subject.dim)
        own = trial.choice(trial.subject.copied(torch.float64), x_TD).experts_TK.sort(1).values
        plain = subject.choose(zero, x_TD).experts_TK.sort(1).values
        assert 0.3 < (own != plain).any(1).double().mean() < 1
        assert len(own.unique(dim=0)) >= 4


def fresh(**router):
    torch.manual_seed(0)
    router = {"kind": "sigmoid", "selection_bias": True, **router}
    return MoE(MoEConfig(dim=16, hidden_dim=8, num_experts=8, top_k=2, router=router))


def ignores_the_bias(self, scores_TE):
    return scores_TE.topk(self.cfg.top_k, dim=-1).indices


def settings():
    moe = {"hidden_dim": 16, "num_experts": 4, "top_k": 2,
           "router": {"kind": "sigmoid", "selection_bias": True}}  # fmt: skip
    return ModelConfig(
        vocab_size=64, dim=32, num_layers=1, attention={"num_heads": 2, "context": 32}, moe=moe
    )


@pytest.mark.parametrize("target", ["layer", "model", "settings"])
def test_a_router_of_our_own_that_ignores_its_bias_is_named(target, tmp_path, monkeypatch):
    if target == "settings":
        pytest.importorskip("transformers")
        file = tmp_path / "config.json"
        file.write_text(settings().model_dump_json())
        made = str(file)
    else:
        made = fresh() if target == "layer" else Decoder(settings())
    assert check(made, only=SOME).ok
    monkeypatch.setattr(TopKRouter, "_select", ignores_the_bias)
    assert "choice" in check(made, only=SOME).wrong


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_fresh_layers_of_our_own_are_not_accused(kind):
    layer = fresh(kind=kind, bias=True)
    report = check(layer)
    assert report.exit_code == 0, report.text()
    for name, rows, inputs in (("gate_up", 16, 16), ("down", 16, 8)):
        setattr(layer.experts, f"{name}_adapter", Adapter(8, (rows,), inputs, rank=2, scale=1.5))
    report = check(layer)
    assert report.exit_code == 0, report.text()


@pytest.mark.skipif(native_cpu.available() is not None, reason=str(native_cpu.available()))
def test_zeros_of_packed_experts_stay_and_those_of_their_router_do_not(monkeypatch):
    router = {"kind": "sigmoid", "selection_bias": True}
    settings = MoEConfig(
        dim=32, hidden_dim=24, num_experts=4, top_k=2, experts={"bias": True}, router=router
    )
    torch.manual_seed(0)
    layer = MoE(settings).eval()
    layer.experts = layer.experts.to_packed(WEIGHTS["int8"])
    assert set(filled(of_packed(layer)).filled) == {"router.bias"}
    report = check(layer)
    assert report.exit_code == 0, report.text()
    monkeypatch.setattr(TopKRouter, "_select", ignores_the_bias)
    assert "outputs" in check(layer).wrong


def test_a_fresh_model_of_transformers_with_the_bias_in_its_weights_is_named(monkeypatch):
    pytest.importorskip("transformers")
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

    from ..probe import foreign_zoo as zoo

    model = zoo.build("DeepseekV3ForCausalLM")
    biases = [each for name, each in model.named_buffers() if name.endswith("correction_bias")]
    biases += [each for name, each in model.named_parameters() if name.endswith("correction_bias")]
    assert biases
    for each in biases:
        each.data.zero_()
    some = ["outputs", "router-gradient"]
    assert check(model, only=some).ok
    plain = modeling.DeepseekV3TopkRouter.forward

    def forward(self, hidden_states):
        logits, weights, experts = plain(self, hidden_states)
        return logits, weights + self.e_score_correction_bias[experts], experts

    monkeypatch.setattr(modeling.DeepseekV3TopkRouter, "forward", forward)
    assert "outputs" in check(model, only=some).wrong
    assert not any(each.any() for each in biases)


def test_a_fresh_model_s_loss_that_leaves_the_bias_out_is_named():
    """Its aux_loss counts the K largest probabilities; the model adds a bias to choose."""
    transformers = pytest.importorskip("transformers")
    settings = transformers.Ernie4_5_MoeConfig(
        hidden_size=16, moe_num_experts=4, moe_k=2, num_hidden_layers=2, vocab_size=50,
        num_attention_heads=2, num_key_value_heads=1, intermediate_size=8, head_dim=8,
        moe_intermediate_size=8, moe_layer_start_index=0, moe_num_shared_experts=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Ernie4_5_MoeForCausalLM(settings)
    for name, each in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("correction_bias"):
            each.data.zero_()
    report = check(model, only=["model-balance"])
    assert "counts the K largest logits, and the model used other experts" in report.text()
