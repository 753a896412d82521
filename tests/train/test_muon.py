import pytest
import torch

from moestro.config import EncDecConfig, ModelConfig, OptimConfig
from moestro.models.decoder import Decoder
from moestro.models.encdec import EncDec
from moestro.train import muon
from moestro.train.muon import orthogonalized
from moestro.train.optim import make_optimizer, set_learning_rate, split_parameters

CFG = OptimConfig(lr=0.01, weight_decay=0.1, matrices="muon")


def tiny() -> Decoder:
    torch.manual_seed(0)
    moe = {"hidden_dim": 8, "num_experts": 4, "shared": {"hidden_dim": 8, "gate": True}}
    attention = {"num_heads": 2, "context": 8}
    return Decoder(ModelConfig(dim=16, num_layers=2, dense_first=1, moe=moe, attention=attention))


def stepped(optimizer, parameters, steps=3):
    """The parameters after some steps of known gradients."""
    random = torch.Generator().manual_seed(1)
    set_learning_rate(optimizer, CFG.lr)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=random)
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in parameters]


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 8)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    torch.manual_seed(0)
    x_NOI = torch.randn(5, *shape)
    u, _, v = torch.linalg.svd(x_NOI, full_matrices=False)
    y_NOI = orthogonalized(x_NOI).float()
    values = u.mT @ y_NOI @ v.mT
    assert values.diagonal(dim1=1, dim2=2).min() > 0.25  # of these random matrices
    assert values.diagonal(dim1=1, dim2=2).max() < 1.35
    assert (values - torch.diag_embed(values.diagonal(dim1=1, dim2=2))).abs().max() < 0.05


def names_of_matrices(model):
    """What Muon updates."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = make_optimizer(model, CFG).param_groups
    return {names[id(each)] for group in groups if group["matrices"] for each in group["params"]}


def test_muons_are_the_maps_inside_blocks():
    moe = {"hidden_dim": 8, "num_experts": 4}
    untied = {"dim": 16, "num_layers": 1, "head": {"tied": False}, "moe": moe}
    decoder = Decoder(ModelConfig(**untied, attention={"num_heads": 2}))
    assert names_of_matrices(decoder) == {
        "blocks.0.attention.qkv.weight", "blocks.0.attention.out.weight",
        "blocks.0.ffn.experts.gate_up", "blocks.0.ffn.experts.down",
    }  # fmt: skip
    both = EncDec(EncDecConfig(dim=16, encoder_layers=1, decoder_layers=1, dense={"hidden_dim": 8}))
    assert not [name for name in names_of_matrices(both) if "relative" in name or "head" in name]


def test_any_number_together_is_the_same_step(monkeypatch):
    values = [torch.randn(3, 8, 6), torch.randn(5, 8, 6), torch.randn(8, 6), torch.randn(6, 6)]
    ends = []
    for together in (muon.TOGETHER, 100, 1):
        monkeypatch.setattr(muon, "TOGETHER", together)
        ours = [torch.nn.Parameter(value.clone()) for value in values]
        ends.append(stepped(make_optimizer(torch.nn.ParameterList(ours), CFG), ours))
    for end in ends[1:]:
        for left, right in zip(end, ends[0], strict=True):
            torch.testing.assert_close(left, right)


def test_a_matrix_of_zeros_stays():
    x_NOI = torch.stack([torch.zeros(4, 6), torch.ones(4, 6)])
    y_NOI = orthogonalized(x_NOI)
    assert not y_NOI[0].any()
    assert y_NOI[1].all()


def test_stacked_experts_are_as_many_matrices_of_torchs_muon():
    torch.manual_seed(0)
    values = [torch.randn(3, 8, 6), torch.randn(8, 6), torch.randn(6, 6)]
    ours = [torch.nn.Parameter(value.clone()) for value in values]
    theirs = [torch.nn.Parameter(m.clone()) for v in values for m in v.reshape(-1, *v.shape[-2:])]
    model = torch.nn.ParameterList(ours)
    after = stepped(make_optimizer(model, CFG), ours)
    peer = torch.optim.Muon(
        theirs, lr=CFG.lr, weight_decay=CFG.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    # The same gradients: of a stack they are drawn in one go.
    random = torch.Generator().manual_seed(1)
    for _ in range(3):
        grads = [torch.randn(v.shape, generator=random) for v in values]
        flat = [m for g in grads for m in g.reshape(-1, *g.shape[-2:])]
        for parameter, grad in zip(theirs, flat, strict=True):
            parameter.grad = grad
        peer.step()
    ends = [m for v in after for m in v.reshape(-1, *v.shape[-2:])]
    for end, parameter in zip(ends, theirs, strict=True):
        torch.testing.assert_close(end, parameter.detach())


def test_all_but_matrices_is_adamws_and_nothing_is_left_out():
    muon, adamw = tiny(), tiny()
    optimizer = make_optimizer(muon, CFG)
    stepped(optimizer, list(muon.parameters()))
    stepped(
        make_optimizer(adamw, CFG.model_copy(update={"matrices": "adamw"})),
        list(adamw.parameters()),
    )
    decayed, _ = split_parameters(muon)
    same = dict(adamw.named_parameters())
    for name, parameter in muon.named_parameters():
        matrix = name in decayed and "router" not in name
        assert torch.equal(parameter, same[name]) != matrix, name
        assert ("momentum_buffer" in optimizer.state[parameter]) == matrix


def test_an_experts_gradient_of_zero_moves_it_by_its_decay_alone():
    experts = torch.nn.Parameter(torch.ones(2, 4, 4))
    optimizer = make_optimizer(torch.nn.ParameterList([experts]), CFG)
    set_learning_rate(optimizer, CFG.lr)
    experts.grad = torch.stack([torch.zeros(4, 4), torch.eye(4)])
    optimizer.step()
    assert torch.equal(experts[0].detach(), torch.full((4, 4), 1 - CFG.lr * CFG.weight_decay))
    assert not torch.equal(experts[1].detach(), experts[0].detach())
