import pytest
import torch

from moestro.config import BalanceConfig
from moestro.models.decoder import Decoder
from moestro.moe import balance
from moestro.train.objective import IGNORED, Objective, num_labels


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


@pytest.mark.parametrize("pieces", [(1, 3), (2, 2), (1, 1, 2)])
def test_a_step_weighs_every_label_alike_however_it_is_split(batch, pieces):
    model, tokens_BS, targets_BS = batch
    targets_BS = targets_BS.clone()
    targets_BS[0, 2:] = targets_BS[1, :3] = IGNORED  # the rows have 2, 13, 16 and 16 labels
    model, objective = model.double(), Objective(BalanceConfig(**OFF))
    whole = objective(model(tokens_BS), targets_BS)
    torch.autograd.backward(whole.total)
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    objective.restart(num_labels(targets_BS), len(pieces))
    found = 0.0
    for tokens, targets in zip(tokens_BS.split(pieces), targets_BS.split(pieces), strict=True):
        loss = objective(model(tokens), targets)
        torch.autograd.backward(loss.total)
        found += loss.parts["loss"]
    torch.testing.assert_close(found, whole.parts["loss"])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-7)


def test_a_micro_batch_without_labels_adds_nothing(batch):
    model, tokens_BS, targets_BS = batch
    loss = Objective(BalanceConfig(**OFF))(model(tokens_BS), targets_BS * 0 + IGNORED)
    torch.autograd.backward(loss.total)
    assert loss.total == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_balance_losses_are_means_over_the_micro_batches(batch):
    model, tokens_BS, targets_BS = batch
    objective = Objective(BalanceConfig())
    alone = [objective(model(half), targets_BS[:2]) for half in tokens_BS.split(2)]
    objective.restart(micro_batches=2)
    step = [objective(model(half), targets_BS[:2]) for half in tokens_BS.split(2)]
    for name in ("switch", "z"):
        torch.testing.assert_close(
            sum(loss.parts[name] for loss in step), sum(loss.parts[name] for loss in alone) / 2
        )
