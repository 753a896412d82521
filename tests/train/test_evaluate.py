import math
from typing import NamedTuple

import pytest
import torch
from torch import nn

from moestro.data.windows import HeldOut
from moestro.errors import DataError
from moestro.models.decoder import Decoder
from moestro.train.distributed import Ranks
from moestro.train.evaluate import evaluate


class Output(NamedTuple):
    logits: torch.Tensor


class Unigram(nn.Module):
    """Predicts the same distribution everywhere."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, tokens_BS):
        assert not self.training
        assert len(tokens_BS)
        return Output(self.logits.expand(*tokens_BS.shape, -1))


def held(tokens, bytes_per_token=1.0) -> HeldOut:
    return HeldOut(torch.tensor(tokens), bytes_per_token)


def test_bits_per_byte_by_definition():
    # Two predicted tokens per window: 1 bit for token 0, 2 bits for the others.
    texts = {
        "a": held([[2, 0, 0], [1, 0, 1]], bytes_per_token=1.0),
        "b": held([[0, 1, 2]], bytes_per_token=4.0),
    }
    found = evaluate(Unigram([0.5, 0.25, 0.25]), texts, batch_size=2)
    assert found == pytest.approx({"a": 5 / 4, "b": 4 / 8, "all": 9 / 12})
    assert next(iter(found)) == "all"


def test_no_domain_takes_the_place_of_all_of_them():
    model, domain = Unigram([0.5, 0.5]), held([[0, 1]])
    with pytest.raises(DataError, match=r"one of 2 domains is called 'all'.*rename"):
        evaluate(model, {"all": domain, "other": domain}, 1)
    assert evaluate(model, {"all": domain}, 1) == {"all": pytest.approx(1.0)}


def test_the_first_token_of_a_window_is_not_predicted():
    model = Unigram([0.5, 0.25, 0.25])
    assert evaluate(model, {"a": held([[2, 0]])}, 1) == evaluate(model, {"a": held([[1, 0]])}, 1)


def test_the_model_is_left_in_the_mode_it_was_in():
    model = Unigram([0.5, 0.5])
    for mode in (True, False):
        model.train(mode)
        evaluate(model, {"a": held([[0, 1]])}, 1)
        assert model.training is mode


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_does_not_matter(tiny_settings, tiny_corpus, batch_size):
    torch.manual_seed(0)
    model = Decoder(tiny_settings().model)
    texts = tiny_corpus.held_out(256)
    one, other = evaluate(model, texts, batch_size), evaluate(model, texts, 4)
    assert one == pytest.approx(other, rel=1e-6)
    assert 6 < one["all"] < 10


def test_bfloat16_is_close(tiny_settings, tiny_corpus):
    torch.manual_seed(0)
    model, texts = Decoder(tiny_settings().model), tiny_corpus.held_out(256)
    half = evaluate(model, texts, 4, torch.bfloat16)
    assert half == pytest.approx(evaluate(model, texts, 4), rel=1e-2)
    assert half != evaluate(model, texts, 4)


def test_ranks_split_the_windows(monkeypatch):
    texts = {"a": held([[0, 0], [0, 1], [0, 2]])}
    model = Unigram([0.5, 0.25, 0.25])
    monkeypatch.setattr(Ranks, "sum_", lambda self, x: x)
    parts = [evaluate(model, texts, 2, ranks=Ranks(rank, 4))["a"] for rank in range(4)]
    assert sum(parts) == pytest.approx(evaluate(model, texts, 2)["a"])
    assert parts == pytest.approx([1 / 3, 2 / 3, 2 / 3, 0])


def test_uniform_predictions_take_log2_of_the_vocabulary():
    model = Unigram([0.125] * 8)
    assert evaluate(model, {"a": held([[0, 7, 3]])}, 1)["a"] == pytest.approx(math.log2(8))
