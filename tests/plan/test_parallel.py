"""What a rank holds and sends."""

import itertools

import pytest

from moestro.config import EncDecConfig, ModelConfig
from moestro.errors import ConfigError
from moestro.models.count import count
from moestro.models.decoder import Decoder
from moestro.plan.parallel import rank
from moestro.plan.report import training_step
from moestro.plan.subject import from_settings

CFG = ModelConfig(
    vocab_size=50,
    dim=32,
    num_layers=4,
    moe={"hidden_dim": 48, "num_experts": 8, "top_k": 2},
    moe_every=2,
)
TOKENS = 64


def ask(kind, ranks, cfg=CFG, number=2):
    training = training_step(from_settings("", cfg, ""), TOKENS, 1, "bf16")
    return rank(cfg, count(cfg), training, kind, ranks, TOKENS, number)


def test_data_parallel_holds_everything_and_reduces_its_gradients():
    one = ask("data", 4)
    total = count(CFG).total
    assert (one.weights, one.gradients, one.optimizer) == (4 * total, 4 * total, 8 * total)
    # A ring sends each part N - 1 times to sum it and N - 1 times to spread it.
    assert one.sent == 2 * 3 * (total * 4 / 4)


def test_fully_sharded_splits_all_state():
    one = ask("fsdp", 4)
    total = count(CFG).total
    assert 4 * one.weights == pytest.approx(4 * total, abs=16)
    assert one.optimizer == 2 * one.weights == 2 * one.gradients
    gathered_twice, scattered = 2 * (3 / 4) * total * 2, (3 / 4) * total * 4
    assert one.sent == pytest.approx(gathered_twice + scattered, abs=1)
    layers = count(CFG).total - count(CFG).input_embedding
    assert one.gathered == pytest.approx(2 * layers / 4, abs=2)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_expert_parallel_splits_the_experts_alone(ranks):
    one = ask("expert", ranks)
    model = Decoder(CFG)
    experts = sum(p.numel() for layer in model.mixtures() for p in layer.experts.parameters())
    rest = sum(p.numel() for p in model.parameters()) - experts
    assert one.weights == 4 * (rest + experts // ranks)
    assert one.sent - one.all_to_all == pytest.approx(2 * (ranks - 1) / ranks * rest * 4, abs=1)


def test_the_fullest_rank_counts():
    assert ask("expert", 3).weights == ask("expert", 3).gradients
    experts = count(CFG).expert
    assert ask("expert", 3).weights == 4 * (count(CFG).total - experts + experts * 3 // 8)


@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_that_cross_ranks(ranks):
    """Every pair of experts once: the mean over balanced routing, by hand."""
    moe = CFG.moe
    choices = list(itertools.combinations(range(moe.num_experts), moe.top_k))
    home = 0
    away = sum(e * ranks // moe.num_experts != home for pair in choices for e in pair)
    rows = TOKENS * away / len(choices)
    one = ask("expert", ranks)
    # There and back, forward and backward, D numbers of two bytes each.
    assert one.all_to_all_per_layer == pytest.approx(4 * rows * CFG.dim * 2)
    assert one.all_to_all == 2 * one.all_to_all_per_layer


def test_both_sides_of_an_encoder_decoder_have_mixtures():
    moe = {"hidden_dim": 8, "num_experts": 4, "top_k": 1, "activation": "relu"}
    cfg = EncDecConfig(dim=16, encoder_layers=4, decoder_layers=3, moe=moe, moe_every=2)
    one = ask("expert", 2, cfg)
    assert one.all_to_all == 3 * one.all_to_all_per_layer > 0


def test_what_cannot_be_split():
    assert ask("expert", 2, CFG.model_copy(update={"moe": None})) is None
    with pytest.raises(ConfigError, match="lower --ranks to 8"):
        ask("expert", 9)


def test_held_is_everything_on_the_device():
    one = ask("fsdp", 2)
    parts = (one.weights, one.gradients, one.optimizer, one.gathered, one.activations)
    assert one.held == sum(parts)
