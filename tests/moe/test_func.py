"""`torch.func`, forward mode and second derivatives: by plain torch, which the reference is."""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap

from moestro import MoE
from moestro.config import ModelConfig
from moestro.errors import BackendError
from moestro.models.build import build_model

LAYERS = {
    "switch": {"top_k": 1},
    "mixtral": {"top_k": 2},
    "deepseek": {"router": {"kind": "sigmoid", "num_groups": 2, "top_groups": 1, "scale": 2.5}},
    "phi": {"router": {"kind": "sparsemixer", "jitter": 0.6}},
    "hash": {"router": {"kind": "hash"}},
    "expert choice": {"router": {"kind": "expert_choice"}},
    "capacity": {"capacity": {"factor": 0.6, "eval_factor": 0.7}},
    "capacity by weight": {"capacity": {"eval_factor": 0.6, "priority": "router"}},
    "gated shared": {"shared": {"hidden_dim": 6, "gate": True}},
    "biases": {"experts": {"bias": True}, "activation": "clamped_swiglu"},
}
# torch's own, of the rules for forward derivatives that it compiles when they are first used.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:expert_choice routing is not causal"),
]


@pytest.fixture
def made(tiny):
    """A function: settings → (layer in float64, its parameters, loss of parameters and tokens)."""

    def make(backend="reference", **changes):
        layer = MoE(tiny(init_scale=2.0, **changes), backend).double().eval()
        ids_T = torch.arange(7)

        def loss(parameters, x_TD):
            y_TD, _ = functional_call(layer, parameters, (x_TD,), {"token_ids": ids_T})
            return y_TD.sin().sum()

        return layer, {name: each.detach() for name, each in layer.named_parameters()}, loss

    return make


def by_autograd(layer, loss, x_TD):
    names, parameters = zip(*layer.named_parameters(), strict=True)
    own = dict(zip(names, parameters, strict=True))
    return dict(zip(names, torch.autograd.grad(loss(own, x_TD), parameters), strict=True))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_of_all_tokens_and_of_each_sample(made, kind, backend):
    """`auto` chooses the reference under torch.func, and its own fast path under autograd."""
    layer, parameters, loss = made(backend, **LAYERS[kind])
    x_NTD = torch.randn(4, 7, 8, dtype=torch.float64)
    expected = [by_autograd(layer, loss, x_TD) for x_TD in x_NTD]
    torch.testing.assert_close(grad(loss)(parameters, x_NTD[0]), expected[0])
    each = vmap(grad(loss), (None, 0))(parameters, x_NTD)
    for name, grads_N in each.items():
        torch.testing.assert_close(grads_N, torch.stack([one[name] for one in expected]))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kind", LAYERS)
def test_forward_derivatives(made, kind, backend):
    layer, parameters, loss = made(backend, **LAYERS[kind])
    x_TD = torch.randn(7, 8, dtype=torch.float64)
    slopes = {name: torch.randn_like(each) for name, each in parameters.items()}
    _, slope = jvp(lambda own: loss(own, x_TD), (parameters,), (slopes,))
    grads = by_autograd(layer, loss, x_TD)
    torch.testing.assert_close(slope, sum((grads[name] * slopes[name]).sum() for name in grads))


def test_forward_mode_of_autograd_and_16_bits(made):
    """Dual numbers outside torch.func; the router's product keeps its input in 16 bits."""
    layer, parameters, loss = made()
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.bfloat16, 0.05)):
        x_TD, slope_TD = torch.randn(2, 7, 8).to(dtype)
        layer.to(dtype)
        parameters = {name: each.detach() for name, each in layer.named_parameters()}
        with forward_ad.dual_level():
            dual = loss(parameters, forward_ad.make_dual(x_TD, slope_TD))
            slope = forward_ad.unpack_dual(dual).tangent
        x_TD.requires_grad_()
        (grad_TD,) = torch.autograd.grad(loss(parameters, x_TD), x_TD)
        expected = (grad_TD.double() * slope_TD.double()).sum()
        assert slope.double().item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("kind", ["mixtral", "deepseek", "phi", "capacity", "gated shared"])
def test_second_derivatives(made, kind):
    layer, _, loss = made(dim=4, hidden_dim=3, **LAYERS[kind])
    names, weights = zip(*layer.named_parameters(), strict=True)
    x_TD = torch.randn(7, 4, dtype=torch.float64)

    def total(x_TD, *weights):
        return loss(dict(zip(names, weights, strict=True)), x_TD)

    leaves = [each.detach().clone().requires_grad_() for each in (x_TD, *weights)]
    assert gradcheck(total, leaves, check_forward_ad=True)
    assert gradgradcheck(total, leaves)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_a_fast_path_that_was_asked_for_says_what_to_do(made, transform):
    _, parameters, loss = made("segments")
    x_TD = torch.randn(7, 8, dtype=torch.float64)
    run = {
        "grad": lambda: grad(loss)(parameters, x_TD),
        "vmap": lambda: vmap(loss, (None, 0))(parameters, x_TD[None]),
        "jvp": lambda: jvp(lambda x_TD: loss(parameters, x_TD), (x_TD,), (x_TD,)),
    }[transform]
    with pytest.raises(BackendError, match=r"'segments'.*torch\.func.*backend=\"reference\""):
        run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_decoder(tiny, dtype):
    """Per-sample gradients, as influence functions want them, and forward derivatives."""
    cfg = ModelConfig(
        vocab_size=32, dim=8, num_layers=2, attention={"num_heads": 2, "num_kv_heads": 1},
        dense_first=1, moe=tiny(),
    )  # fmt: skip
    model = build_model(cfg).to(dtype)
    parameters = {name: each.detach() for name, each in model.named_parameters()}
    tokens_N1S = torch.randint(0, 32, (3, 1, 9))

    def loss(parameters, tokens_BS):
        return functional_call(model, parameters, (tokens_BS,)).logits.float().sin().mean()

    each = vmap(grad(loss), (None, 0))(parameters, tokens_N1S)
    slopes = {name: torch.randn_like(value) for name, value in parameters.items()}
    _, slope = jvp(lambda own: loss(own, tokens_N1S[0]), (parameters,), (slopes,))
    loss(dict(model.named_parameters()), tokens_N1S[0]).backward()
    exact = dtype == torch.float32
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max().item()
        error = (each[name][0] - parameter.grad).abs().max().item()
        assert error <= (1e-5 if exact else 0.05) * scale + 1e-6, name
    expected = sum((p.grad.float() * slopes[n].float()).sum() for n, p in model.named_parameters())
    assert slope.item() == pytest.approx(expected.item(), rel=1e-4 if exact else 0.1, abs=1e-3)
