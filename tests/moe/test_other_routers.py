"""Noisy top-k, expert choice and hash routing against their definitions."""

import math
import warnings

import pytest
import torch
from torch import nn

from moestro.errors import ShapeError
from moestro.moe.routers import build_router


def noisy_router(tiny, num_experts=5, top_k=2, **router):
    settings = {"kind": "noisy_top_k", **router}
    made = build_router(tiny(num_experts=num_experts, top_k=top_k, router=settings))
    nn.init.normal_(made.weight)
    nn.init.normal_(made.noise)
    return made


def expert_choice_router(tiny, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_router(tiny(router={"kind": "expert_choice"}, init_scale=8.0, **changes))


def test_noisy_starts_with_all_experts_alike(tiny):
    router = build_router(tiny(router={"kind": "noisy_top_k"}))
    assert not any(parameter.any() for parameter in router.parameters())
    routing = router.eval()(torch.randn(5, 8))
    assert torch.equal(routing.probs_TE, torch.full((5, 4), 0.25))


def test_noise_only_in_training(tiny):
    router = noisy_router(tiny)
    x_TD = torch.randn(30, 8)
    quiet, again = router.eval()(x_TD), router(x_TD)
    assert torch.equal(quiet.weights_R, again.weights_R)
    assert torch.equal(quiet.experts_TK(), (x_TD @ router.weight.T).topk(2).indices)
    assert quiet.load_TE is None
    loud, louder = router.train()(x_TD), router(x_TD)
    assert not torch.equal(loud.weights_R, louder.weights_R)
    assert torch.equal(loud.logits_TE, quiet.logits_TE), "logits are before the noise"


def test_noisy_weights_are_a_softmax_over_the_kept(tiny):
    router = noisy_router(tiny).eval()
    x_TD = torch.randn(30, 8)
    top_TK = (x_TD @ router.weight.T).topk(2).values
    torch.testing.assert_close(router(x_TD).weights_R.view(-1, 2), top_TK.softmax(-1))


def test_noise_has_the_papers_width(tiny):
    """Over many equal tokens the noisy logits have standard deviation softplus(x · W_n)."""
    router = noisy_router(tiny)
    x_TD = torch.randn(1, 8).expand(40_000, 8)
    routing = router.train()(x_TD)
    # Probabilities give the noisy logits back, up to one number per token.
    noisy_TE = routing.probs_TE.detach().double().log()
    spread_EE = (noisy_TE[:, :, None] - noisy_TE[:, None, :]).var(0)
    std_E = nn.functional.softplus(x_TD[0] @ router.noise.detach().T).double()
    expected_EE = std_E[:, None] ** 2 + std_E[None, :] ** 2
    expected_EE.fill_diagonal_(0)
    torch.testing.assert_close(spread_EE, expected_EE, rtol=0.06, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 4, 5])
def test_load_by_its_scalar_formula(tiny, top_k):
    """Shazeer 2017 eq. 8-9 one (token, expert) at a time, the noise drawn again."""
    router = noisy_router(tiny, top_k=top_k, renormalize=False).double().train()
    x_TD = torch.randn(20, 8, dtype=torch.float64)
    torch.manual_seed(7)
    load_TE = router(x_TD).load_TE.tolist()
    torch.manual_seed(7)
    noise_TE = torch.randn(20, 5, dtype=torch.float64).tolist()
    for token in range(20):
        clean = (router.weight @ x_TD[token]).tolist()
        std = nn.functional.softplus(router.noise @ x_TD[token]).tolist()
        noisy = [c + n * s for c, n, s in zip(clean, noise_TE[token], std, strict=True)]
        for expert in range(5):
            others = sorted((noisy[e] for e in range(5) if e != expert), reverse=True)
            expected = 1.0
            if top_k < 5:
                gap = (clean[expert] - others[top_k - 1]) / std[expert]
                expected = 0.5 * (1 + math.erf(gap / math.sqrt(2)))
            assert load_TE[token][expert] == pytest.approx(expected, abs=1e-6)


