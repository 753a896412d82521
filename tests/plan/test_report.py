"""The whole plan of a model: the field's comparisons, dense models beside it, rumours marked."""

import json

import pytest

from moestro.config import ModelConfig
from moestro.models.count import count
from moestro.plan.devices import DEVICES
from moestro.plan.presets import names, preset
from moestro.plan.report import Question, as_json, report
from moestro.plan.rows import rows
from moestro.plan.subject import from_settings

EVERYTHING = Question(
    context=1024,
    batch=2,
    device=DEVICES["h100"],
    usd_per_hour=2.0,
    memory_bytes=24 * 2**30,
    ranks=2,
    parallel="fsdp",
)


def plan(name, **question):
    return report(preset(name), Question(**question))


def test_glam_against_gpt_3():
    """About 180 and 350 GFLOPs per token (Du et al. 2022, Table 1); for 180 see the page."""
    glam, gpt3 = plan("glam-64b-64e"), plan("gpt-3")
    assert glam.forward_flops == pytest.approx(180e9, rel=0.1)
    assert gpt3.forward_flops == pytest.approx(350e9, rel=0.02)
    assert glam.forward_flops / gpt3.forward_flops == pytest.approx(180 / 350, abs=0.05)


def test_switch_base_128_costs_what_t5_base_costs():
    switch, t5 = plan("switch-base-128"), plan("t5-base")
    assert switch.forward_flops == pytest.approx(t5.forward_flops, rel=0.02)
    assert switch.total > 30 * t5.total


def test_mixtral_has_a_fifth_of_llama_2_70b_active():
    assert plan("mixtral-8x7b").active / plan("llama-2-70b").active == pytest.approx(0.2, abs=0.02)


def test_eight_experts_hold_800b_at_the_cost_of_100b():
    mixture, dense = plan("mixture-800b"), plan("dense-100b")
    assert mixture.total == pytest.approx(800e9, rel=0.01)
    assert mixture.forward_flops == pytest.approx(dense.forward_flops, rel=0.001)
    assert dense.total == pytest.approx(100e9, rel=0.03)
    assert preset("mixture-800b").cfg.moe.top_k == 1
    same_cost, same_size = mixture.dense
    assert same_cost.total == pytest.approx(dense.total, rel=0.01)
    assert same_size.total == pytest.approx(mixture.total, rel=0.01)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3", "switch-base-128", "gpt-oss-20b"])
def test_dense_models_of_equal_cost_and_size(name):
    mixture = plan(name)
    same_cost, same_size = mixture.dense
    assert same_cost.total == same_cost.active == pytest.approx(mixture.active, rel=0.005)
    assert same_cost.forward_flops == pytest.approx(mixture.forward_flops, rel=0.005)
    assert same_size.total == pytest.approx(mixture.total, rel=0.005)
    assert same_cost.cache_bytes == mixture.cache_bytes
    assert "int4-experts" not in same_cost.weights_bytes


def test_a_dense_model_stands_alone():
    assert plan("llama-2-70b").dense == ()


def test_conventions():
    """gpt-oss-20b's published 3.61B active leave the input embedding out; Mixtral's 12.6B both."""
    assert plan("gpt-oss-20b", embeddings="output").active == 3_608_307_264
    bare = plan("mixtral-8x7b", embeddings="none")
    assert (bare.total, bare.active) == (46_440_648_704, 12_617_781_248)
    assert plan("t5-base", embeddings="output").total == plan("t5-base").total


def test_the_context_is_no_longer_than_a_decoder_sees():
    assert plan("mixtral-8x7b").context == 4096
    assert plan("gpt-3").context == plan("gpt-3", context=100_000).context == 2048
    assert plan("t5-base", context=3000).context == 3000
    small = from_settings("small", ModelConfig(), "")
    assert report(small, Question()).context == 256


@pytest.mark.parametrize("name", names())
def test_every_preset_has_a_whole_plan(name):
    answer = report(preset(name), EVERYTHING)
    text = json.dumps(as_json(EVERYTHING, [answer]))
    assert "NaN" not in text
    assert "Infinity" not in text
    for row in rows([answer, *answer.dense], EVERYTHING):
        assert len(row.cells) in (0, 1 + len(answer.dense))
    if preset(name).cfg is not None:
        assert answer.prefill.tokens_per_s > answer.decode.tokens_per_s > 0
        assert answer.decode.usd_per_million == pytest.approx(
            2e6 / 3600 / answer.decode.tokens_per_s
        )
        assert answer.training.checkpointed < answer.training.activations


def test_a_rumour_is_marked_wherever_it_is_shown():
    answer = report(preset("gpt-4-rumour"), EVERYTHING)
    assert "RUMOUR" in answer.title
    assert all("RUMOUR" in dense.title for dense in answer.dense)
    told = as_json(EVERYTHING, [answer])["models"][0]
    assert told["rumour"] == "RUMOUR"
    assert {dense["rumour"] for dense in told["dense"]} == {"RUMOUR"}
    assert plan("mixtral-8x7b").rumour is None


def test_a_rumour_has_dense_models_by_its_numbers():
    same_cost, same_size = plan("gpt-4-rumour").dense
    assert (same_cost.total, same_size.total) == (277_000_000_000, 1_831_000_000_000)
    assert same_size.forward_flops == 2 * 1_831_000_000_000


def test_the_device_gives_the_memory_unless_it_is_named():
    small = Question(device=DEVICES["rtx4090"])
    subject = preset("olmoe-1b-7b")
    assert report(subject, small).fit.memory_bytes == 24 * 2**30
    assert report(subject, small._replace(memory_bytes=5)).fit.memory_bytes == 5
    assert report(subject, Question()).fit is None


def test_training_costs_three_forward_passes_and_16_bytes_a_parameter():
    answer = plan("olmoe-1b-7b")
    assert answer.train_flops == 3 * answer.forward_flops
    assert answer.training.state == 16 * count(preset("olmoe-1b-7b").cfg).total


def test_rows_say_what_is_unknown():
    rumour = report(preset("gpt-4-rumour"), EVERYTHING)
    cells = {row.label: row.cells for row in rows([rumour], EVERYTHING) if row.cells}
    assert cells["key/value cache"] == cells["decode, tokens/s"] == ("–",)
