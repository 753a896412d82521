"""The whole layer against one assignment at a time: values and all gradients."""

import copy
import warnings

import pytest
import torch
from torch import nn

from moestro import MoE, MoEConfig
from moestro.errors import BackendError, ConfigError, ShapeError
from moestro.kernels import reference
from moestro.moe import balance
from moestro.moe.layer import MoE as HomeOfMoE

ROUTERS = {
    "switch": {"top_k": 1},
    "mixtral": {"top_k": 2},
    "plain": {"top_k": 3, "router": {"renormalize": False}},
    "deepseek": {
        "top_k": 2,
        "router": {
            "kind": "sigmoid",
            "selection_bias": True,
            "num_groups": 2,
            "top_groups": 1,
            "scale": 2.5,
        },
    },
    "gpt-oss": {"top_k": 3, "router": {"bias": True}},
    "phi": {"router": {"kind": "sparsemixer", "jitter": 0.6}},
    "llama-4": {"top_k": 1, "router": {"kind": "sigmoid", "weighs": "input"}},
    "noisy": {"router": {"kind": "noisy_top_k", "bias": True}},
    "expert choice": {"router": {"kind": "expert_choice"}},
    "hash": {"router": {"kind": "hash"}},
}
EXTRAS = {
    "plain": {},
    "shared": {"shared": {"hidden_dim": 6}},
    "gated shared": {"shared": {"hidden_dim": 6, "gate": True}},
    "biases": {"experts": {"bias": True}, "activation": "clamped_swiglu"},
}
CAPACITY = {"capacity": {"factor": 0.6, "eval_factor": 0.7}}
ACTIVATIONS = ("swiglu", "geglu", "clamped_swiglu", "relu", "gelu")


def layer_of(tiny, backend="auto", **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = MoE(tiny(init_scale=2.0, **changes), backend).double()
    for parameter in layer.parameters():
        if not parameter.any():
            nn.init.normal_(parameter)
    return layer


def ids_of(x):
    return torch.arange(x[..., 0].numel()).view(x.shape[:-1])


def mixture_by_definition(layer, x_TD, routing):
    """The reference mixture over the kept assignments, plus the shared expert."""
    cfg = layer.cfg
    keep_R = torch.ones_like(routing.tokens_R) > 0 if routing.kept_R is None else routing.kept_R
    rows_TD, weights_R = x_TD, routing.weights_R
    if cfg.router.weighs == "input":
        rows_TD, weights_R = x_TD * weights_R[:, None], torch.ones_like(weights_R)
    y_TD = reference.mixture(
        rows_TD,
        routing.tokens_R[keep_R],
        routing.experts_R[keep_R],
        weights_R[keep_R],
        layer.experts.gate_up,
        layer.experts.down,
        cfg.activation,
        layer.experts.biases,
    )
    if layer.shared is not None:
        hidden = reference.activate(x_TD @ layer.shared.gate_up[0].T, cfg.activation)
        shared_TD = hidden @ layer.shared.down[0].T
        if cfg.shared.gate:
            shared_TD = shared_TD * (x_TD @ layer.shared_gate.weight.T).sigmoid()
        y_TD = y_TD + shared_TD
    return y_TD


@pytest.mark.parametrize("backend", ["segments", "reference"])
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
def test_equals_the_definition(tiny, router, limited, extra, backend):
    if limited and router == "expert choice":
        pytest.skip("refused by the settings")
    changes = {**ROUTERS[router], **EXTRAS[extra], **(CAPACITY if limited else {})}
    layer = layer_of(tiny, backend, **changes)
    names, weights = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 5, 8, dtype=torch.float64)

    torch.manual_seed(1)
    y, routing = layer(x, token_ids=ids_of(x))
    actual = torch.autograd.grad(y, (x, *weights), grad, allow_unused=True)
    torch.manual_seed(1)
    _, routing = layer(x, token_ids=ids_of(x))
    x_TD = x.reshape(15, 8)
    expected_y = mixture_by_definition(layer, x_TD, routing).view(3, 5, 8)
    expected = torch.autograd.grad(expected_y, (x, *weights), grad, allow_unused=True)

    torch.testing.assert_close(y, expected_y, rtol=1e-7, atol=1e-7)
    for name, left, right in zip(("x", *names), actual, expected, strict=True):
        assert left is not None, name
        torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-7, msg=name)
        assert left.any(), f"{name} gets no gradient at all"
    if limited:
        assert routing.dropped() > 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(tiny, activation):
    layer = layer_of(tiny, activation=activation, shared={"hidden_dim": 5})
    x_TD = torch.randn(7, 8, dtype=torch.float64)
    y_TD, routing = layer(x_TD)
    torch.testing.assert_close(y_TD, mixture_by_definition(layer, x_TD, routing))


