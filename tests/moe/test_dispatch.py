"""Grouping, combining and capacity: properties over random routings, and slow loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.errors import ShapeError
from moestro.moe.dispatch import capacity, combine, dispatch, limit, make_plan
from moestro.moe.routing import Routing


@st.composite
def routings(draw, token_choice=None, dtype=torch.float64):
    """Any routing: token choice or a free list, with padding and drops or without."""
    num_tokens, num_experts = draw(st.integers(0, 9)), draw(st.integers(1, 6))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    if draw(st.booleans()) if token_choice is None else token_choice:
        top_k = draw(st.integers(1, num_experts))
        experts_R = torch.rand(num_tokens, num_experts).argsort(-1)[:, :top_k].flatten()
        tokens_R = torch.arange(num_tokens).repeat_interleave(top_k)
    else:
        top_k = 0
        pairs_TE = torch.rand(num_tokens, num_experts) < draw(st.floats(0, 1))
        experts_R, tokens_R = pairs_TE.t().nonzero().unbind(1)
    valid_T = torch.rand(num_tokens) < 0.7 if draw(st.booleans()) else None
    probs_TE = torch.rand(num_tokens, num_experts, dtype=dtype).softmax(-1)
    weights_R = torch.rand(len(tokens_R), dtype=dtype)
    routing = Routing(tokens_R, experts_R, weights_R, probs_TE.log(), probs_TE, top_k, valid_T)
    if draw(st.booleans()):
        routing = routing._replace(kept_R=torch.rand(len(tokens_R)) < 0.6)
    return routing


def kept(routing):
    return torch.ones_like(routing.experts_R) > 0 if routing.kept_R is None else routing.kept_R


MULTIPLES = st.sampled_from([1, 2, 8, 128])


def plan_of(routing, multiple):
    """A plan whose groups are padded to a multiple; 1 asks for no padding at all."""
    if multiple == 1:
        return make_plan(routing)
    return make_plan(routing, lambda counts_E: -(-counts_E // multiple) * multiple)


def owners(plan):
    """The expert of each group, in the order of the rows."""
    if plan.experts_E is None:
        return list(range(len(plan.offsets_E)))
    return plan.experts_E.tolist()


@given(routings(), MULTIPLES)
def test_every_kept_assignment_has_exactly_one_row(routing, multiple):
    plan = plan_of(routing, multiple)
    x_TD = torch.arange(1.0, routing.num_tokens + 1)[:, None]
    rows = dispatch(x_TD, plan)[:, 0].tolist()
    kept_R = kept(routing)
    starts = [0, *plan.offsets_E.tolist()]
    order = owners(plan)
    assert sorted(order) == list(range(routing.num_experts))
    for place, expert in enumerate(order):
        group = rows[starts[place] : starts[place + 1]]
        mine_R = kept_R & (routing.experts_R == expert)
        assert len(group) % multiple == 0
        # Real rows first, then zero rows up to the multiple.
        real = len(routing.tokens_R[mine_R])
        assert sorted(group[:real]) == sorted((routing.tokens_R[mine_R] + 1).tolist())
        assert not any(group[real:])
        assert plan.counts_E[expert] == real
        assert len(group) < real + multiple
    assert not any(rows[starts[-1] :])
    assert plan.complete is False or bool(kept_R.all())


@given(routings(), MULTIPLES)
def test_combine_is_a_weighted_sum(routing, multiple):
    """Against one assignment at a time, with each expert a different multiplication."""
    plan = plan_of(routing, multiple)
    x_TD = torch.randn(routing.num_tokens, 3, dtype=torch.float64)
    rows_RD = dispatch(x_TD, plan)
    factors_E = torch.arange(2.0, 2 + routing.num_experts, dtype=torch.float64)
    starts = [0, *plan.offsets_E[:-1].tolist()]
    for expert, start, end in zip(owners(plan), starts, plan.offsets_E.tolist(), strict=True):
        rows_RD[start:end] *= factors_E[expert]
    y_TD = combine(rows_RD, routing.weights_R, plan)
    expected_TD = torch.zeros_like(x_TD)
    for n in kept(routing).nonzero().flatten().tolist():
        token, expert = int(routing.tokens_R[n]), int(routing.experts_R[n])
        expected_TD[token] += routing.weights_R[n] * factors_E[expert] * x_TD[token]
    torch.testing.assert_close(y_TD, expected_TD)


@given(routings(), MULTIPLES)
def test_identity_experts_with_weights_that_sum_to_one_give_identity(routing, multiple):
    sums_T = torch.zeros(routing.num_tokens, dtype=torch.float64)
    sums_T.index_add_(0, routing.tokens_R, routing.weights_R * kept(routing))
    weights_R = routing.weights_R / sums_T[routing.tokens_R].clamp(min=1e-9)
    x_TD = torch.randn(routing.num_tokens, 3, dtype=torch.float64)
    plan = plan_of(routing, multiple)
    y_TD = combine(dispatch(x_TD, plan), weights_R, plan)
    reached_T = sums_T > 0
    torch.testing.assert_close(y_TD[reached_T], x_TD[reached_T])
    assert not y_TD[~reached_T].any()


@given(routings(), st.integers(0, 10**6), MULTIPLES)
def test_relabelling_experts_changes_nothing(routing, seed, multiple):
    torch.manual_seed(seed)
    names_E = torch.randperm(routing.num_experts)
    renamed = routing._replace(experts_R=names_E[routing.experts_R])
    x_TD = torch.randn(routing.num_tokens, 3, dtype=torch.float64)
    first, second = plan_of(routing, multiple), plan_of(renamed, multiple)
    assert torch.equal(first.counts_E, second.counts_E[names_E])
    # Token choice sums in the order of the choices, a free list in the order of the list.
    assert torch.equal(
        combine(dispatch(x_TD, first), routing.weights_R, first),
        combine(dispatch(x_TD, second), renamed.weights_R, second),
    )


@given(routings())
def test_gradients_through_dispatch_and_combine(routing):
    plan = plan_of(routing, 2)
    x_TD = torch.randn(routing.num_tokens, 2, dtype=torch.float64, requires_grad=True)
    weights_R = routing.weights_R.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: combine(dispatch(x, plan).sin(), w, plan), (x_TD, weights_R)
    )


@given(routings(), st.sampled_from([8, 128]))
def test_padding_rows_change_nothing(routing, multiple):
    x_TD = torch.randn(routing.num_tokens, 3, dtype=torch.float64)
    grad_TD = torch.randn_like(x_TD)
    results = []
    for rows in (1, multiple):
        plan = plan_of(routing, rows)
        leaf_TD = x_TD.clone().requires_grad_()
        weights_R = routing.weights_R.clone().requires_grad_()
        # cos(0) = 1: what lands in padding rows must not come back.
        y_TD = combine(dispatch(leaf_TD, plan).cos(), weights_R, plan)
        y_TD.backward(grad_TD)
        results.append((y_TD.detach(), leaf_TD.grad, weights_R.grad))
    for left, right in zip(*results, strict=True):
        # bitwise up to the vectorised dot product, which may sum in another order
        torch.testing.assert_close(left, right, rtol=1e-13, atol=1e-13)


@given(routings(), st.sampled_from([2, 8]))
def test_rows_that_nobody_reads_get_no_gradient(routing, multiple):
    """Experts with a bias would learn from them."""
    plan = plan_of(routing, multiple)
    rows_RD = torch.randn(len(plan.tokens_R), 3, dtype=torch.float64, requires_grad=True)
    y_TD = combine(rows_RD, routing.weights_R, plan)
    (grad_RD,) = torch.autograd.grad(y_TD, rows_RD, torch.ones_like(y_TD))
    assert not grad_RD[plan.padding_P].any()
    read_R = torch.ones(len(rows_RD), dtype=torch.bool).index_fill_(0, plan.padding_P, False)
    assert read_R.sum() == kept(routing).sum()
    assert grad_RD[read_R].ne(0).all()


@given(routings())
def test_padded_counts_may_differ_between_experts(routing):
    x_TD = torch.randn(routing.num_tokens, 3, dtype=torch.float64)
    # Room for nobody at all cannot be filled: a padding row copies token 0, then is cleared.
    spare_E = torch.randint(0, 4, (routing.num_experts,)) * (routing.num_tokens > 0)
    plan, tight = make_plan(routing, lambda counts_E: counts_E + spare_E), make_plan(routing)
    assert torch.equal(plan.counts_E, tight.counts_E)
    room_E = tight.counts_E + spare_E
    assert torch.equal(plan.offsets_E, room_E[owners(plan)].cumsum(0))
    assert room_E[owners(plan)].diff().le(0).all()
    assert torch.equal(
        combine(dispatch(x_TD, plan), routing.weights_R, plan),
        combine(dispatch(x_TD, tight), routing.weights_R, tight),
    )


@given(routings(dtype=torch.float32))
def test_bf16_rows_are_summed_in_fp32(routing):
    x_TD = torch.randn(routing.num_tokens, 3).bfloat16()
    plan = make_plan(routing)
    rows_RD = dispatch(x_TD, plan)
    y_TD = combine(rows_RD, routing.weights_R, plan)
    assert rows_RD.dtype == y_TD.dtype == torch.bfloat16
    exact_TD = torch.zeros(routing.num_tokens, 3, dtype=torch.float64)
    weighted_RD = routing.weights_R.double()[:, None] * x_TD[routing.tokens_R].double()
    exact_TD.index_add_(0, routing.tokens_R, weighted_RD * kept(routing)[:, None])
    # One rounding at the end: half a unit in the last place of bf16.
    torch.testing.assert_close(y_TD.double(), exact_TD, rtol=2**-8, atol=1e-6)


def test_a_tokens_sum_does_not_depend_on_its_company():
    tokens_R = torch.arange(6).repeat_interleave(3)
    experts_R = torch.rand(6, 4).argsort(-1)[:, :3].flatten()
    weights_R, probs_TE = torch.rand(18), torch.rand(6, 4)
    outputs_TED = torch.randn(6, 4, 5)

    def y_of(first, last):
        part = slice(3 * first, 3 * last)
        routing = Routing(
            tokens_R[part] - first,
            experts_R[part],
            weights_R[part],
            probs_TE[first:last],
            probs_TE[first:last],
            3,
        )
        plan = make_plan(routing)
        order_R = experts_R[part].argsort(stable=True)
        rows_RD = outputs_TED[tokens_R[part], experts_R[part]][order_R]
        return combine(rows_RD, weights_R[part], plan)

    together_TD = y_of(0, 6)
    for token in range(6):
        assert torch.equal(y_of(token, token + 1)[0], together_TD[token])


@given(st.floats(0.01, 8), st.integers(0, 5000), st.integers(1, 8), st.integers(1, 64))
def test_capacity_formula(factor, num_tokens, top_k, num_experts):
    rows = capacity(factor, num_tokens, top_k, num_experts)
    share = factor * num_tokens * top_k / num_experts
    assert rows - 1 < share <= rows or share == pytest.approx(rows)
    assert isinstance(rows, int)


def keep_by_loop(routing, rows, priority, length=100):
    """The queue, one assignment at a time; each sequence of `length` tokens has its own room."""
    queue = list(range(len(routing.experts_R)))
    if priority == "arrival":
        queue.sort(key=lambda n: (n % routing.top_k, int(routing.tokens_R[n])))
    else:
        queue.sort(key=lambda n: -float(routing.weights_R[n]))
    room = {}
    keep = [False] * len(queue)
    for n in queue:
        real = routing.valid_T is None or bool(routing.valid_T[routing.tokens_R[n]])
        key = (int(routing.tokens_R[n]) // length, int(routing.experts_R[n]))
        if real and room.setdefault(key, rows) > 0:
            room[key] -= 1
            keep[n] = True
    return keep


@given(routings(token_choice=True), st.integers(0, 6), st.sampled_from(["arrival", "router"]))
def test_capacity_by_a_slow_loop(routing, rows, priority):
    limited = limit(routing._replace(kept_R=None), rows, priority)
    assert limited.kept_R.tolist() == keep_by_loop(routing, rows, priority)
    counts_E = torch.bincount(routing.experts_R[limited.kept_R], minlength=routing.num_experts)
    assert (counts_E <= rows).all()
    # What is dropped is what the experts had no room for, padding aside.
    wanted_E = limited.counts_E()
    assert limited.dropped() == (wanted_E - rows).clamp(min=0).sum()
    assert torch.equal(make_plan(limited).counts_E, counts_E)
    assert torch.equal(wanted_E, routing.counts_E()), "counts are before drops"


@given(
    st.integers(1, 4),
    st.integers(0, 6),
    st.integers(0, 4),
    st.sampled_from(["arrival", "router"]),
    st.booleans(),
)
def test_capacity_of_each_sequence_by_a_slow_loop(num_sequences, length, rows, priority, padded):
    torch.manual_seed(num_sequences + 10 * length)
    num_tokens = num_sequences * length
    probs_TE = torch.rand(num_tokens, 3, dtype=torch.float64).softmax(-1)
    weights_TK, experts_TK = probs_TE.topk(2)
    routing = Routing(
        torch.arange(num_tokens).repeat_interleave(2),
        experts_TK.flatten(),
        weights_TK.flatten(),
        probs_TE.log(),
        probs_TE,
        2,
        torch.rand(num_tokens) < 0.7 if padded else None,
    )
    limited = limit(routing, rows, priority, num_sequences)
    assert limited.kept_R.tolist() == keep_by_loop(routing, rows, priority, max(length, 1))


@pytest.mark.parametrize("num_sequences", [0, 2])
def test_tokens_that_do_not_split_into_sequences(num_sequences):
    probs_TE = torch.full((3, 2), 0.5)
    routing = Routing(torch.arange(3), torch.zeros(3).long(), torch.ones(3), probs_TE, probs_TE, 1)
    with pytest.raises(ShapeError, match=f"3 tokens do not split into {num_sequences} sequences"):
        limit(routing, 1, "arrival", num_sequences)


def test_arrival_priority_by_hand():
    """Expert 0 is token 0's second choice and token 1's first: the first choice goes first."""
    probs_TE = torch.full((2, 2), 0.5)
    experts_R = torch.tensor([1, 0, 0, 1])
    tokens_R = torch.tensor([0, 0, 1, 1])
    weights_R = torch.tensor([0.5, 0.5, 0.3, 0.7])
    routing = Routing(tokens_R, experts_R, weights_R, probs_TE, probs_TE, 2)
    assert limit(routing, 1, "arrival").kept_R.tolist() == [True, False, True, False]
    assert limit(routing, 1, "router").kept_R.tolist() == [False, True, False, True]
    assert math.isclose(capacity(1.0, 2, 2, 2), 2)


@pytest.mark.parametrize(
    ("factor", "num_tokens", "rows"), [(1.1, 100, 11), (1.25, 8, 1), (1.0, 101, 11), (1.2, 50, 6)]
)
def test_capacity_does_not_round_a_whole_number_up(factor, num_tokens, rows):
    """1.1 * 100 / 10 is 11, though floating point makes it 11.000000000000002."""
    assert capacity(factor, num_tokens, 1, 10) == rows
