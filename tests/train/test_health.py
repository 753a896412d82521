import math

import pytest
import torch

from moestro.moe.routing import Routing
from moestro.train.health import (
    WINDOW_STEPS,
    CollapseWatch,
    Tally,
    effective_experts,
    entropy_sum,
)


def routing(experts, probs_TE, *, valid=None, kept=None) -> Routing:
    experts_TK = torch.tensor(experts)
    num_tokens, top_k = experts_TK.shape
    probs_TE = torch.as_tensor(probs_TE, dtype=torch.float32)
    return Routing(
        torch.arange(num_tokens).repeat_interleave(top_k),
        experts_TK.flatten(),
        torch.ones(num_tokens * top_k),
        probs_TE.clamp_min(1e-9).log(),
        probs_TE,
        top_k,
        valid_T=None if valid is None else torch.tensor(valid),
        kept_R=None if kept is None else torch.tensor(kept),
    )


def health(*routings: Routing):
    """The health of one layer over micro-batches."""
    tally = Tally(1, routings[0].num_experts, torch.device("cpu"))
    for one in routings:
        tally.add([one])
    return tally, tally.unpack(tally.packed().tolist())[0]


def test_even_routing_is_healthy():
    tally, layer = health(routing([[0], [1], [2], [3]], torch.full((4, 4), 0.25)))
    assert layer.imbalance == 1.0
    assert layer.dead == 0
    assert layer.dropped == 0.0
    assert layer.entropy == pytest.approx(1.0)
    assert tally.counts_LE.tolist() == [[1, 1, 1, 1]]


def test_everything_to_one_expert():
    certain = torch.eye(4)[[2, 2, 2]]
    _, layer = health(routing([[2], [2], [2]], certain))
    assert layer.imbalance == 4.0
    assert layer.dead == 3
    assert layer.entropy == pytest.approx(0.0, abs=1e-6)


def test_micro_batches_are_summed_before_ratios_are_taken():
    uniform = torch.full((2, 2), 0.5)
    tally, layer = health(routing([[0], [0]], uniform), routing([[1], [1]], uniform))
    assert tally.counts_LE.tolist() == [[2, 2]]
    assert layer.imbalance == 1.0
    assert layer.dead == 0


def test_drops_and_padding():
    probs_TE = [[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]]
    one = routing(
        [[0, 1], [0, 1], [0, 1]],
        probs_TE,
        valid=[True, True, False],
        kept=[True, True, False, True, False, False],
    )
    tally, layer = health(one)
    assert tally.counts_LE.tolist() == [[2, 2]]
    assert layer.dropped == 0.25
    assert layer.entropy == pytest.approx(1.0)


def test_entropy_is_a_share_of_its_maximum():
    probs_TE = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    total, tokens = entropy_sum(routing([[0]], probs_TE))
    assert total.item() / tokens.item() == pytest.approx(math.log(2) / math.log(4))


def test_one_expert_and_no_mixture_do_not_divide_by_zero():
    _, layer = health(routing([[0], [0]], torch.ones(2, 1)))
    assert layer.imbalance == 1.0
    assert layer.entropy == 1.0
    tally = Tally(0, 0, torch.device("cpu"))
    tally.add(())
    tally.reduce()
    assert tally.unpack(tally.packed().tolist()) == []
    watch = CollapseWatch(0, 0, 1)
    assert not any(watch.observe(step, tally.counts_LE) for step in range(1, 50))


def test_effective_experts():
    assert effective_experts(torch.tensor([5, 5, 5, 5])) == pytest.approx(4.0)
    assert effective_experts(torch.tensor([5, 0, 0, 0])) == pytest.approx(1.0)
    assert effective_experts(torch.zeros(4)) == pytest.approx(1.0)


EVEN, ONE = [[10, 10, 10, 10]], [[40, 0, 0, 0]]


def watch_steps(watch: CollapseWatch, counts, first: int, last: int) -> list[tuple[int, str]]:
    return [
        (step, message)
        for step in range(first, last + 1)
        for message in watch.observe(step, torch.tensor(counts))
    ]


def test_collapse_is_reported_once_when_the_window_is_full():
    reports = watch_steps(CollapseWatch(1, 4, 1), ONE, 1, 3 * WINDOW_STEPS)
    assert [step for step, _ in reports] == [WINDOW_STEPS]
    assert "mixture 0" in reports[0][1]
    assert "3 of 4" in reports[0][1]


def test_collapse_is_reported_again_after_a_recovery():
    watch = CollapseWatch(1, 4, 1)
    assert watch_steps(watch, ONE, 1, WINDOW_STEPS)
    assert not watch_steps(watch, EVEN, WINDOW_STEPS + 1, 3 * WINDOW_STEPS)
    assert not watch.collapsed
    assert len(watch_steps(watch, ONE, 3 * WINDOW_STEPS + 1, 6 * WINDOW_STEPS)) == 1


def test_balanced_and_mildly_uneven_layers_are_left_alone():
    assert not watch_steps(CollapseWatch(1, 4, 1), EVEN, 1, 60)
    assert not watch_steps(CollapseWatch(1, 4, 1), [[20, 10, 6, 4]], 1, 60)


def test_the_fewest_possible_experts_is_no_collapse_where_all_are_used():
    assert not watch_steps(CollapseWatch(1, 2, 2), [[10, 10]], 1, 60)
    # Two experts of eight take all tokens at K = 2: the load of each is as even as it can be.
    reports = watch_steps(CollapseWatch(1, 8, 2), [[40, 40, 0, 0, 0, 0, 0, 0]], 1, 60)
    assert len(reports) == 1


def test_near_collapse_without_dead_experts_is_reported():
    assert watch_steps(CollapseWatch(1, 4, 1), [[970, 10, 10, 10]], 1, 60)
