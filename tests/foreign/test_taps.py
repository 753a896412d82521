"""Taps on models of transformers: what is found, how routers score, what is refused."""

import pytest
import torch
from torch import nn

from moestro.errors import MoestroError
from moestro.foreign import taps

from ..probe import foreign_zoo as zoo


def test_probabilities_are_those_that_the_weights_come_from():
    # Of a softmax over all and of sigmoids alike, renormalised weights keep the ratios.
    for name in ("MixtralForCausalLM", "DeepseekV3ForCausalLM", "Cohere2MoeForCausalLM"):
        model = zoo.build(name)
        tap = taps.taps(model)[0]
        seen = []
        with taps.tapped([tap], lambda place, chosen, seen=seen: seen.append(chosen)):
            model(input_ids=torch.randint(3, 61, (1, 7)), use_cache=False)
        probs_TE = tap.probabilities(seen[0].logits_TE)
        torch.testing.assert_close(probs_TE.sum(1), torch.ones(7))
        picked_TK = probs_TE.gather(1, seen[0].experts_TK)
        torch.testing.assert_close(
            picked_TK / picked_TK.sum(1, keepdim=True),
            seen[0].weights_TK / seen[0].weights_TK.sum(1, keepdim=True),
        )
        assert seen[0].logits_TE.requires_grad


def test_every_router_is_known():
    for name in zoo.FAMILIES:
        for tap in taps.taps(zoo.build(name)):
            assert tap.scoring is not None, name


def test_a_mixture_written_in_some_other_way_is_refused():
    class MyMoE(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(4, 2)
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    model = zoo.build("MixtralForCausalLM")
    model.model.layers[1].mlp = MyMoE()
    with pytest.raises(MoestroError, match="ModuleList, MyMoE in MixtralForCausalLM"):
        taps.taps(model)
    with pytest.raises(MoestroError, match="Linear has no mixture"):
        taps.taps(nn.Linear(2, 2))
