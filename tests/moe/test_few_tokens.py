"""Few tokens without gradients take a shorter way, expert by expert: it must give the same."""

import pytest
import torch

from moestro import MoE
from moestro.kernels import reference
from moestro.moe import dispatch, mixing
from moestro.moe.experts import FeedForward

ROUTERS = {
    "switch": {"top_k": 1},
    "mixtral": {"top_k": 2},
    "all to all": {"top_k": 4},
    "phi": {"router": {"kind": "sparsemixer", "jitter": 0.3}},
    "hash": {"router": {"kind": "hash"}},
    "capacity": {"top_k": 2, "capacity": {"eval_factor": 0.5}},
    "biases": {"experts": {"bias": True}, "activation": "clamped_swiglu"},
    "plain, shared": {"activation": "relu", "shared": {"hidden_dim": 6, "gate": True}},
}
# bf16: each expert's result is rounded twice on the way, by half a unit in the last place (2^-9).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture
def taken(monkeypatch):
    """How often the short way was taken."""
    calls = []
    real = dispatch.mix_few

    def counted(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(dispatch, "mix_few", counted)
    return calls


def layer_of(tiny, dtype=torch.float32, backend="segments", **changes):
    layer = MoE(tiny(**changes), backend).to(dtype).eval()
    for bias in layer.experts.biases or ():
        torch.nn.init.normal_(bias)
    return layer


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 4])
@pytest.mark.parametrize("router", ROUTERS)
def test_equals_the_long_way_and_the_definition(tiny, taken, router, num_tokens, dtype):
    layer = layer_of(tiny, dtype, **ROUTERS[router])
    x_TD = torch.randn(num_tokens, 8).to(dtype)
    ids_T = torch.arange(num_tokens)
    with torch.no_grad():
        y_TD, routing = layer(x_TD, token_ids=ids_T)
    assert len(taken) == 1
    expected_TD, other = layer(x_TD, token_ids=ids_T)
    assert len(taken) == 1, "gradients need the long way"
    assert y_TD.dtype == dtype
    assert torch.equal(routing.experts_R, other.experts_R)
    scale = expected_TD.abs().max().item() if num_tokens else 1.0
    tolerance = {"rtol": 0, "atol": TOLERANCE[dtype] * scale}
    torch.testing.assert_close(y_TD, expected_TD.detach(), **tolerance)
    if layer.shared is None:
        keep_R = routing.kept_R if routing.kept_R is not None else routing.experts_R >= 0
        who = (routing.tokens_R, routing.experts_R, routing.weights_R)
        weights = [t.detach().double() for t in (layer.experts.gate_up, layer.experts.down)]
        exact_TD = reference.mixture(
            x_TD.double(),
            *(part[keep_R] for part in who),
            *weights,
            layer.cfg.activation,
            layer.experts.biases,
        )
        torch.testing.assert_close(y_TD.double(), exact_TD.detach(), **tolerance)


def test_capacity_drops_some_and_all_of_a_token(tiny):
    """Five equal tokens for one place in each of two experts: the first is served, four get 0."""
    layer = layer_of(tiny, num_experts=5, capacity={"eval_factor": 0.5})
    with torch.no_grad():
        y_TD, routing = layer(torch.randn(1, 8).expand(5, 8))
    assert routing.kept_R.tolist() == [True, True] + [False] * 8
    assert y_TD[0].any()
    assert not y_TD[1:].any()


def test_each_expert_works_once(tiny):
    layer = layer_of(tiny)
    x_TD = torch.randn(7, 8)
    with torch.no_grad():
        routing = layer.router(x_TD)
        calls = []
        dispatch.mix_few(x_TD, routing, lambda rows, e: calls.append((e, len(rows))) or rows)
    counts_E = routing.counts_E().tolist()
    assert sorted(calls) == [(e, count) for e, count in enumerate(counts_E) if count]


def test_a_tokens_sum_does_not_depend_on_its_company(tiny):
    layer = layer_of(tiny, num_experts=8, top_k=3)
    x_TD = torch.randn(5, 8)
    with torch.no_grad():
        routing = layer.router(x_TD)
        together_TD = dispatch.mix_few(x_TD, routing, lambda rows_PD, expert: rows_PD * expert)
        for token in range(5):
            part = slice(3 * token, 3 * token + 3)
            own = routing._replace(
                tokens_R=torch.zeros(3, dtype=torch.int64),
                experts_R=routing.experts_R[part],
                weights_R=routing.weights_R[part],
            )
            alone_TD = dispatch.mix_few(x_TD[token : token + 1], own, lambda rows, e: rows * e)
            assert torch.equal(alone_TD[0], together_TD[token])


@pytest.mark.parametrize(
    "case", ["many rows", "gradients", "dropout", "the definition asked for", "expert choice"]
)
def test_when_the_long_way_is_taken(tiny, taken, case):
    backend = "reference" if case == "the definition asked for" else "segments"
    kind = "expert_choice" if case == "expert choice" else "softmax"
    changes = {"router": {"kind": kind}, "experts": {"dropout": 0.5}}
    if case == "expert choice":
        with pytest.warns(UserWarning, match="not causal"):
            layer = layer_of(tiny, backend=backend, **changes)
    else:
        layer = layer_of(tiny, backend=backend, **changes)
    layer.train(case == "dropout")
    num_tokens = mixing.FEW_ROWS if case == "many rows" else 2
    with torch.set_grad_enabled(case == "gradients"):
        layer(torch.randn(num_tokens, 8))
    assert not taken


@pytest.mark.parametrize("num_tokens", [0, 1, 5, mixing.FEW_ROWS + 1])
def test_a_dense_network_too(num_tokens):
    dense = FeedForward(8, 5, "geglu")
    x_TD = torch.randn(num_tokens, 8)
    with torch.no_grad():
        short_TD = dense(x_TD)
    torch.testing.assert_close(short_TD, dense(x_TD).detach())


def test_under_autocast_the_rows_decide(tiny, taken):
    layer = layer_of(tiny, shared={"hidden_dim": 4})
    x_TD = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            y_TD, _ = layer(x_TD)
        expected_TD, _ = layer(x_TD)
    assert len(taken) == 1
    assert y_TD.dtype == expected_TD.dtype == torch.bfloat16
    scale = expected_TD.abs().max().item()
    torch.testing.assert_close(y_TD, expected_TD.detach(), rtol=0, atol=2e-2 * scale)
