"""SparseMixer routing (GRIN MoE) against its rule, one token and one expert at a time."""

import math

import pytest
import torch

from moestro.errors import ConfigError
from moestro.moe.routers import build_router


def router_of(tiny, num_experts=6, jitter=0.2, **router):
    settings = {"kind": "sparsemixer", "jitter": jitter, **router}
    return build_router(tiny(num_experts=num_experts, router=settings, init_scale=8.0))


def best_by_hand(logits, taken, jitter):
    """(expert, weight) of the best expert not taken, among the others near it."""
    free = [e for e in range(len(logits)) if e not in taken]
    best = max(free, key=lambda e: logits[e])
    near = [
        e
        for e in free
        if logits[best] - logits[e] <= 2 * jitter * max(abs(logits[e]), logits[best])
    ]
    return best, 1 / sum(math.exp(logits[e] - logits[best]) for e in near)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("jitter", [0.01, 0.2, 0.9])
@pytest.mark.parametrize("num_experts", [2, 6])
def test_by_hand(tiny, num_experts, jitter, training):
    router = router_of(tiny, num_experts, jitter, scale=1.5).train(training)
    x_TD = torch.randn(60, 8)
    logits_TE = x_TD.double() @ router.weight.detach().double().T
    routing = router(x_TD)
    torch.testing.assert_close(routing.logits_TE.double(), logits_TE, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(routing.probs_TE, routing.logits_TE.softmax(-1))
    weights_TK = routing.weights_R.view(-1, 2).tolist()
    for token, logits in enumerate(routing.logits_TE.double().tolist()):
        first, first_weight = best_by_hand(logits, (), jitter)
        second, second_weight = best_by_hand(logits, (first,), jitter)
        assert routing.experts_TK()[token].tolist() == [first, second]
        expected = [1.5 * first_weight, 1.5 * second_weight]
        assert weights_TK[token] == pytest.approx(expected, rel=1e-5)


def test_weights_need_not_sum_to_one(tiny):
    sums_T = router_of(tiny)(torch.randn(60, 8)).weights_R.view(-1, 2).sum(-1)
    assert sums_T.max() > 1.2
    divided = router_of(tiny, renormalize=True)(torch.randn(60, 8)).weights_R.view(-1, 2)
    torch.testing.assert_close(divided.sum(-1), torch.ones(60))


def test_equal_logits_share(tiny):
    """All zero: nothing is far, and nothing is divided by zero."""
    router = router_of(tiny)
    routing = router(torch.zeros(3, 8))
    assert routing.experts_TK().tolist() == [[0, 1]] * 3
    torch.testing.assert_close(routing.weights_R.view(-1, 2)[0], torch.tensor([1 / 6, 1 / 5]))


def test_the_gradient_is_that_of_the_softmaxes(tiny):
    router = router_of(tiny, jitter=0.5).double()
    x_TD = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(router, {"weight": w}, x).weights_R,
        (x_TD, router.weight),
    )
    (grad,) = torch.autograd.grad(router(x_TD).weights_R.sum(), router.weight)
    assert grad.abs().max() > 1e-3


def test_three_experts_are_refused(tiny):
    with pytest.raises(ConfigError, match="sparsemixer chooses 2 experts; top_k is 3"):
        tiny(top_k=3, router={"kind": "sparsemixer"})


def test_no_threshold_is_refused(tiny):
    with pytest.raises(ConfigError, match="set jitter"):
        tiny(top_k=2, router={"kind": "sparsemixer"})
