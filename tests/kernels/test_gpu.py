"""What only a CUDA device can show beside the kernels' parity; run by `make gpu`."""

import pytest
import torch

from moestro import MoE, MoEConfig
from moestro.kernels import backends
from moestro.kernels.backends import Work

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_cuda_backend_is_chosen_and_says_why_it_refuses():
    chosen = backends.choose("auto", Work("cuda", torch.bfloat16, (32, 48, 24)))
    assert chosen.name == "torch"
    assert backends.choose("auto", Work("cuda", torch.float32, (32, 48, 24))).name == "segments"
    assert backends.choose("auto", Work("cuda", torch.bfloat16, (30,))).name == "segments"


def test_a_layer_under_autocast_equals_itself_on_the_cpu():
    torch.manual_seed(0)
    layer = MoE(MoEConfig(dim=64, hidden_dim=32, num_experts=8, top_k=2))
    x = torch.randn(100, 64)
    y_cpu, routing_cpu = layer(x)
    y_cpu.square().mean().backward()
    grads_cpu = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer.cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y, routing = layer(x.cuda())
    y.float().square().mean().backward()
    assert (routing.experts_R.cpu() == routing_cpu.experts_R).float().mean() > 0.99
    torch.testing.assert_close(y.float().cpu(), y_cpu, atol=3e-2, rtol=3e-2)
    for parameter, expected in zip(layer.parameters(), grads_cpu, strict=True):
        assert parameter.grad.dtype == torch.float32
        error = (parameter.grad.cpu() - expected).norm() / expected.norm()
        assert error < 0.05
