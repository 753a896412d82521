"""What a config.json must not be mistaken for: other models' values, conflicts, the wrong kinds.

Each refused case is one that was, or would be, read as a model that transformers does not compute.
"""

import pytest

from moestro.checkpoints.families import FAMILIES
from moestro.checkpoints.families.translate import canonical, to_fields, to_settings
from moestro.checkpoints.reading import read_settings
from moestro.config import ModelConfig
from moestro.errors import ConfigError

from . import tiny

NEWER = [
    "granitemoe",
    "hunyuan_v1_moe",
    "dots1",
    "ernie4_5_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "minimax_m2",
]
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "short_mscale": 1.1,
    "long_mscale": 1.2,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "factor": 2.0}


def fields_of(name):
    """A config.json of `tiny.TINY`, as transformers writes it."""
    kind, changes = tiny.TINY[name]
    config = getattr(tiny.transformers, f"{kind}Config")(**{**tiny.BODY, **changes})
    return config.to_diff_dict()


def settings_of(fields):
    return to_settings(FAMILIES[fields["model_type"]], fields)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        # Which of the two is meant? transformers takes the second, and the base of neither.
        ("qwen3", {"rope_scaling": LINEAR}, "both there and differ"),
        # Its magnitude is not written there, and transformers derives it from the contexts.
        ("mistral", {"rope_parameters": LONG}, "rope_type is 'longrope'"),
        ("phimoe", {"rope_parameters": LINEAR}, "rope_type is 'linear'"),
        ("phimoe", {"rope_parameters": {**LONG, "long_mscale": None}}, "no long_mscale"),
        # transformers' own default is yarn.
        ("gpt_oss", {"rope_parameters": None}, "rope_parameters are missing"),
        ("deepseek_v2", {"n_group": None}, "n_group is missing"),
        ("deepseek_v3", {"rope_interleave": None}, "rope_interleave is None"),
        ("deepseek_v3", {"norm_topk_prob": None}, "norm_topk_prob is null"),
    ],
)
def test_refused_by_name(name, change, words):
    with pytest.raises(ConfigError, match=words):
        settings_of({**fields_of(name), **change})


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_steps_of_switch_follow_from_its_sparse_layers(side):
    """transformers takes a step that is stated, whatever the numbers of sparse layers say."""
    fields = tiny.transformers.SwitchTransformersConfig(**tiny.SWITCH).to_diff_dict()
    assert settings_of(fields).moe_every == fields[f"{side}_sparse_step"] == 2
    with pytest.raises(ConfigError, match=f"{side}_sparse_step is 1"):
        settings_of({**fields, f"{side}_sparse_step": 1})


def test_both_rotary_fields_may_say_the_same():
    fields = fields_of("llama_scaled")
    both = {**fields, "rope_scaling": dict(fields["rope_parameters"])}
    assert settings_of(both) == settings_of(fields)


def test_defaults_of_deepseek_v3_are_those_of_transformers():
    fields = fields_of("deepseek_v3")
    theirs = tiny.transformers.DeepseekV3Config()
    for name in ("routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob"):
        fields.pop(name, None)
    router = settings_of(fields).moe.router
    assert router.scale == theirs.routed_scaling_factor != 1
    assert (router.num_groups, router.top_groups) == (theirs.n_group, theirs.topk_group)
    assert router.renormalize is theirs.norm_topk_prob is True


def test_longrope_of_phimoe_goes_both_ways():
    cfg = settings_of(fields_of("phimoe"))
    assert cfg.attention.positions.scaling.short_scale == 1.2
    anew = to_fields(FAMILIES["phimoe"], cfg, {})
    assert canonical(settings_of(anew)) == canonical(cfg)


def test_a_scaling_that_a_family_does_not_have_is_not_written():
    values = settings_of(fields_of("phimoe")).model_dump()
    positions = values["attention"]["positions"]
    positions["scaling"] = {"kind": "linear", "factor": 2.0}
    with pytest.raises(ConfigError, match="rope_type is 'linear'"):
        to_fields(FAMILIES["phimoe"], ModelConfig(**values), {})


JUNK = ("x", [], {}, [[1]], 0, -1, 1.5, float("nan"), True)


@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "deepseek_v2", "gpt_oss", "phimoe", *NEWER])
def test_values_of_the_wrong_kind_are_errors_of_ours(name):
    """Every field of every kind: understood, or refused with words."""
    fields = fields_of(name)
    refused = 0
    for field in [*fields, "n_group", "mlp_only_layers", "layer_types", "rope_scaling"]:
        for junk in JUNK:
            if field == "model_type":
                continue
            try:
                settings_of({**fields, field: junk})
            except ConfigError:
                refused += 1
    assert refused > 100


def test_a_model_type_that_is_no_name(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": ["llama"]}')
    with pytest.raises(ConfigError, match=r"model_type \['llama'\] is not known"):
        read_settings(path)
