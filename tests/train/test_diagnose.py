import torch
from torch import nn

from moestro.train.diagnose import (
    first_bad_gradient,
    first_bad_output,
    first_bad_parameter,
    is_finite,
)


class Log(nn.Module):
    def forward(self, x):
        return (x.log(), {"ignored": x})


class Last(nn.Module):
    def forward(self, pair):
        return pair[0].sum()


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), Log(), Last())


def test_finite_models_have_nothing_to_report():
    net = nn.Sequential(nn.Linear(2, 2))
    x = torch.ones(1, 2)
    net(x).sum().backward()
    assert first_bad_gradient(net) is None
    assert first_bad_parameter(net) is None
    assert first_bad_output(net, lambda: net(x)) is None


def test_the_first_output_that_is_not_finite_is_named():
    net = model()
    nn.init.zeros_(net[0].weight)
    nn.init.zeros_(net[0].bias)
    assert first_bad_output(net, lambda: net(torch.ones(1, 2))) == "the output of 1"


def test_the_first_bad_parameter_is_named():
    net = model()
    net[0].bias.data[1] = float("inf")
    assert first_bad_parameter(net) == "the parameter 0.bias"


def test_the_first_bad_gradient_is_named():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    net[1].weight.grad[0, 0] = float("nan")
    assert first_bad_gradient(net) == "the gradient of 1.weight"


def test_hooks_are_gone_afterwards():
    net, calls = model(), []
    first_bad_output(net, lambda: net(torch.ones(1, 2)))
    net[1].register_forward_hook(lambda *_: calls.append(1))
    net(torch.ones(1, 2))
    assert calls == [1]
    assert len(net[1]._forward_hooks) == 1


def test_is_finite():
    assert is_finite(torch.zeros(0))
    assert not is_finite(torch.tensor([0.0, float("-inf")]))
