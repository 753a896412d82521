"""Which experts are chosen, and what cannot be ablated."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from moestro import Decoder, ModelConfig
from moestro.errors import DataError, MoestroError
from moestro.probe.ablation.ablate import ablate
from moestro.probe.ablation.targets import Target, every, targets
from moestro.probe.recording.passages import Passage
from moestro.probe.recording.record import record

from .rings import DOMAINS, WIDTH, make_model, make_text
from .traces import make_trace


def test_targets_are_the_special_experts_with_controls_of_the_same_layer():
    model, text = make_model(num_layers=2), make_text()
    trace = record(model, text)
    found = targets(trace, most=2)
    special = [each for each in found if not each.control]
    assert len(special) == 2
    assert all(DOMAINS[each.expert] == each.domain for each in special)
    assert {each.layer for each in found} == {1}
    controls = [each for each in found if each.control]
    assert len(controls) == 2
    assert {each.expert for each in controls}.isdisjoint(each.expert for each in special)
    assert {each.domain for each in controls} == {each.domain for each in special}
    assert targets(trace, most=2) == found
    assert [each.control for each in targets(trace, most=2, controls=False)] == [False, False]
    assert [each.expert for each in every(trace, 1)] == [0, 1, 2, 3]
    assert [each.domain for each in every(trace, 1)][:3] == list(DOMAINS)
    result = ablate(model, text, found, draws=999)
    assert [row.control for row in result.rows] == [False, False, True, True]
    assert all(row.matters_more for row in result.rows[:2])
    assert not any(row.matters_more for row in result.rows[2:])


def routed(expert_of, documents=4, length=8):
    """A trace of two domains, of one layer and 4 experts, first choices only.

    Args:
        expert_of: (domain, document, position) → its expert.
        documents: of each domain.
        length: tokens of each, the last two of which the model wrote.
    """
    trace = make_trace(
        documents=documents, sequences=1, lengths=(length,), layers=1, top_k=1, generated=2
    )
    places = zip(trace.domain_T, trace.document_T % documents, trace.position_T, strict=True)
    experts = np.array([expert_of(*place) for place in places])
    return trace._replace(experts_TLK=experts.astype(trace.experts_TLK.dtype)[:, None, None])


def chosen_from(trace):
    return [(each.expert, each.domain) for each in targets(trace, most=1, controls=False)]


def test_sure_ones_come_before_those_with_a_higher_lift():
    def expert_of(domain, document, position):
        if domain == 1:
            return 1 if position < 1 else 3
        if document < 5:
            return 0  # few of the 16 documents, but no other text
        return 1 if position < 5 else 3

    assert chosen_from(routed(expert_of, documents=16)) == [(3, "prose")]


def test_rare_experts_and_written_tokens_do_not_count():
    def expert_of(domain, document, position):
        if position >= 6:  # written by the model
            return domain
        return 3 if position == 0 and domain == 0 else 2 if position < 4 - domain else 1

    # Expert 3 is of "code" alone, but too little of it.
    assert chosen_from(routed(expert_of)) == [(1, "prose")]


class Mistake(NamedTuple):
    arguments: dict
    error: type
    words: str


MISTAKES = {
    "expert": Mistake({"chosen": [Target(0, 4, "code")]}, MoestroError, "expert 4 of layer 0"),
    "other": Mistake(
        {"chosen": [Target(0, 1, "code", other=9)], "mode": "swap"}, MoestroError, "expert 9"
    ),
    "layer": Mistake({"chosen": [Target(3, 0, "code")]}, MoestroError, "layer 3 is not a mixture"),
    "domain": Mistake({"chosen": [Target(0, 0, "song")]}, DataError, "'song'.*code, prose, sums"),
    "nothing": Mistake({"chosen": []}, MoestroError, "no expert to change"),
    "no partner": Mistake(
        {"chosen": [Target(0, 1, "code")], "mode": "swap"}, MoestroError, "`other`"
    ),
    "mode": Mistake({"mode": "mute"}, MoestroError, "silence, silence_renormalised, swap"),
    "no text": Mistake({"texts": []}, DataError, "no text"),
    "one token": Mistake({"texts": [Passage([1])]}, DataError, "single token"),
    "vocabulary": Mistake({"texts": [Passage([1, WIDTH])]}, DataError, f"token {WIDTH}"),
    "batch": Mistake({"batch_size": 0}, MoestroError, "batch_size is 0"),
    "draws": Mistake({"draws": 0}, MoestroError, "draws is 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    given = {"texts": make_text(documents=2), "chosen": [Target(0, 0, "code")], "draws": 20}
    mistake = MISTAKES[name]
    with pytest.raises(mistake.error, match=mistake.words):
        ablate(make_model(), **{**given, **mistake.arguments})


def test_models_that_cannot_be_ablated():
    text, wanted = make_text(documents=2), [Target(0, 0, "code")]
    sizes = {"vocab_size": WIDTH, "dim": 8, "num_layers": 1, "dense": {"hidden_dim": 8}}
    sizes["attention"] = {"num_heads": 2, "context": 16}
    with pytest.raises(MoestroError, match="dense model"):
        ablate(Decoder(ModelConfig(**sizes)), text, wanted)
    moe = {"hidden_dim": 8, "num_experts": 4, "top_k": 1}
    with torch.device("meta"):
        model = Decoder(ModelConfig(**sizes, moe=moe))
    with pytest.raises(DataError, match="meta device"):
        ablate(model, text, wanted)
    moe["router"] = {"kind": "expert_choice"}
    with pytest.warns(UserWarning, match="not causal"):
        model = Decoder(ModelConfig(**sizes, moe=moe))
    with pytest.raises(MoestroError, match="expert choice"):
        ablate(model, text, wanted)
    with pytest.raises(MoestroError, match="expert choice"):
        targets(record(model, text))
    with pytest.raises(MoestroError, match="two labels"):
        targets(record(make_model(), make_text(domains=("code",))))


def test_a_loss_that_is_not_finite_is_refused():
    model = make_model()
    with torch.no_grad():
        model.head.weight[0, 0] = math.nan
    with pytest.raises(MoestroError, match="not finite"):
        ablate(model, make_text(documents=2), [Target(0, 0, "code")], draws=20)
