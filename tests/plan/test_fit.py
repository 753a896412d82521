"""What fits, to the byte, and that what would have to give does make room."""

import pytest
import torch

from moestro.checkpoints import packed_header
from moestro.checkpoints.quantize import WEIGHTS, blank_model
from moestro.checkpoints.streamed import sizes_of
from moestro.config import ModelConfig
from moestro.models import budget
from moestro.models.count import count
from moestro.plan.fit import fit, streamed_needs
from moestro.plan.memory import cache_bytes, weights
from moestro.plan.parallel import rank
from moestro.plan.presets import preset
from moestro.plan.report import training_step

GIB = 2**30
MIXTRAL = preset("mixtral-8x7b").cfg


def ask(memory, name="mixtral-8x7b", context=4096, batch=4, dtype="bf16"):
    subject = preset(name)
    training = training_step(subject, context, batch, dtype)
    return fit(subject.cfg, subject.count, training, context, batch, dtype, int(memory))


def row(answer, dtype):
    return next(row for row in answer.rows if row.dtype == dtype)


def test_to_the_byte():
    need = weights(count(MIXTRAL), "bf16").total + cache_bytes(MIXTRAL, 4096, 4, "bf16")
    enough, short = row(ask(need), "bf16"), row(ask(need - 1), "bf16")
    assert (enough.fits, enough.need_bytes, enough.longest_context) == (True, need, 4096)
    assert enough.largest_batch == 4
    assert (short.fits, short.longest_context, short.largest_batch) == (False, 4095, 3)


def test_no_longer_than_the_model_sees():
    assert row(ask(1e15), "bf16").longest_context == MIXTRAL.attention.context


@pytest.mark.parametrize("memory", [20 * GIB, 24 * GIB, 40 * GIB, 80 * GIB, 88 * GIB])
def test_each_change_makes_room(memory):
    answer = ask(memory)
    assert not row(answer, "bf16").fits
    counted = count(MIXTRAL)
    for change in answer.changes:
        if change.what == "dtype":
            assert row(answer, change.value).fits
        elif change.what == "context":
            assert row(ask(memory, context=change.value), "bf16").fits
        elif change.what == "batch":
            assert row(ask(memory, batch=change.value), "bf16").fits
        elif change.what == "offload":
            dtype = "int4" if "int4" in change.text else "bf16"
            assert row(answer, dtype).need_bytes - change.value <= memory
            assert change.value <= weights(counted, dtype).experts
        else:
            assert change.what == "devices"
            assert row(answer, "bf16").need_bytes <= change.value * memory


@pytest.mark.parametrize(
    ("memory", "what"),
    [
        (2, ["devices"]),
        (20, ["offload", "offload", "devices"]),
        (40, ["dtype", "offload", "devices"]),
        (88, ["dtype", "context", "batch", "offload", "devices"]),
        (100, []),
    ],
)
def test_what_would_have_to_give(memory, what):
    assert [change.what for change in ask(memory * GIB).changes] == what


def test_experts_that_stay_in_a_file():
    """What `plan` says of a budget is what a run of the same sizes is given."""
    left = ask(20 * GIB, batch=1).streamed
    again = budget.fit(left.needs, 20 * GIB)
    assert again.kept == left.kept
    assert 0 < min(left.kept) <= max(left.kept) < 8
    assert left.needs.fixed + left.kept_bytes <= 20 * GIB
    slab = left.needs.mixtures[0].slab_bytes
    assert left.needs.fixed + left.kept_bytes + slab > 20 * GIB
    assert left.needs.cycle == 32 * 2 * slab
    low, high = budget.hit_bounds(left)
    assert 0 < low < high < 1
    assert left.read_bytes(1.0) == 0
    small = ask(2 * GIB, batch=1)
    assert small.streamed is None
    least = small.streamed_least
    assert min(ask(least, batch=1).streamed.kept) == 1
    assert ask(least - (32 << 20), batch=1).streamed is None


def test_a_dense_model_has_no_experts_to_narrow_or_to_move():
    answer = ask(24 * GIB, "llama-2-70b", dtype="int4-experts")
    assert [r.dtype for r in answer.rows] == ["fp32", "bf16", "int8", "int4"]
    assert {change.what for change in answer.changes} == {"devices"}


def test_the_fewest_ranks_that_train_it():
    memory = 24 * GIB
    answer = ask(memory, batch=1)
    assert (answer.training, answer.training_checkpointed) == (False, False)
    training = training_step(preset("mixtral-8x7b"), 4096, 1, "bf16")

    def held(ranks):
        one = rank(MIXTRAL, count(MIXTRAL), training, "fsdp", ranks, 4096, 2)
        return one.held - one.activations + training.checkpointed

    assert held(answer.fsdp_ranks) <= memory < held(answer.fsdp_ranks - 1)
    assert ask(1.2e12, batch=1).training
    assert ask(8 * GIB, context=32_768).fsdp_ranks is None


def test_a_rumour_without_settings():
    answer = ask(80 * GIB, "gpt-4-rumour")
    assert answer.rows[0].longest_context is None
    assert answer.training is None


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_lies_in_the_file_beside_its_embedding(tied, dtype):
    moe = {"hidden_dim": 128, "num_experts": 8, "top_k": 2}
    attention = {"num_heads": 4, "context": 64}
    cfg = ModelConfig(
        vocab_size=8192, dim=128, num_layers=2, head={"tied": tied}, moe=moe, attention=attention
    )
    model = blank_model(cfg, lambda _: WEIGHTS[dtype]).to(torch.bfloat16)
    _, sections, _ = packed_header.make(model, WEIGHTS[dtype], {})
    run = budget.needs(*sizes_of(model, sections), budget.Use(64))
    planned = streamed_needs(cfg, weights(count(cfg), dtype, cfg), dtype, budget.Use(64))
    assert planned.dense == pytest.approx(run.dense, rel=0.02)
    assert planned.mixtures == run.mixtures
