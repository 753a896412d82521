"""Softmax and sigmoid token choice against the papers' formulas, one token at a time."""

import math

import pytest
import torch
from torch import nn

from moestro.errors import ConfigError
from moestro.moe.routers import build_router


def router_of(tiny, top_k=2, num_experts=8, **router):
    # A wide initial scale, so that scores differ clearly between the experts.
    cfg = tiny(top_k=top_k, num_experts=num_experts, router=router, init_scale=8.0)
    return build_router(cfg)


def softmax(values):
    exps = [math.exp(value - max(values)) for value in values]
    return [value / sum(exps) for value in exps]


def best(scores, count):
    return sorted(range(len(scores)), key=lambda e: -scores[e])[:count]


def choices(routing):
    """[(experts, weights)] by token, as plain numbers."""
    experts_TK = routing.experts_TK().tolist()
    weights_TK = routing.weights_R.view(-1, routing.top_k).tolist()
    return list(zip(experts_TK, weights_TK, strict=True))


def logits_by_hand(router, x_TD):
    weight = router.weight.detach().double()
    return [[float(w @ x) for w in weight] for x in x_TD.detach().double()]


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("renormalize", [None, False, True])
def test_softmax(tiny, top_k, renormalize):
    if renormalize and top_k == 1:
        pytest.skip("refused by the settings")
    router = router_of(tiny, top_k, renormalize=renormalize)
    x_TD = torch.randn(9, 8)
    routing = router(x_TD)
    by_hand = logits_by_hand(router, x_TD)
    assert routing.tokens_R.tolist() == [t for t in range(9) for _ in range(top_k)]
    for token, (experts, weights) in enumerate(choices(routing)):
        probs = softmax(by_hand[token])
        assert experts == best(probs, top_k)
        divided = renormalize or (renormalize is None and top_k > 1)
        total = sum(probs[e] for e in experts) if divided else 1.0
        assert weights == pytest.approx([probs[e] / total for e in experts], rel=1e-5)
        assert routing.probs_TE[token].tolist() == pytest.approx(probs, rel=1e-5)
        assert routing.logits_TE[token].tolist() == pytest.approx(by_hand[token], rel=1e-4)


def test_switch_keeps_its_gate_and_learns_through_it(tiny):
    router = router_of(tiny, top_k=1)
    routing = router(torch.randn(9, 8))
    assert ((routing.weights_R > 0) & (routing.weights_R < 1)).all()
    assert routing.weights_R.detach().tolist() == pytest.approx(
        routing.probs_TE.max(-1).values.tolist()
    )
    routing.weights_R.sum().backward()
    assert router.weight.grad.abs().max() > 1e-3


def test_mixtrals_softmax_over_the_top_k_is_renormalised_softmax(tiny):
    router = router_of(tiny, top_k=3, renormalize=True)
    x_TD = torch.randn(50, 8)
    routing = router(x_TD)
    top_TK, experts_TK = (x_TD @ router.weight.T).topk(3)
    assert torch.equal(routing.experts_TK(), experts_TK)
    torch.testing.assert_close(routing.weights_R.view(-1, 3), top_TK.softmax(-1))


