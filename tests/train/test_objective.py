import pytest
import torch

from moestro.config import BalanceConfig
from moestro.models.decoder import Decoder
from moestro.moe import balance
from moestro.train.objective import Objective


@pytest.fixture
def batch(tiny_settings):
    torch.manual_seed(0)
    model, tokens_BS = Decoder(tiny_settings().model), torch.randint(0, 256, (4, 17))
    return model, tokens_BS[:, :-1], tokens_BS[:, 1:]


OFF = {"switch": 0.0, "z": 0.0}


def test_without_balance_it_is_the_mean_cross_entropy(batch):
    model, tokens_BS, targets_BS = batch
    output = model(tokens_BS)
    loss = Objective(BalanceConfig(**OFF))(output, targets_BS)
    logp_BSV = output.logits.log_softmax(-1)
    expected = -logp_BSV.gather(-1, targets_BS[..., None]).mean()
    torch.testing.assert_close(loss.total, expected)
    assert loss.parts.keys() == {"loss"}


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("switch", balance.switch_loss),
        ("importance", balance.importance_loss),
        ("z", balance.z_loss),
    ],
)
def test_each_term_is_weighted_and_summed_over_layers(batch, name, function):
    model, tokens_BS, targets_BS = batch
    output = model(tokens_BS)
    loss = Objective(BalanceConfig(**(OFF | {name: 0.5})))(output, targets_BS)
    values = [function(routing) for routing in output.routings]
    assert len(values) == 2
    torch.testing.assert_close(loss.total, loss.parts["loss"] + 0.5 * sum(values))
    torch.testing.assert_close(loss.parts[name], sum(values) / 2)


def test_sequence_scope(batch):
    model, tokens_BS, targets_BS = batch
    output = model(tokens_BS)
    loss = Objective(BalanceConfig(scope="sequence", z=0.0))(output, targets_BS)
    values = [balance.sequence_loss(routing, 4) for routing in output.routings]
    torch.testing.assert_close(loss.parts["switch"], sum(values) / 2)


def test_global_scope_gathers_the_counts_of_a_step_and_forgets_them(batch):
    model, tokens_BS, targets_BS = batch
    objective = Objective(BalanceConfig(scope="global", z=0.0))
    first, second = model(tokens_BS[:2]), model(tokens_BS[2:])
    objective(first, targets_BS[:2])
    found = objective(second, targets_BS[2:]).parts["switch"]
    values = [
        balance.switch_loss(b, a.counts_E() + b.counts_E())
        for a, b in zip(first.routings, second.routings, strict=True)
    ]
    torch.testing.assert_close(found, sum(values) / 2)
    objective.restart()
    alone = [balance.switch_loss(routing) for routing in second.routings]
    again = objective(second, targets_BS[2:]).parts["switch"]
    torch.testing.assert_close(again, sum(alone) / 2)
    assert found != again


def test_logits_in_half_precision_give_a_loss_in_float32(batch):
    model, tokens_BS, targets_BS = batch
    with torch.autocast("cpu", torch.bfloat16):
        output = model(tokens_BS)
    assert output.logits.dtype == torch.bfloat16
    assert Objective(BalanceConfig())(output, targets_BS).total.dtype == torch.float32
