import pytest
import torch

from moestro.moe.routing import Routing


def routing_of(experts_TK, **changes):
    experts_TK = torch.tensor(experts_TK)
    num_tokens, top_k = experts_TK.shape
    tokens_R = torch.arange(num_tokens).repeat_interleave(top_k)
    uniform_TE = torch.full((num_tokens, 4), 0.25)
    weights_R = torch.full((num_tokens * top_k,), 1 / top_k)
    routing = Routing(tokens_R, experts_TK.flatten(), weights_R, 0 * uniform_TE, uniform_TE, top_k)
    return routing._replace(**changes)


def test_counts_by_hand():
    routing = routing_of([[0, 1], [0, 3], [0, 1]])
    assert routing.counts_E().tolist() == [3, 2, 0, 1]
    assert (routing.num_tokens, routing.num_experts) == (3, 4)
    assert routing.experts_TK().tolist() == [[0, 1], [0, 3], [0, 1]]
    assert routing.dropped() == 0


def test_padding_is_not_counted():
    valid_T = torch.tensor([True, False, True])
    kept_R = torch.tensor([True, False, False, False, True, True])
    routing = routing_of([[0, 1], [0, 3], [0, 1]], valid_T=valid_T, kept_R=kept_R)
    assert routing.counts_E().tolist() == [2, 2, 0, 0]
    assert routing.dropped() == 1


def test_counts_are_before_any_drop():
    routing = routing_of([[0, 1]], kept_R=torch.tensor([False, False]))
    assert routing.counts_E().tolist() == [1, 1, 0, 0]
    assert routing.dropped() == 2


def test_expert_choice_has_no_choices_by_token():
    with pytest.raises(ValueError, match="flat list"):
        routing_of([[0, 1]], top_k=0).experts_TK()


def test_no_tokens():
    routing = routing_of([[0, 1]])
    empty = torch.zeros(0, dtype=torch.int64)
    routing = routing._replace(
        tokens_R=empty, experts_R=empty, logits_TE=torch.zeros(0, 4), weights_R=torch.zeros(0)
    )
    assert routing.counts_E().tolist() == [0, 0, 0, 0]
    assert routing.experts_TK().shape == (0, 2)
