"""Factories that the command line is given by name, one of them with a defect."""

from dataclasses import replace

import torch

from moestro import MoE, MoEConfig
from moestro.check.targets import of_moe
from moestro.moe.lora import Adapter

from .defects.computing import EarlyReturn, GradientsDoubled
from .plain_layer import SHAPES, factory

clean = factory(SHAPES["deepseek"])
doubled = factory(SHAPES["mixtral"], GradientsDoubled)
early = factory(SHAPES["mixtral"], EarlyReturn)


def ours():
    """A layer of this project."""
    torch.manual_seed(0)
    return MoE(MoEConfig(dim=16, hidden_dim=8, num_experts=4, top_k=2))


class NoBackward(torch.autograd.Function):
    """Of a kernel that was written for inference."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no backward")


class Raises:
    """A layer around it."""

    def forward(self, x, valid=None):
        y, *losses = super().forward(x, valid)
        return NoBackward.apply(y), *losses


no_backward = factory(SHAPES["mixtral"], Raises)


def flat():
    """A layer whose definition cannot run: its shared expert wants another width."""
    layer, about = factory(SHAPES["deepseek"])()
    layer.shared[0] = torch.nn.Linear(7, 6)
    return layer, about


def raises():
    """A factory with a mistake."""
    raise KeyError("experts")


def spread(wrong):
    """A layer of this project whose experts are spread over the ranks by a function of its own."""
    subject = of_moe(ours())

    def changed(module):
        module = subject.spread(module)
        wrong(module)
        return module

    return replace(subject, spread=changed)


def gradients_times_ranks():
    """Expert gradients times the ranks (pytorch#160285)."""

    def wrong(module):
        for each in module.experts.parameters():
            each.register_hook(lambda grad: grad * 2)

    return spread(wrong)


def router_cut_off():
    """A router that the exchange cuts off (Automodel#2995)."""

    def wrong(module):
        inner = module.experts.forward
        module.experts.forward = lambda x, routing: inner(
            x, routing._replace(weights_R=routing.weights_R.detach())
        )

    return spread(wrong)


def experts_of_another_rank():
    """Experts one place from where the router looks for them (Megatron-Bridge#1716)."""
    subject = of_moe(ours())

    def changed(module):
        for each in module.experts.parameters():
            each.data = each.data.roll(1, 0)
        return subject.spread(module)

    return replace(subject, spread=changed)


def norm_of_own_experts():
    """A norm that omits other ranks' experts (Megatron-LM#5916)."""

    def own(module):
        return torch.nn.utils.get_total_norm([each.grad for each in module.parameters()])

    return replace(of_moe(ours()), norm=own)


def adapted():
    """A layer of this project with adapters on its experts."""
    layer = ours()
    for name, rows, inputs in (("gate_up", 16, 16), ("down", 16, 8)):
        adapter = Adapter(4, (rows,), inputs, rank=2, scale=1.5)
        torch.nn.init.normal_(adapter.b, 0, 0.3)
        setattr(layer.experts, f"{name}_adapter", adapter)
    return layer