def test_mean_load_is_the_frequency_of_being_picked(tiny):
    """The law of total probability: no formula of the paper is used here."""
    router = noisy_router(tiny).train()
    num_tokens = 40_000
    routing = router(torch.randn(1, 8).expand(num_tokens, 8))
    frequency_E = routing.counts_E() / num_tokens
    torch.testing.assert_close(routing.load_TE.detach().mean(0), frequency_E, rtol=0, atol=0.01)


def test_load_reaches_both_matrices(tiny):
    router = noisy_router(tiny).train()
    router(torch.randn(9, 8)).load_TE[:, 0].sum().backward()
    assert router.weight.grad.abs().max() > 0
    assert router.noise.grad.abs().max() > 0


def test_expert_choice_warns_that_it_sees_the_future(tiny):
    with pytest.warns(UserWarning, match="not causal"):
        build_router(tiny(router={"kind": "expert_choice"}))


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(12, 4, 2), (7, 4, 2), (1, 4, 1)])
def test_expert_choice_takes_each_experts_best_tokens(tiny, num_tokens, num_experts, top_k):
    router = expert_choice_router(tiny, num_experts=num_experts, top_k=top_k)
    x_TD = torch.randn(num_tokens, 8)
    routing = router(x_TD)
    rows = min(math.ceil(num_tokens * top_k / num_experts), num_tokens)
    probs_TE = (x_TD.double() @ router.weight.detach().double().T).softmax(-1)
    assert routing.counts_E().tolist() == [rows] * num_experts
    for expert in range(num_experts):
        mine_R = routing.experts_R == expert
        order = sorted(range(num_tokens), key=lambda t: -float(probs_TE[t, expert]))
        assert set(routing.tokens_R[mine_R].tolist()) == set(order[:rows])
        for token, weight in zip(
            routing.tokens_R[mine_R].tolist(), routing.weights_R[mine_R].tolist(), strict=True
        ):
            assert weight == pytest.approx(float(probs_TE[token, expert]), rel=1e-5)
    assert routing.top_k == 0


@pytest.mark.parametrize("num_real", [0, 1, 5, 12])
def test_expert_choice_never_takes_padding(tiny, num_real):
    router = expert_choice_router(tiny)
    x_TD = torch.randn(12, 8)
    valid_T = torch.zeros(12, dtype=torch.bool)
    valid_T[torch.randperm(12)[:num_real]] = True
    routing = router(x_TD, valid_T=valid_T)
    assert valid_T[routing.tokens_R].all()
    assert routing.counts_E().tolist() == [math.ceil(num_real / 2)] * 4
    # Padding changes nothing for the real tokens.
    alone = router(x_TD[valid_T])
    assert torch.equal(valid_T.nonzero().flatten()[alone.tokens_R], routing.tokens_R)
    torch.testing.assert_close(alone.weights_R, routing.weights_R)


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (4, 2), (5, 2), (7, 3), (8, 8)])
def test_hash(tiny, num_experts, top_k):
    made = build_router(tiny(num_experts=num_experts, top_k=top_k, router={"kind": "hash"}))
    ids_T = torch.cat([torch.arange(500), torch.tensor([2**31 - 1])])
    routing = made(torch.randn(501, 8), ids_T)
    again = made(torch.randn(501, 8), ids_T)
    assert torch.equal(routing.experts_R, again.experts_R), "depends on more than the id"
    assert all(len(set(experts)) == top_k for experts in routing.experts_TK().tolist())
    assert routing.experts_R.min() >= 0
    assert routing.experts_R.max() < num_experts
    assert routing.weights_R.tolist() == pytest.approx([1 / top_k] * 501 * top_k)
    torch.testing.assert_close(routing.probs_TE.sum(-1), torch.ones(501))
    # 501 ids over the experts: no expert far from its share.
    share_E = routing.counts_E() / (501 * top_k)
    assert (share_E * num_experts - 1).abs().max() < 0.35
    assert not list(made.parameters())


def test_hash_needs_ids(tiny):
    with pytest.raises(ShapeError, match="token_ids"):
        build_router(tiny(router={"kind": "hash"}))(torch.randn(3, 8))
