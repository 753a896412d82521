"""The CUDA backend against the definition computed in float64 on the CPU; run by `make gpu`."""

import pytest
import torch

from moestro import MoE, MoEConfig
from moestro.kernels import backends, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# bf16 has 8 bits of mantissa; two products and their sums in fp32 lie between input and output.
TOLERANCE = {"atol": 2e-2, "rtol": 2e-2}
COUNTS = [(5, 0, 40, 19), (0, 0, 64, 0), (1, 0, 0, 0), (63, 7, 1, 130)]


@pytest.mark.parametrize("backend", ["torch", "segments"])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "relu", "gelu"])
def test_expert_ffn_equals_the_definition(backend, counts, activation):
    torch.manual_seed(0)
    rows, dim, hidden = sum(counts), 32, 24
    width = 2 * hidden if activation in reference.GATED else hidden
    inputs = [
        torch.randn(rows, dim),
        torch.randn(len(counts), width, dim) / dim**0.5,
        torch.randn(len(counts), dim, hidden) / hidden**0.5,
    ]
    grad = torch.randn(rows, dim).bfloat16()
    offsets = torch.tensor(counts).cumsum(0)
    kernel = backends.choose(backend, "cuda", torch.bfloat16, (dim, width, hidden))
    results = []
    for device, dtype, ffn in (
        ("cpu", torch.float64, reference.expert_ffn),
        ("cuda", torch.bfloat16, kernel.expert_ffn),
    ):
        leaves = [x.bfloat16().to(device, dtype).requires_grad_() for x in inputs]
        y = ffn(*leaves, offsets.to(device), activation)
        y.backward(grad.to(device, dtype))
        results.append([y, *(leaf.grad for leaf in leaves)])
    for slow, fast in zip(*results, strict=True):
        assert torch.isfinite(fast).all()
        torch.testing.assert_close(fast.cpu().double(), slow.double(), **TOLERANCE)


def test_the_cuda_backend_is_chosen_and_says_why_it_refuses():
    chosen = backends.choose("auto", "cuda", torch.bfloat16, (32, 48, 24))
    assert chosen.name == "torch"
    assert backends.choose("auto", "cuda", torch.float32, (32, 48, 24)).name == "segments"
    assert backends.choose("auto", "cuda", torch.bfloat16, (30,)).name == "segments"


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
