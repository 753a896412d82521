"""config.json as libraries and tools write it, whole: what is known, checked, and neither."""

import json
import time

import pytest

from moestro.checkpoints.families import FAMILIES
from moestro.checkpoints.families.translate import to_settings
from moestro.checkpoints.reading import read_settings
from moestro.errors import ConfigError

from . import tiny
from .published import PUBLISHED as OTHERS
from .published_delta import DELTA_MODELS

PUBLISHED = {**OTHERS, **DELTA_MODELS}
# What transformers 4 wrote beside a family's own fields, and unsloth, and transformers.js.
OLD = {
    "_name_or_path": "someone/something", "_commit_hash": None, "_flash_attn_2_enabled": False,
    "_attn_implementation_internal": "sdpa", "add_cross_attention": False,
    "bad_words_ids": None, "begin_suppress_tokens": None, "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None, "decoder_start_token_id": None,
    "diversity_penalty": 0.0, "do_sample": False, "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0, "exponential_decay_length_penalty": None,
    "finetuning_task": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "gradient_checkpointing": False, "id2label": {"0": "LABEL_0"}, "is_decoder": False,
    "is_encoder_decoder": False, "label2id": {"LABEL_0": 0}, "length_penalty": 1.0,
    "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1,
    "num_beams": 1, "num_return_sequences": 1, "output_attentions": False,
    "output_hidden_states": False, "output_scores": False, "prefix": None, "problem_type": None,
    "pruned_heads": {}, "remove_invalid_values": False, "repetition_penalty": 1.0,
    "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None,
    "suppress_tokens": None, "task_specific_params": None, "temperature": 1.0,
    "tf_legacy_loss": False, "tie_encoder_decoder": False, "tokenizer_class": None, "top_k": 50,
    "top_p": 1.0, "torchscript": False, "typical_p": 1.0, "use_bfloat16": False,
    "unsloth_fixed": True, "unsloth_version": "2026.4.2",
    "transformers.js_config": {"use_external_data_format": True},
}  # fmt: skip
QWEN3_CODER = {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}


def settings_of(fields, accepted=()):
    return to_settings(FAMILIES[fields["model_type"]], fields, accepted)


def config_of(name):
    if name == "switch":
        return tiny.transformers.SwitchTransformersConfig(**tiny.SWITCH)
    return tiny.config_of(name)


# Switch, and those that transformers has under another name or not at all, with tests of their own.
OWN_TESTS = {"bailing_moe", "deepseek", "kimi_k2", "switch_transformers"}


def test_every_family_is_tested():
    """By a tiny model, which all tests of families take; and by published settings."""
    assert FAMILIES.keys() == {tiny.config_of(name).model_type for name in tiny.TINY} | OWN_TESTS
    published = {fields["model_type"] for fields, _ in PUBLISHED.values()}
    assert FAMILIES.keys() - published == {"llama", "mistral", "qwen2", "qwen3"}


@pytest.mark.parametrize("name", [*tiny.TINY, "switch"])
def test_every_family_in_full(name):
    """All that transformers would write, defaults included, means what the short form means."""
    config = config_of(name)
    whole = json.loads(json.dumps(config.to_dict()))
    short = json.loads(json.dumps(config.to_diff_dict()))
    assert len(whole) > len(short)
    assert settings_of(whole) == settings_of(short)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_with_what_older_libraries_and_tools_add(name):
    fields = PUBLISHED[name][0]
    assert settings_of({**OLD, **fields}) == settings_of(fields)


@pytest.mark.parametrize("missing", [False, True])
def test_what_qwen3_coder_has_left_over(missing):
    fields = PUBLISHED["Qwen3-30B-A3B"][0]
    left = dict.fromkeys(QWEN3_CODER) if missing else QWEN3_CODER
    assert settings_of({**fields, **left}) == settings_of(fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qkv_bias": True}, "qkv_bias is True, which would mean biases .* only False can"),
        ({"use_qk_norm": False}, "use_qk_norm is False, which would mean .* without norms"),
        ({"shared_expert_intermediate_size": 8}, "is 8, which would mean a shared expert"),
        ({"is_encoder_decoder": True}, "would mean an encoder beside the decoder"),
        ({"add_cross_attention": True}, "would mean attention to an encoder"),
        ({"pruned_heads": {"0": [1]}}, "would mean that attention heads are taken out"),
    ],
)
def test_a_field_with_one_usual_value_says_what_another_would_mean(change, words):
    fields = {**PUBLISHED["Qwen3-30B-A3B"][0], **change}
    with pytest.raises(ConfigError, match=words + ".*--accept-field NAME, or accept_fields="):
        settings_of(fields)
    assert settings_of(fields, list(change)) == settings_of(PUBLISHED["Qwen3-30B-A3B"][0])


def test_switch_is_an_encoder_decoder():
    fields = json.loads(json.dumps(config_of("switch").to_dict()))
    with pytest.raises(ConfigError, match="is_encoder_decoder is False; only True"):
        settings_of({**fields, "is_encoder_decoder": False})


def test_fields_accepted_by_name(tmp_path):
    fields = PUBLISHED["OLMoE-1B-7B-0924"][0]
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**fields, "frob": 1, "knob": 2}))
    with pytest.raises(ConfigError, match=r"unknown field frob, knob .*--accept-field NAME"):
        read_settings(path)
    with pytest.raises(ConfigError, match="unknown field knob for"):
        read_settings(path, ["frob"])
    described = read_settings(path, ["frob", "knob"])
    assert described.cfg == settings_of(fields)
    assert described.fields["frob"] == 1
    with pytest.raises(ConfigError, match=r"hidden_size says what .* leave it out"):
        read_settings(path, ["frob", "knob", "hidden_size"])


HUGE = (10**9, 2**31, 2**62, 10**30, 1e300)


@pytest.mark.parametrize("name", [*tiny.TINY, "switch"])
def test_numbers_beyond_any_model_are_answered_at_once(name):
    """Refused, or settings that count; no loop over what a file only claims."""
    fields = json.loads(json.dumps(config_of(name).to_diff_dict()))
    numbers = [key for key, value in fields.items() if type(value) is int]
    assert len(numbers) > 8
    start, refused = time.process_time(), 0
    for key in numbers:
        for huge in HUGE:
            try:
                settings_of({**fields, key: huge})
            except ConfigError:
                refused += 1
    assert refused > 10
    assert time.process_time() - start < 2


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2_moe", "qwen3_moe", "gpt_oss", "switch"])
def test_layers_are_bounded(name):
    fields = json.loads(json.dumps(config_of(name).to_diff_dict()))
    fields.pop("layer_types", None)
    many = {"num_hidden_layers": 10_001}
    if name == "switch":
        names = ("layers", "decoder_layers", "sparse_encoder_layers", "sparse_decoder_layers")
        many = dict.fromkeys((f"num_{name}" for name in names), 10_001)
        fields |= {"encoder_sparse_step": 1, "decoder_sparse_step": 1}
    with pytest.raises(ConfigError, match=r"layers .*10,?000"):
        settings_of({**fields, **many})
