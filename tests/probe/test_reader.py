import pytest
import torch

from moestro.errors import MoestroError
from moestro.models.encdec import EncDec
from moestro.probe.recording.passages import Passage, pad, prepare
from moestro.probe.recording.reader import reader_of

from ..models.tiny_encdec import settings
from .deciders import decoder

BATCH = pad(tuple(prepare([Passage([3, 4, 5, 6]), Passage([7, 8])], None)))


def test_mixtures_of_our_own_models_are_known():
    reader = reader_of(decoder())
    assert [tuple(mixture) for mixture in reader.mixtures] == [(1, 6), (2, 6)]
    assert (reader.vocab_size, reader.has_head) == (61, True)
    total, active, layers = reader.size()
    assert (total, layers) == (sum(each.numel() for each in reader.model.parameters()), 3)
    assert active < total


@pytest.mark.parametrize("name", [None, "MixtralForCausalLM", "Llama4ForCausalLM"])
def test_a_recorded_pass_gives_the_same_logits(name):
    if name is None:
        reader = reader_of(decoder())
    else:
        zoo = pytest.importorskip("tests.probe.foreign_zoo")
        reader = reader_of(zoo.build(name))
    with reader.evaluating():
        logits, record = reader.logits(BATCH), reader.record(BATCH)
        new = reader.write(torch.tensor([[3, 4, 5]]), 2, ())
    assert torch.equal(logits, record.logits_BSV)
    assert logits.shape == (2, 4, 61)
    assert len(record.layers) == len(reader.mixtures)
    for layer, mixture in zip(record.layers, reader.mixtures, strict=True):
        assert layer.choice.num_experts == mixture.num_experts
        assert layer.probs_BE.shape == (2, mixture.num_experts)
    assert 1 <= len(new) <= 2


def test_a_model_without_a_head_says_so():
    zoo = pytest.importorskip("tests.probe.foreign_zoo")
    whole = zoo.build("MixtralForCausalLM")
    assert reader_of(whole).has_head
    assert not reader_of(whole.model).has_head


def test_an_encoder_decoder_is_refused():
    with pytest.raises(MoestroError, match="encoder-decoder"):
        reader_of(EncDec(settings()))
