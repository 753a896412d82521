import pytest
import torch

from moestro.errors import MoestroError, ShapeError
from moestro.models.encdec import EncDec
from moestro.probe.recording.reroute import rerouted

from ..models.tiny_encdec import settings
from .deciders import VOCABULARY, decoder


def tokens(batch=2, length=7):
    return torch.randint(3, VOCABULARY, (batch, length))


def test_an_edit_is_what_the_model_uses_and_returns():
    model, ids = decoder(), tokens()
    calls = []

    def edit(place, experts_TK, weights_TK):
        calls.append((place, *experts_TK.shape))
        return (experts_TK + place + 1) % 6, weights_TK * 0.5

    before = model(ids)
    with rerouted(model, edit):
        during = model(ids)
    assert calls == [(0, 14, 2), (1, 14, 2)]
    first, changed = before.routings[0], during.routings[0]
    assert changed.experts_R.equal((first.experts_R + 1) % 6)
    assert changed.weights_R.equal(first.weights_R * 0.5)
    assert changed.logits_TE.equal(first.logits_TE)  # the router's own opinion
    assert not during.logits.equal(before.logits)
    # By hand: the layer with the same assignments.
    layer, x_TD = model.mixtures()[0], torch.randn(5, 32)
    alone = layer.router(x_TD)
    by_hand = layer.experts(x_TD, alone._replace(experts_R=(alone.experts_R + 1) % 6))
    with rerouted(layer, lambda place, experts, weights: ((experts + 1) % 6, weights)):
        torch.testing.assert_close(layer(x_TD)[0], by_hand)


def test_nothing_is_left_behind_even_by_an_error():
    model, ids = decoder(), tokens()
    before = model(ids).logits

    def broken(place, experts_TK, weights_TK):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), rerouted(model, broken):
        model(ids)
    assert model(ids).logits.equal(before)


def test_an_empty_place_counts_for_nothing():
    model, ids = decoder(), tokens()

    def one(place, experts_TK, weights_TK):
        return experts_TK[:, :1], weights_TK[:, :1]

    def emptied(place, experts_TK, weights_TK):
        return torch.stack([experts_TK[:, 0], torch.full((14,), 6)], 1), weights_TK

    with rerouted(model, one):
        fewer = model(ids)
    with rerouted(model, emptied):
        empty = model(ids)
    torch.testing.assert_close(empty.logits, fewer.logits)
    assert fewer.routings[0].top_k == 1
    assert int(empty.routings[0].dropped()) == 14


def test_an_empty_place_takes_no_room_under_a_capacity():
    # One row an expert: what is dropped before the capacity must not use it up.
    model, ids = decoder(capacity={"per_sequence": 1}), tokens(1, 3)

    def edit(place, experts_TK, weights_TK):
        return torch.tensor([[6, 6], [0, 6], [0, 1]]), weights_TK

    with rerouted(model, edit):
        routing = model(ids).routings[0]
    assert routing.kept_R.tolist() == [False, False, True, False, False, True]


@pytest.mark.parametrize("kind", ["softmax", "expert_choice"])
def test_an_edit_that_changes_nothing_changes_no_bit(kind):
    model, ids = decoder(router={"kind": kind}), tokens()
    valid = torch.arange(7) < torch.tensor([7, 4])[:, None]
    before = model(ids, valid_BS=valid)
    with rerouted(model, lambda place, experts, weights: (experts, weights)):
        during = model(ids, valid_BS=valid)
    assert during.logits.equal(before.logits)
    for mine, theirs in zip(during.routings, before.routings, strict=True):
        assert mine.experts_R.equal(theirs.experts_R)
        assert mine.tokens_R.equal(theirs.tokens_R)


def test_gradients_pass_through_an_edit_and_recomputation_repeats_it():
    model, ids = decoder().train(), tokens()
    calls = []

    def edit(place, experts_TK, weights_TK):
        calls.append(place)
        return experts_TK.flip(1), weights_TK

    gradients = []
    for model.checkpoint_activations in (False, True):
        model.zero_grad()
        with rerouted(model, edit):
            model(ids).logits.square().mean().backward()
        gradients.append(model.mixtures()[0].router.weight.grad.clone())
    assert sorted(calls) == [0, 0, 0, 1, 1, 1]
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_encoder_decoders_can_be_rerouted_too():
    model = EncDec(settings(vocab_size=VOCABULARY)).eval()
    places = []

    def edit(place, experts_TK, weights_TK):
        places.append(place)
        return experts_TK, weights_TK

    with rerouted(model, edit):
        model(tokens(), tokens(2, 4))
    assert places == [0, 1, 2]


@pytest.mark.parametrize(
    "edit",
    [
        lambda place, experts, weights: (experts[1:], weights[1:]),
        lambda place, experts, weights: (experts, weights[:, :1]),
        lambda place, experts, weights: (experts.int(), weights),
        lambda place, experts, weights: (experts[:, :0], weights[:, :0]),
    ],
)
def test_an_edit_of_another_shape_is_refused(edit):
    model = decoder()
    with rerouted(model, edit), pytest.raises(ShapeError, match=r"mixture 0.*\[14, K\]"):
        model(tokens())


def test_a_model_without_mixtures_is_refused():
    with pytest.raises(MoestroError, match="no mixture"), rerouted(torch.nn.Linear(2, 2), None):
        pass