@pytest.mark.parametrize("router", ["switch", "mixtral", "deepseek", "gpt-oss", "phi"])
def test_gradcheck_through_router_experts_and_losses(tiny, router):
    """Tokens far from any tie: a choice must not change within gradcheck's step."""
    layer = layer_of(tiny, dim=4, hidden_dim=3, experts={"bias": True}, **ROUTERS[router])
    names, weights = zip(*layer.named_parameters(), strict=True)
    x_TD = torch.randn(6, 4, dtype=torch.float64)

    def total(x_TD, *weights):
        y_TD, routing = torch.func.functional_call(
            layer, dict(zip(names, weights, strict=True)), x_TD
        )
        return (
            y_TD.sin().sum()
            + balance.switch_loss(routing)
            + balance.z_loss(routing)
            + balance.importance_loss(routing)
            + balance.sequence_loss(routing, 2)
        )

    leaves = [t.detach().clone().requires_grad_() for t in (x_TD, *weights)]
    # The Switch and sequence losses take f as a constant: so does the numerical derivative,
    # since counts do not move within the step.
    assert torch.autograd.gradcheck(total, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("backend", ["segments", "reference"])
def test_no_token_and_one_token(tiny, router, num_tokens, dtype, backend):
    layer = layer_of(tiny, backend, **ROUTERS[router], shared={"hidden_dim": 4}).to(dtype)
    x_TD = torch.randn(num_tokens, 8).to(dtype).requires_grad_()
    y_TD, routing = layer(x_TD, token_ids=ids_of(x_TD))
    assert y_TD.shape == (num_tokens, 8)
    assert y_TD.dtype == dtype
    (y_TD.sum() + balance.switch_loss(routing) + balance.z_loss(routing)).backward()
    assert x_TD.grad.isfinite().all()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f"{name}: a rank without tokens would hang the others"
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize(("backend", "exactly"), [("reference", True), ("segments", False)])
def test_a_tokens_output_does_not_depend_on_its_company(tiny, backend, exactly):
    """Bitwise for the definition's experts; a GEMM's rounding depends on its number of rows."""
    layer = MoE(tiny(num_experts=8), backend).eval()
    x_TD = torch.randn(40, 8)
    together_TD, routing = layer(x_TD)
    for token in (0, 7, 39):
        alone_D, own = layer(x_TD[token : token + 1])
        assert torch.equal(own.experts_R, routing.experts_TK()[token])
        if exactly and torch.equal(own.weights_R, routing.weights_R[2 * token : 2 * token + 2]):
            assert torch.equal(alone_D[0], together_TD[token])
        torch.testing.assert_close(alone_D[0], together_TD[token], rtol=1e-5, atol=1e-6)


def test_the_same_input_gives_the_same_bits(tiny):
    layer = MoE(tiny(num_experts=8, capacity={}))
    x_TD = torch.randn(300, 8, requires_grad=True)
    runs = []
    for _ in range(2):
        y_TD, _ = layer(x_TD)
        runs.append((y_TD, *torch.autograd.grad(y_TD.sin().sum(), (x_TD, *layer.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("limited", [False, True])
def test_padding_never_counts(tiny, router, limited):
    """Whatever the padding holds, real tokens, counts and losses stay the same."""
    if limited and router == "expert choice":
        pytest.skip("refused by the settings")
    changes = {**ROUTERS[router], **(CAPACITY if limited else {})}
    layer = layer_of(tiny, **changes).eval()
    valid = torch.rand(4, 6) < 0.6
    x = torch.randn(4, 6, 8, dtype=torch.float64)
    ids = torch.randint(0, 50, (4, 6))
    other, other_ids = x.clone(), ids.clone()
    other[~valid], other_ids[~valid] = float("nan"), 7
    (y, routing), (y2, routing2) = (
        layer(x, token_ids=ids, valid=valid),
        layer(other, token_ids=other_ids, valid=valid),
    )
    torch.testing.assert_close(y, y2, rtol=1e-12, atol=1e-12)
    assert torch.equal(routing.counts_E(), routing2.counts_E())
    assert routing.dropped() == routing2.dropped()
    assert routing.counts_E().sum() == (
        routing.tokens_R.bincount(minlength=24)[valid.flatten()].sum()
    )
    losses = (
        balance.switch_loss,
        balance.z_loss,
        balance.importance_loss,
        lambda r: balance.sequence_loss(r, 4),
    )
    for loss in losses:
        assert torch.equal(loss(routing), loss(routing2))
    if router != "hash":
        alone, _ = layer(x[valid], token_ids=ids[valid])
        torch.testing.assert_close(alone, y[valid], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_capacity_uses_its_own_factor_in_evaluation(tiny, training):
    cfg = tiny(top_k=1, capacity={"factor": 0.5, "eval_factor": 1.0})
    layer = MoE(cfg).train(training)
    x_TD = torch.randn(1, 8).expand(40, 8)
    _, routing = layer(x_TD)
    # All 40 equal tokens want one expert, which takes 0.5 · 40 / 4 or 1.0 · 40 / 4 of them.
    assert routing.kept_R.sum() == (5 if training else 10)
    assert routing.kept_R.nonzero().flatten().tolist() == list(range(5 if training else 10))


def test_a_dropped_token_passes_nothing_but_the_shared_expert(tiny):
    layer = MoE(tiny(top_k=1, capacity={"factor": 0.1}, shared={"hidden_dim": 4}))
    x_TD = torch.randn(1, 8).expand(40, 8)
    y_TD, routing = layer(x_TD)
    assert routing.dropped() == 39
    torch.testing.assert_close(y_TD[1:], layer.shared(x_TD[1:]))


def test_expert_dropout_only_in_training(tiny):
    layer = MoE(tiny(experts={"dropout": 0.5}))
    x_TD = torch.randn(9, 8)
    assert torch.equal(layer.eval()(x_TD)[0], layer(x_TD)[0])
    assert not torch.equal(layer.train()(x_TD)[0], layer(x_TD)[0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda layer: layer(torch.randn(3, 7)), r"8.*\[3, 7\].*MoEConfig\.dim"),
        (lambda layer: layer(torch.tensor(1.0)), r"\[\.\.\., 8\]"),
        (lambda layer: layer(torch.randn(3, 8).double()), "float64.*float32.*autocast"),
        (
            lambda layer: layer(torch.randn(3, 8), valid=torch.ones(2, dtype=torch.bool)),
            r"valid has shape \[2\].*\[3\]",
        ),
        (lambda layer: layer(torch.randn(3, 8), valid=torch.ones(3)), "float32.*bool"),
        (
            lambda layer: layer(torch.randn(3, 8), token_ids=torch.ones(3, 1).long()),
            r"token_ids has shape \[3, 1\]",
        ),
    ],
)
def test_wrong_shapes_and_dtypes(tiny, call, words):
    with pytest.raises(ShapeError, match=words):
        call(MoE(tiny()))


def test_wrong_settings(tiny):
    with pytest.raises(ConfigError, match="top_k is 5"):
        tiny(top_k=5)
    with pytest.raises(BackendError, match="nonsense"):
        MoE(tiny(), backend="nonsense")(torch.randn(2, 8))


class SomebodysBlock(nn.Module):
    """A stranger's transformer block with our layer in place of its feed-forward network."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.moe = MoE(MoEConfig(dim=8, hidden_dim=16))

    def forward(self, x):
        y, routing = self.moe(self.norm(x))
        return x + y, routing


def test_trains_inside_somebodys_module():
    model = SomebodysBlock()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.randn(64, 8)
    goal = x.roll(1, -1)
    losses = []
    for _ in range(60):
        y, routing = model(x)
        loss = (y - goal).square().mean()
        (loss + 0.01 * balance.switch_loss(routing)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    copied = SomebodysBlock()
    copied.load_state_dict(model.state_dict())
    assert torch.equal(copied(x)[0], model(x)[0])


@pytest.mark.parametrize("router", ROUTERS)
def test_under_autocast(tiny, router):
    layer = layer_of(tiny, **ROUTERS[router], shared={"hidden_dim": 4, "gate": True}).float()
    x_TD = torch.randn(50, 8, requires_grad=True)
    ids_T = torch.arange(50)
    torch.manual_seed(3)
    exact_TD, plain = layer(x_TD, token_ids=ids_T)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        y_TD, routing = layer(x_TD, token_ids=ids_T)
    assert y_TD.dtype == torch.bfloat16
    assert torch.equal(routing.experts_R, plain.experts_R)
    assert torch.equal(routing.weights_R, plain.weights_R)
    assert (y_TD - exact_TD).abs().max() < 0.03 * exact_TD.abs().max()
    y_TD.sum().backward()
    for parameter in (x_TD, *layer.parameters()):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("counts", [64, 1000])
def test_bf16_padding_of_groups_changes_nothing(tiny, counts):
    """segments pads bf16 groups to few sizes; the definition, here in float64, does not."""
    fast = MoE(tiny(hidden_dim=8)).bfloat16()
    slow = MoE(tiny(hidden_dim=8), "reference").double()
    slow.load_state_dict(fast.state_dict())
    x_TD = torch.randn(counts, 8).bfloat16()
    results = []
    for layer, dtype in ((fast, torch.bfloat16), (slow, torch.float64)):
        leaf_TD = x_TD.to(dtype).clone().requires_grad_()
        y_TD, routing = layer(leaf_TD)
        y_TD.float().sin().sum().backward()
        results.append((y_TD, leaf_TD.grad, layer.experts.gate_up.grad, routing.counts_E()))
    for left, right in zip(*results, strict=True):
        scale = right.abs().max().item()
        assert (left - right).abs().max() <= 0.03 * scale


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("training", [True, False])
def test_every_routing_keeps_its_promises(tiny, router, training):
    layer = layer_of(tiny, **ROUTERS[router]).train(training).bfloat16()
    x_TD = torch.randn(20, 8).bfloat16()
    _, routing = layer(x_TD, token_ids=ids_of(x_TD))
    rows = 20 * layer.cfg.top_k
    floats = (routing.weights_R, routing.logits_TE, routing.probs_TE)
    assert all(tensor.dtype == torch.float32 for tensor in floats)
    assert routing.tokens_R.dtype == routing.experts_R.dtype == torch.int64
    assert len(routing.tokens_R) == len(routing.experts_R) == len(routing.weights_R) == rows
    torch.testing.assert_close(routing.probs_TE.sum(-1), torch.ones(20))
    assert (routing.weights_R > 0).all()
    pairs = set(zip(routing.tokens_R.tolist(), routing.experts_R.tolist(), strict=True))
    assert len(pairs) == rows, "a token went to the same expert twice"


@pytest.mark.parametrize("router", ROUTERS)
def test_copies_and_inference_mode(tiny, router):
    layer = layer_of(tiny, **ROUTERS[router]).eval()
    x_TD = torch.randn(20, 8).double()
    expected, _ = layer(x_TD, token_ids=ids_of(x_TD))
    with torch.inference_mode():
        actual, _ = copy.deepcopy(layer)(x_TD, token_ids=ids_of(x_TD))
    assert torch.equal(actual, expected)


def test_state_dict_layout(tiny):
    cfg = tiny(router={"kind": "sigmoid", "selection_bias": True}, shared={"hidden_dim": 5})
    shapes = {name: tuple(value.shape) for name, value in MoE(cfg).state_dict().items()}
    assert shapes == {
        "router.weight": (4, 8),
        "router.bias": (4,),
        "experts.gate_up": (4, 32, 8),
        "experts.down": (4, 8, 16),
        "shared.gate_up": (1, 10, 8),
        "shared.down": (1, 8, 5),
    }


def test_the_packages_front_door_is_this_layer():
    assert MoE is HomeOfMoE
