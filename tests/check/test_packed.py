"""Packed experts, resident, trained through and streamed, beside what their numbers stand for."""

import pytest
import torch

from moestro import MoE, MoEConfig
from moestro.check import check
from moestro.check.packed import of_packed
from moestro.checkpoints import packed_files, streamed
from moestro.checkpoints.quantize import WEIGHTS, pack
from moestro.config import ModelConfig
from moestro.kernels import native_cpu
from moestro.models.decoder import Decoder

pytestmark = pytest.mark.skipif(
    native_cpu.available() is not None, reason=str(native_cpu.available())
)
SIZES = {
    "dim": 32, "hidden_dim": 24, "num_experts": 4, "top_k": 2, "experts": {"bias": True},
    "shared": {"hidden_dim": 16, "gate": True},
}  # fmt: skip


def packed(name="int8", seed=0):
    torch.manual_seed(seed)
    layer = MoE(MoEConfig(**SIZES)).eval()
    for each in (layer.experts.gate_up_bias, layer.experts.down_bias):
        torch.nn.init.normal_(each, 0, 0.5)
    for each in ("experts", "shared"):
        setattr(layer, each, getattr(layer, each).to_packed(WEIGHTS[name]))
    return layer


@pytest.mark.parametrize("name", ["int4", "int8-64", "fp32", "bf16"])
def test_packed_experts_are_not_accused(name):
    report = check(packed(name))
    assert report.exit_code == 0, report.text()
    done = {each.check: each.finding for each in report.found}
    assert done["outputs"].outcome == done["evaluation"].outcome == "ok"
    assert done["save-load"].outcome == "skipped"
    assert (done["outputs"].allowed < 1e-4) == (name == "fp32")


def test_gradients_through_packed_experts_are_not_accused():
    layer = packed()
    for each in (layer.experts, layer.shared):
        each.passes_gradients = True
    report = check(layer)
    assert report.exit_code == 0, report.text()
    done = {each.check: each.finding for each in report.found}
    assert done["router-gradient"].outcome == done["input-gradient"].outcome == "ok"
    assert done["outputs"].allowed < 1e-4  # nothing is rounded on the way


def test_experts_read_from_a_file_are_not_accused(tmp_path):
    torch.manual_seed(0)
    small = {key: SIZES[key] for key in ("hidden_dim", "num_experts", "top_k")}
    settings = ModelConfig(
        vocab_size=64, dim=32, num_layers=1, attention={"num_heads": 2, "context": 16}, moe=small
    )
    model = Decoder(settings).eval()
    pack(model, WEIGHTS["int4"])
    packed_files.save(model, tmp_path / "packed", WEIGHTS["int4"], {})
    (resident,) = model.mixtures()
    (layer,) = streamed.load(tmp_path / "packed", [2]).mixtures()
    report = check(of_packed(layer, resident=resident))
    assert report.exit_code == 0, report.text()


def test_defects_of_packed_experts_are_named():
    layer = packed()
    data = layer.experts.weights.data.view(SIZES["num_experts"], -1)
    subject = of_packed(layer)
    data.copy_(data.roll(1, 0).clone())  # experts of another place than the router's
    assert "outputs" in check(subject).wrong
    layer = packed()
    subject = of_packed(layer)
    layer.experts.weights.down_bias.zero_()
    assert "outputs" in check(subject).wrong