@pytest.mark.parametrize("renormalize", [None, False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_sigmoid(tiny, top_k, renormalize):
    router = router_of(tiny, top_k, kind="sigmoid", renormalize=renormalize, scale=2.5)
    x_TD = torch.randn(9, 8)
    routing = router(x_TD)
    for token, (experts, weights) in enumerate(choices(routing)):
        scores = [1 / (1 + math.exp(-h)) for h in logits_by_hand(router, x_TD)[token]]
        assert experts == best(scores, top_k)
        divided = renormalize or (renormalize is None and top_k > 1)
        total = sum(scores[e] for e in experts) if divided else 1.0
        assert weights == pytest.approx([2.5 * scores[e] / total for e in experts], rel=1e-5)
        shares = [score / sum(scores) for score in scores]
        assert routing.probs_TE[token].tolist() == pytest.approx(shares, rel=1e-5)


@pytest.mark.parametrize("level", [-30.0, -60.0, -95.0])
def test_sigmoid_weights_sum_to_the_scale_however_small_the_scores(tiny, level):
    """A router that pushes all its logits down must not be able to switch its layer off."""
    router = router_of(tiny, kind="sigmoid", scale=2.5)
    x_TD = torch.ones(3, 8)
    with torch.no_grad():
        router.weight.mul_(0.1).add_(level / 8)
    weights_TK = router(x_TD).weights_R.view(3, 2)
    assert weights_TK.sum(-1).tolist() == pytest.approx([2.5] * 3, rel=1e-4)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_bias_chooses_and_never_weighs(tiny, kind):
    router = router_of(tiny, kind=kind, selection_bias=True, renormalize=False)
    x_TD = torch.randn(9, 8)
    plain = router(x_TD)
    router.bias[5] = 10.0
    pushed = router(x_TD)
    assert (pushed.experts_TK()[:, 0] == 5).all()
    assert not torch.equal(pushed.experts_R, plain.experts_R)
    scores_TE = plain.logits_TE.sigmoid() if kind == "sigmoid" else plain.probs_TE
    torch.testing.assert_close(pushed.weights_R, scores_TE.gather(1, pushed.experts_TK()).flatten())
    assert torch.equal(pushed.probs_TE, plain.probs_TE)
    assert not any(name == "bias" for name, _ in router.named_parameters())
    assert "bias" in router.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_bias_stays_fp32(tiny, dtype):
    router = router_of(tiny, kind="sigmoid", selection_bias=True)
    router.bias.fill_(1e-3 / 3)
    holder = nn.Sequential(router).to(dtype)
    assert router.bias.dtype == torch.float32
    assert torch.equal(router.bias, torch.full((8,), 1e-3 / 3))
    assert {p.dtype for p in holder.parameters()} == {dtype}
    holder.load_state_dict(holder.state_dict())
    assert router.bias.dtype == torch.float32


def test_half_and_bfloat16_methods_keep_the_bias(tiny):
    for convert in (nn.Module.half, nn.Module.bfloat16):
        router = router_of(tiny, kind="softmax", selection_bias=True)
        convert(router)
        assert router.bias.dtype == torch.float32


@pytest.mark.parametrize("group_score", ["max", "top2"])
@pytest.mark.parametrize("selection_bias", [False, True])
def test_groups(tiny, group_score, selection_bias):
    router = router_of(
        tiny,
        top_k=3,
        num_experts=12,
        kind="sigmoid",
        num_groups=4,
        top_groups=2,
        group_score=group_score,
        scale=2.5,
        selection_bias=selection_bias,
    )
    bias = [0.0] * 12
    if selection_bias:
        router.bias.copy_(torch.randn(12) / 2)
        bias = router.bias.tolist()
    x_TD = torch.randn(40, 8)
    for token, (experts, weights) in enumerate(choices(router(x_TD))):
        scores = [1 / (1 + math.exp(-h)) for h in logits_by_hand(router, x_TD)[token]]
        chosen_by = [score + b for score, b in zip(scores, bias, strict=True)]
        groups = [chosen_by[3 * g : 3 * g + 3] for g in range(4)]
        count = 1 if group_score == "max" else 2
        allowed = best([sum(sorted(group)[-count:]) for group in groups], 2)
        open_to = [s if e // 3 in allowed else -math.inf for e, s in enumerate(chosen_by)]
        assert experts == best(open_to, 3)
        total = sum(scores[e] for e in experts)
        assert weights == pytest.approx([2.5 * scores[e] / total for e in experts], rel=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "noisy_top_k"])
def test_jitter_only_in_training(tiny, kind):
    router = router_of(tiny, kind=kind, jitter=0.3)
    if kind == "noisy_top_k":
        nn.init.normal_(router.weight)
    x_TD = torch.rand(200, 8) + 1
    clean_TE = x_TD @ router.weight.detach().T
    torch.testing.assert_close(router.eval()(x_TD).logits_TE.detach(), clean_TE)
    jittered_TE = router.train()(x_TD).logits_TE.detach()
    assert (jittered_TE - clean_TE).abs().max() > 1e-2
    # At most a factor 1 ± 0.3 on every input.
    bound_TE = 0.3 * x_TD @ router.weight.detach().abs().T + 1e-4
    assert ((jittered_TE - clean_TE).abs() <= bound_TE).all()


KINDS = ["softmax", "sigmoid", "noisy_top_k"]


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_in_a_bf16_model(tiny, kind):
    router = router_of(tiny, kind=kind).bfloat16()
    nn.init.normal_(router.weight)
    x_TD = torch.randn(9, 8, dtype=torch.bfloat16)
    routing = router.eval()(x_TD)
    assert routing.logits_TE.dtype == routing.probs_TE.dtype == torch.float32
    assert routing.weights_R.dtype == torch.float32
    expected_TE = x_TD.double() @ router.weight.double().T
    # Exact products of bf16 numbers, summed in fp32: no bf16 rounding (4e-3) anywhere.
    torch.testing.assert_close(routing.logits_TE.double(), expected_TE, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_under_autocast(tiny, kind, training):
    router = router_of(tiny, kind=kind).train(training)
    nn.init.normal_(router.weight)
    x_TD = torch.randn(9, 8)
    torch.manual_seed(1)
    plain = router(x_TD)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        under = router(x_TD)
    for left, right in zip(plain, under, strict=True):
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype
            assert torch.equal(left, right)


def test_float64_stays_for_gradcheck(tiny):
    router = router_of(tiny).double()
    assert router(torch.randn(3, 8, dtype=torch.float64)).weights_R.dtype == torch.float64


@pytest.mark.parametrize(("scale", "std"), [(1.0, 0.1), (0.1, 0.1 / 10**0.5)])
def test_initial_scale(tiny, scale, std):
    """Switch: truncated normal, σ = sqrt(s / fan-in); cut at 2σ it keeps 0.88 σ."""
    weight = build_router(tiny(dim=100, num_experts=100, init_scale=scale)).weight
    assert weight.std().item() == pytest.approx(0.88 * std, rel=0.05)
    assert weight.abs().max() <= 2 * std


@pytest.mark.parametrize("kind", [*KINDS, "sparsemixer", "expert_choice"])
@pytest.mark.filterwarnings("ignore:expert_choice")
def test_the_learned_bias_joins_the_logits(tiny, kind):
    jitter = 0.01 if kind == "sparsemixer" else 0.0
    router = router_of(tiny, kind=kind, bias=True, jitter=jitter).bfloat16().eval()
    assert not router.logit_bias.any()
    assert "logit_bias" in dict(router.named_parameters())
    nn.init.normal_(router.logit_bias)
    x_TD = torch.randn(9, 8, dtype=torch.bfloat16)
    routing = router(x_TD)
    expected_TE = x_TD.double() @ router.weight.double().T + router.logit_bias.double()
    # fp32 in a bf16 model, like the product.
    torch.testing.assert_close(routing.logits_TE.double(), expected_TE, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(routing.probs_TE.sum(-1), torch.ones(9))
    routing.logits_TE.sum().backward()
    assert router.logit_bias.grad.tolist() == [9.0] * 8
    router.reset_parameters()
    assert not router.logit_bias.any()


def test_learned_and_selection_bias_are_two_things(tiny):
    router = router_of(tiny, kind="sigmoid", bias=True, selection_bias=True)
    assert set(router.state_dict()) == {"weight", "logit_bias", "bias"}
    plain = router(torch.zeros(1, 8))
    nn.init.constant_(router.logit_bias, 1.0)
    assert torch.equal(plain.logits_TE + 1, router(torch.zeros(1, 8)).logits_TE)


def test_a_router_without_logits_refuses_a_bias(tiny):
    with pytest.raises(ConfigError, match="no logits to add a bias to; leave bias off"):
        tiny(router={"kind": "hash", "bias": True})


def test_sparsemixers_jitter_never_moves_the_input(tiny):
    router = router_of(tiny, kind="sparsemixer", jitter=0.3).train()
    x_TD = torch.randn(50, 8)
    assert torch.equal(router(x_TD).logits_TE, router.eval()(x_TD).logits_TE)
