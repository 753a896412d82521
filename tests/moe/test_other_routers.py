"""Noisy top-k, expert choice and hash routing against their definitions."""

import math
import warnings

import pytest
import torch
from torch import nn

from moestro.errors import ShapeError
from moestro.moe.routers import build_router


def noisy_router(tiny, num_experts=5, top_k=2, **router):
    made = build_router(tiny(num_experts=num_experts, top_k=top_k, router={
        "kind": "noisy_top_k", **router}))
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
def test_load_is_the_chance_of_being_picked_under_fresh_noise(tiny, top_k):
    """Shazeer 2017 eq. 8-9, computed one (token, expert) at a time from the noisy logits."""
    router = noisy_router(tiny, top_k=top_k, renormalize=False).double().train()
    x_TD = torch.randn(20, 8, dtype=torch.float64)
    routing = router(x_TD)
    std_TE = nn.functional.softplus(x_TD @ router.noise.T)
    log_probs_TE = routing.probs_TE.detach().log()
    # Redraw the same noise: the router takes one normal number per (token, expert).
    for token in range(20):
        clean = (router.weight @ x_TD[token]).tolist()
        shifted = log_probs_TE[token].tolist()
        for expert in range(5):
            others = sorted((shifted[e] for e in range(5) if e != expert), reverse=True)
            if top_k == 5:
                expected = 1.0
            else:
                # The threshold in the shifted scale; `offset` moves the clean logit there too.
                offset = shift_of(routing, token, torch.tensor(clean), std_TE[token])
                gap = clean[expert] - (others[top_k - 1] + offset)
                expected = 0.5 * (1 + math.erf(gap / float(std_TE[token, expert]) / math.sqrt(2)))
            actual = float(routing.load_TE[token, expert])
            assert actual == pytest.approx(expected, abs=1e-6)


def shift_of(routing, token, clean_E, std_E):
    """logsumexp of the noisy logits of a token, found by drawing the noise again."""
    torch.manual_seed(0)
    raise NotImplementedError
