import itertools
import math

import pytest
import torch
from torch import nn

from moestro.config import EncDecConfig, ModelConfig, OptimConfig
from moestro.models.decoder import Decoder
from moestro.models.encdec import EncDec
from moestro.train.optim import (
    learning_rate,
    make_optimizer,
    set_learning_rate,
    split_parameters,
)


def rates(cfg: OptimConfig, steps: int) -> list[float]:
    return [learning_rate(step, steps, cfg) for step in range(steps)]


def test_cosine_rises_then_falls_to_the_final_share():
    values = rates(OptimConfig(lr=1.0, warmup=0.1, final_lr=0.1), 100)
    assert values[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert max(values) == pytest.approx(1.0)
    assert values[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (54 - 10) / 89))
    assert values[54] == pytest.approx(middle)


def test_wsd_stays_and_decays_in_a_line():
    values = rates(OptimConfig(lr=2.0, schedule="wsd", warmup=0.1, decay=0.2, final_lr=0.0), 100)
    assert values[9:80] == pytest.approx([2.0] * 71)
    assert values[-1] == pytest.approx(0.0)
    falls = [a - b for a, b in itertools.pairwise(values[79:])]
    assert falls == pytest.approx([0.1] * 20)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_have_a_usable_rate(schedule, steps):
    cfg = OptimConfig(lr=1.0, schedule=schedule, warmup=0.5)
    assert all(0 < rate <= 1.0 for rate in rates(cfg, steps))


def test_without_warmup_the_first_step_has_the_full_rate():
    assert learning_rate(0, 50, OptimConfig(lr=0.5, warmup=0.0)) == 0.5


def tiny() -> Decoder:
    moe = {"hidden_dim": 8, "num_experts": 4, "shared": {"hidden_dim": 8, "gate": True}}
    attention = {"num_heads": 2, "context": 8, "qk_norm": "head"}
    return Decoder(ModelConfig(dim=16, num_layers=2, dense_first=1, moe=moe, attention=attention))


def test_only_matrices_decay_and_every_parameter_is_in_one_group():
    model = tiny()
    decayed, free = split_parameters(model)
    assert decayed.keys() | free.keys() == dict(model.named_parameters()).keys()
    assert not decayed.keys() & free.keys()
    assert "embed.weight" in free
    assert any(name.endswith("shared_gate.weight") for name in free)
    assert all(parameter.ndim >= 2 for parameter in decayed.values())
    assert {name.rsplit(".", 1)[-1] for name in decayed} >= {"gate_up", "down", "weight"}
    assert all("norm" in name or "gate" in name or "embed" in name for name in free)


def test_no_bias_decays_nor_is_a_matrix_of_muons():
    both = {"experts": {"bias": True}, "router": {"bias": True, "selection_bias": True}}
    moe = {"hidden_dim": 8, "num_experts": 4, **both}
    shape = {"dim": 16, "moe": moe, "head": {"tied": False}}
    attention = {"num_heads": 2, "context": 8}
    hybrid = {**attention, "bias": "all", "sinks": True}
    decoder = Decoder(ModelConfig(num_layers=2, **shape, attention=hybrid))
    positions = {"kind": "relative", "shared": True}
    t5 = EncDecConfig(
        encoder_layers=1, decoder_layers=1, **shape, attention={**attention, "positions": positions}
    )
    for model in (decoder, EncDec(t5)):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        biases = {name for name in names.values() if "bias" in name or "relative" in name}
        assert {"gate_up_bias", "down_bias"} < {name.rsplit(".", 1)[-1] for name in biases}
        decayed, free = split_parameters(model)
        assert biases <= free.keys()
        assert {name.rsplit(".", 1)[-1] for name in decayed} == {"weight", "gate_up", "down"}
        for group in make_optimizer(model, OptimConfig(matrices="muon")).param_groups:
            decays = group["matrices"] or group["weight_decay"]
            assert not decays or not biases & {names[id(p)] for p in group["params"]}


def test_decay_shrinks_matrices_and_leaves_norms():
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, OptimConfig(lr=0.5, weight_decay=0.1))
    set_learning_rate(optimizer, 0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed, _ = split_parameters(model)
    for name, parameter in model.named_parameters():
        factor = 0.95 if name in decayed else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    decayed, free = split_parameters(model)
    assert [*decayed, *free] == ["1.weight", "1.bias"]
