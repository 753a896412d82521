"""Each balance loss against its formula in plain loops, and at the ends of its range."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.errors import ShapeError
from moestro.moe import balance
from moestro.moe.routers import build_router
from moestro.moe.routing import Routing


def routing_of(logits_TE, top_k, valid_T=None):
    probs_TE = logits_TE.softmax(-1)
    weights_TK, experts_TK = probs_TE.topk(top_k)
    tokens_R = torch.arange(len(logits_TE)).repeat_interleave(top_k)
    return Routing(
        tokens_R,
        experts_TK.flatten(),
        weights_TK.flatten(),
        logits_TE,
        probs_TE,
        top_k,
        valid_T,
        load_TE=logits_TE.sigmoid(),
    )


def random_routing(num_tokens=12, num_experts=5, top_k=2, padding=False, dtype=torch.float64):
    valid_T = torch.rand(num_tokens) < 0.6 if padding else None
    return routing_of(torch.randn(num_tokens, num_experts, dtype=dtype), top_k, valid_T)


def real_tokens(routing):
    if routing.valid_T is None:
        return list(range(routing.num_tokens))
    return routing.valid_T.nonzero().flatten().tolist()


def switch_by_loop(routing, tokens):
    experts_TK, probs_TE = routing.experts_TK().tolist(), routing.probs_TE.tolist()
    total = 0.0
    for expert in range(routing.num_experts):
        f = sum(experts_TK[t].count(expert) for t in tokens) / (routing.top_k * len(tokens))
        p = sum(probs_TE[t][expert] for t in tokens) / len(tokens)
        total += f * p
    return routing.num_experts * total


def cv_squared(values):
    return float(np.var(values) / np.mean(values) ** 2)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_switch_loss_by_loop(top_k, padding):
    routing = random_routing(top_k=top_k, padding=padding)
    expected = switch_by_loop(routing, real_tokens(routing))
    assert balance.switch_loss(routing).item() == pytest.approx(expected)


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (4, 2), (8, 3), (6, 6)])
def test_switch_loss_is_one_at_uniform(num_experts, top_k):
    experts_TK = (torch.arange(num_experts)[:, None] + torch.arange(top_k)) % num_experts
    uniform_TE = torch.full((num_experts, num_experts), 1 / num_experts)
    routing = routing_of(0 * uniform_TE, top_k)._replace(experts_R=experts_TK.flatten())
    assert balance.switch_loss(routing).item() == pytest.approx(1)


def test_switch_loss_is_e_at_collapse():
    logits_TE = torch.zeros(9, 6)
    logits_TE[:, 4] = 50
    assert balance.switch_loss(routing_of(logits_TE, 1)).item() == pytest.approx(6)


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=8), st.integers(1, 3))
def test_switch_loss_is_smallest_at_uniform(shares, top_k):
    """Where the choices follow the probabilities it is E · Σ p²: 1 at uniform, above elsewhere."""
    share_E = torch.tensor(shares, dtype=torch.float64)
    share_E /= share_E.sum()
    routing = routing_of(share_E.log().expand(4, -1), min(top_k, len(shares)))
    loss = balance.switch_loss(routing, share_E * 1000).item()
    assert loss >= 1 - 1e-12
    assert loss == pytest.approx(len(shares) * float((share_E**2).sum()))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_transformers_loss_is_k_times_ours(top_k):
    """E · Σ_e P_e · Σ_k mean_t 1[choice k is e]: K at perfect balance."""
    routing = random_routing(top_k=top_k)
    one_hot_TKE = torch.nn.functional.one_hot(routing.experts_TK(), 5).double()
    theirs = 5 * (one_hot_TKE.mean(0) * routing.probs_TE.mean(0)).sum()
    assert theirs.item() == pytest.approx(top_k * balance.switch_loss(routing).item())


def test_global_counts_replace_the_micro_batches_own():
    parts = [random_routing(), random_routing()]
    counts_E = parts[0].counts_E() + parts[1].counts_E()
    mean = sum(balance.switch_loss(part, counts_E).item() for part in parts) / 2
    whole = routing_of(torch.cat([part.logits_TE for part in parts]), 2)
    assert mean == pytest.approx(balance.switch_loss(whole).item())
    assert mean != pytest.approx(sum(balance.switch_loss(part).item() for part in parts) / 2)


def test_switch_gradient_flows_through_the_probabilities_alone():
    logits_TE = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    routing = routing_of(logits_TE, 2)
    (grad_TE,) = torch.autograd.grad(balance.switch_loss(routing), logits_TE)
    f_E = torch.bincount(routing.experts_R, minlength=4).double() / 14
    p_TE = routing.probs_TE.detach()
    expected_TE = 4 / 7 * p_TE * (f_E - (p_TE * f_E).sum(-1, keepdim=True))
    torch.testing.assert_close(grad_TE, expected_TE)


@pytest.mark.parametrize("padding", [False, True])
def test_sequence_loss_by_loop(padding):
    routing = random_routing(num_tokens=12, padding=padding)
    real = set(real_tokens(routing))
    losses = []
    for start in (0, 4, 8):
        tokens = sorted(real & set(range(start, start + 4)))
        if tokens:
            losses.append(switch_by_loop(routing, tokens))
    expected = sum(losses) / len(losses)
    assert balance.sequence_loss(routing, 3).item() == pytest.approx(expected)


def test_a_sequence_of_padding_alone_does_not_count():
    routing = random_routing(num_tokens=8)
    valid_T = torch.arange(8) < 4
    alone = routing_of(routing.logits_TE[:4], 2)
    expected = balance.switch_loss(alone).item()
    padded = routing._replace(valid_T=valid_T)
    assert balance.sequence_loss(padded, 2).item() == pytest.approx(expected)


@pytest.mark.parametrize("num_sequences", [0, 5, -1])
def test_sequences_must_fit(num_sequences):
    with pytest.raises(ShapeError, match="12 tokens"):
        balance.sequence_loss(random_routing(), num_sequences)


@pytest.mark.parametrize("padding", [False, True])
def test_importance_and_load_by_numpy(padding):
    routing = random_routing(padding=padding)
    tokens = real_tokens(routing)
    importance, load = np.zeros(5), np.zeros(5)
    for token in tokens:
        load += routing.load_TE[token].numpy()
        for k, expert in enumerate(routing.experts_TK()[token].tolist()):
            importance[expert] += float(routing.weights_R[2 * token + k])
    assert balance.importance_loss(routing).item() == pytest.approx(cv_squared(importance))
    assert balance.load_loss(routing).item() == pytest.approx(cv_squared(load))


def test_importance_and_load_are_zero_at_balance():
    routing = routing_of(torch.zeros(4, 4), 1)._replace(experts_R=torch.arange(4))
    assert balance.importance_loss(routing).item() == pytest.approx(0, abs=1e-12)
    assert balance.load_loss(routing).item() == pytest.approx(0, abs=1e-12)


def test_load_needs_noise():
    with pytest.raises(ShapeError, match="noisy_top_k"):
        balance.load_loss(random_routing()._replace(load_TE=None))


@pytest.mark.parametrize("padding", [False, True])
def test_z_loss_by_loop(padding):
    routing = random_routing(padding=padding)
    tokens = real_tokens(routing)
    squares = [
        math.log(sum(math.exp(h) for h in routing.logits_TE[t].tolist())) ** 2 for t in tokens
    ]
    assert balance.z_loss(routing).item() == pytest.approx(sum(squares) / len(tokens))


def test_z_loss_in_closed_form():
    assert balance.z_loss(routing_of(torch.zeros(3, 8), 1)).item() == pytest.approx(
        math.log(8) ** 2
    )


LOSSES = {
    "switch": balance.switch_loss,
    "sequence": lambda routing: balance.sequence_loss(routing, 3),
    "importance": balance.importance_loss,
    "load": balance.load_loss,
    "z": balance.z_loss,
}


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_of_losses(name, padding):
    valid_T = torch.rand(6) < 0.6 if padding else None
    logits_TE = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda logits: LOSSES[name](routing_of(logits, 2, valid_T)), logits_TE
    )


@pytest.mark.parametrize("name", LOSSES)
def test_what_padding_holds_does_not_matter(name):
    logits_TE = torch.randn(12, 5, dtype=torch.float64)
    valid_T = torch.arange(12) % 3 > 0
    first = LOSSES[name](routing_of(logits_TE, 2, valid_T))
    logits_TE = torch.where(valid_T[:, None], logits_TE, 7 * torch.randn(12, 5).double())
    logits_TE.requires_grad_()
    second = LOSSES[name](routing_of(logits_TE, 2, valid_T))
    assert torch.equal(first, second.detach())
    (grad_TE,) = torch.autograd.grad(second, logits_TE)
    assert not grad_TE[~valid_T].any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("num_tokens", [0, 6])
def test_no_real_token_gives_a_finite_loss_without_gradient(name, num_tokens):
    logits_TE = torch.randn(num_tokens, 4, requires_grad=True)
    valid_T = torch.zeros(num_tokens, dtype=torch.bool)
    loss = LOSSES[name](routing_of(logits_TE, 2, valid_T))
    (grad_TE,) = torch.autograd.grad(loss, logits_TE)
    assert loss.item() == 0
    assert not grad_TE.any()


def test_bias_moves_by_the_sign_of_the_violation_and_its_mean_stays():
    before = [0.0, 0.5, -0.5, 0.25]
    bias_E = torch.tensor(before)
    balance.update_bias(bias_E, torch.tensor([10, 0, 4, 2]), 1e-3)
    wanted = [b + 1e-3 * (s - 0.25) for b, s in zip(before, [-1, 1, 0, 1], strict=True)]
    assert bias_E.tolist() == pytest.approx(wanted)


def test_a_dead_expert_rises_over_the_others_and_carries_none_away():
    bias_E, counts_E = torch.zeros(64), torch.full((64,), 102)
    counts_E[0] = 0
    for _ in range(5000):
        balance.update_bias(bias_E, counts_E, 1e-3)
    assert abs(bias_E.mean().item()) < 1e-4
    assert (bias_E[0] - bias_E[1:]).tolist() == pytest.approx([10.0] * 63, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float64])
def test_bias_compares_counts_exactly(dtype):
    """2²⁴ + 1 is no fp32 number, and 1001 no bf16 one."""
    bias_E = torch.zeros(3)
    balance.update_bias(bias_E, torch.tensor([2**24 + 1, 2**24 - 1, 2**24], dtype=dtype), 1.0)
    assert bias_E.tolist() == [-1, 1, 0]


def test_a_bias_of_16_bits_is_refused():
    with pytest.raises(ShapeError, match=r"bfloat16.*float32"):
        balance.update_bias(torch.zeros(4, dtype=torch.bfloat16), torch.arange(4), 1e-3)


def test_bias_stays_at_balance():
    bias_E = torch.zeros(4)
    balance.update_bias(bias_E, torch.full((4,), 7), 1e-3)
    assert not bias_E.any()


LOSSES = {
    "switch": balance.switch_loss,
    "sequence": lambda routing: balance.sequence_loss(routing, 3),
    "importance": balance.importance_loss,
    "load": balance.load_loss,
    "z": balance.z_loss,
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_what_padding_holds_is_in_no_loss_and_no_gradient(loss, poison):
    clean = random_routing()._replace(valid_T=torch.arange(12) < 8)

    def value_and_gradients(fill):
        held = {}
        for name in ("logits_TE", "probs_TE", "weights_R", "load_TE"):
            real = clean.valid_T[clean.tokens_R] if name == "weights_R" else clean.valid_T
            tensor = getattr(clean, name).clone()
            tensor[~real] = fill
            held[name] = tensor.requires_grad_()
        value = loss(clean._replace(**held))
        return value, *torch.autograd.grad(value, list(held.values()), materialize_grads=True)

    found, wanted = value_and_gradients(poison), value_and_gradients(0.25)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert any(gradient.any() for gradient in found[1:])


def test_repeated_updates_balance_a_skewed_router(tiny):
    router = build_router(tiny(router={"kind": "sigmoid", "selection_bias": True}))
    x_TD = torch.randn(2000, 8)
    x_TD[:, 0] = 1
    with torch.no_grad():
        router.weight[:, 0] = torch.tensor([2.0, 0.5, -0.5, -2.0])
    before_E = router(x_TD).counts_E()
    assert before_E.max() > 1.6 * before_E.float().mean()
    for _ in range(400):
        balance.update_bias(router.bias, router(x_TD).counts_E(), 5e-3)
    after_E = router(x_TD).counts_E()
    assert after_E.max() < 1.1 * after_E.float().mean()
