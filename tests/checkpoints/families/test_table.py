"""The families' tables: config.json ↔ settings, layouts, and which tensor is whose part."""

from contextlib import suppress

import pytest
import torch

from moestro.checkpoints.families import FAMILIES
from moestro.checkpoints.families.fields import derived, layer_types
from moestro.checkpoints.families.slices import key_pattern, slices
from moestro.checkpoints.families.table import LAYOUTS, Rule
from moestro.checkpoints.families.translate import canonical, to_fields, to_settings
from moestro.config import DeltaConfig, LatentConfig, ModelConfig
from moestro.errors import ConfigError

# As published, older ones in the older spelling.
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_2_7B = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_3_1_8B = {
    **LLAMA_2_7B,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
MISTRAL_7B = {
    **{key: LLAMA_2_7B[key] for key in LLAMA_2_7B if key not in ("pretraining_tp", "rope_scaling")},
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 8,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}
QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PUBLISHED = [MIXTRAL_8X7B, LLAMA_2_7B, LLAMA_3_1_8B, MISTRAL_7B, QWEN3_0_6B]


def settings_of(fields):
    return to_settings(FAMILIES[fields["model_type"]], fields)


@pytest.mark.parametrize("fields", PUBLISHED)
def test_published_configs_come_back_word_for_word(fields):
    cfg = settings_of(fields)
    family = FAMILIES[fields["model_type"]]
    assert to_fields(family, cfg, fields) == fields
    anew = to_fields(family, cfg, {})
    assert anew.keys().isdisjoint({"rope_theta", "rope_scaling"})
    assert canonical(settings_of(anew)) == canonical(cfg)


def test_mixtral_means_what_it_says():
    cfg = settings_of(MIXTRAL_8X7B)
    assert (cfg.dim, cfg.num_layers, cfg.num_kv_heads, cfg.head_dim) == (4096, 32, 8, 128)
    assert (cfg.moe.hidden_dim, cfg.moe.num_experts, cfg.moe.top_k) == (14336, 8, 2)
    assert cfg.moe.router.renormalize
    assert cfg.attention.window is None
    assert cfg.attention.positions.theta == 1e6
    assert cfg.attention.context == 32768
    assert not cfg.head.tied
    assert cfg.norm.eps == 1e-5


def test_old_and_new_rotary_fields_mean_the_same():
    new = {key: value for key, value in LLAMA_3_1_8B.items() if not key.startswith("rope")}
    new["rope_parameters"] = {**LLAMA_3_1_8B["rope_scaling"], "rope_theta": 500000.0}
    assert settings_of(new) == settings_of(LLAMA_3_1_8B)
    assert settings_of(new).attention.positions.scaling.original_context == 8192


@pytest.mark.parametrize(
    "scaling",
    [
        {"kind": "linear", "factor": 2.0},
        {"kind": "llama3", "factor": 8.0, "original_context": 64},
        {"kind": "yarn", "factor": 4.0, "original_context": 64},
        {
            "kind": "yarn",
            "factor": 40.0,
            "original_context": 64,
            "mscale": 0.707,
            "mscale_all_dim": 0.7,
            "truncate": False,
            "attention_factor": 1.2,
            "beta_fast": 31.0,
        },
    ],
)
@pytest.mark.parametrize("original", [{}, MIXTRAL_8X7B])
def test_rotary_scalings_go_both_ways(scaling, original):
    cfg = settings_of(MIXTRAL_8X7B)
    positions = {"theta": 3e4, "scaling": scaling}
    attention = {**cfg.attention.model_dump(), "positions": positions}
    cfg = ModelConfig(**{**cfg.model_dump(), "attention": attention})
    fields = to_fields(FAMILIES["mixtral"], cfg, original)
    assert ("rope_parameters" in fields) is not bool(original)
    assert canonical(settings_of(fields)) == canonical(cfg)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_zero_experts": 2}, "unknown field num_zero_experts"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"hidden_size": None}, "hidden_size is null"),
        ({"num_experts_per_tok": 9}, "top_k is 9"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "up": 1}}, "unknown field up"),
        ({"rope_parameters": {"rope_theta": 1e4, "up": 1}}, "default.*up"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one set for all"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(change, words):
    with pytest.raises(ConfigError, match=words):
        settings_of({**MIXTRAL_8X7B, **change})


def test_fields_that_a_change_of_settings_does_not_touch_stay():
    cfg = settings_of(MIXTRAL_8X7B)
    longer = {**cfg.attention.model_dump(), "context": 100}
    cfg = ModelConfig(**{**cfg.model_dump(), "attention": longer})
    fields = to_fields(FAMILIES["mixtral"], cfg, MIXTRAL_8X7B)
    assert fields == {**MIXTRAL_8X7B, "max_position_embeddings": 100}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"attention": {"qk_norm": "head"}}, "attention.qk_norm"),
        ({"norm": {"kind": "layer"}}, "norm.kind"),
        ({"moe": {"router": {"kind": "sigmoid"}}}, "moe.router.kind"),
        ({"moe": {"capacity": {"factor": 1.0}}}, "moe.capacity"),
        ({"moe_every": 2}, "moe_every"),
        ({"moe": None}, "moe"),
    ],
)
def test_settings_that_a_family_cannot_express(change, name):
    values = settings_of(MIXTRAL_8X7B).model_dump()
    for key, value in change.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ConfigError, match=name):
        to_fields(FAMILIES["mixtral"], ModelConfig(**values), {})


MIXES = [
    {"size": 4},
    {"kind": "conv", "attention_layers": [1]},
    {"kind": "delta", "key_heads": 2, "value_heads": 2, "key_dim": 4, "value_dim": 4},
]


@pytest.mark.parametrize("window", MIXES)
@pytest.mark.parametrize("qk_norm", ["none", "head"])
def test_layers_of_another_kind_are_refused_by_every_family(window, qk_norm):
    attention = {"num_heads": 4, "context": 16, "qk_norm": qk_norm, "window": window}
    moe = {"hidden_dim": 8, "num_experts": 4}
    for settings in ({}, {"moe": moe}, {"moe": {**moe, "shared": {"hidden_dim": 8, "gate": True}}}):
        cfg = ModelConfig(vocab_size=20, dim=16, num_layers=4, attention=attention, **settings)
        for family in FAMILIES.values():
            with suppress(ConfigError):  # and no other error
                to_fields(family, cfg, {})
    with pytest.raises(ConfigError, match=r"attention\.window"):
        to_fields(FAMILIES["qwen3_next" if window.get("kind") != "delta" else "lfm2_moe"], cfg, {})


def test_what_only_training_reads_is_no_hindrance():
    values = settings_of(MIXTRAL_8X7B).model_dump()
    values["moe"] |= {"init_scale": 0.1, "experts": {"dropout": 0.2}}
    assert to_fields(FAMILIES["mixtral"], ModelConfig(**values), MIXTRAL_8X7B) == MIXTRAL_8X7B


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, (8, 0)),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 28}, None),
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, None),
    ],
)
def test_windows_of_qwen3(fields, window):
    found = settings_of({**QWEN3_0_6B, **fields}).attention.window
    assert (found and (found.size, found.full_every)) == window


def test_layer_types():
    entry = layer_types(lambda hf: [], switch=False)
    slides, full = "sliding_attention", "full_attention"

    def read(*kinds):
        fields = {"sliding_window": 8, "layer_types": list(kinds), "num_hidden_layers": len(kinds)}
        return entry.read(fields)["attention.window"]

    assert read(slides, full, slides, full) == {"size": 8, "full_every": 2}
    assert read(slides, slides, full, slides) == {"size": 8, "full_every": 3}
    assert read(full, full) is None
    for kinds in ((full, slides, full, slides), (slides, full, full, full)):
        with pytest.raises(ConfigError, match="every n-th"):
            read(*kinds)
    with pytest.raises(ConfigError, match="chunked"):
        read("chunked_attention")


def test_a_derived_field_must_agree():
    entry = derived("head_dim", lambda cfg: cfg.head_dim)
    cfg = ModelConfig(dim=32, attention={"num_heads": 4})
    entry.check(cfg, {})
    entry.check(cfg, {"head_dim": 8})
    assert entry.write(cfg, {}) == {"head_dim": 8}
    with pytest.raises(ConfigError, match="head_dim is 9, but the other fields make it 8"):
        entry.check(cfg, {"head_dim": 9})


LATENT = ModelConfig(
    dim=16,
    attention={
        "num_heads": 2,
        "latent": LatentConfig(kv_rank=6, nope_dim=4, rope_dim=8, value_dim=4),
    },
)


DELTA = ModelConfig(
    dim=16,
    attention={
        "window": DeltaConfig(key_heads=2, value_heads=6, key_dim=4, value_dim=2),
    },
)


# Numbers that GGUF keeps in another form.
ROUNDED = ("negative_rate", "one_added")


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_layouts_are_reversible(name):
    """With the shape that they promise, for a stack, a matrix or a vector."""
    shapes = [(24, 5), (24,)] if name.startswith("rope") else [(3, 6, 4), (6, 4)]
    rows = {
        "rope_pairs_at_end": 14,
        "pairs_of_heads": 24,
        "delta_qkvz": 2 * 8 + 2 * 12,
        "delta_ba": 12,
    }.get(name)
    if rows is not None:
        shapes = [(rows, 5), (rows,)]
    elif name == "of_one_channel":
        shapes = [(6, 1, 4)]
    cfg = DELTA if name.startswith("delta") else LATENT
    for shape in shapes:
        ours = torch.randn(shape)
        theirs = LAYOUTS[name].save(ours, cfg)
        assert tuple(theirs.shape) == LAYOUTS[name].shape(shape)
        close = {"rtol": 1e-5, "atol": 1e-6} if name in ROUNDED else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(LAYOUTS[name].load(theirs, cfg), ours, **close)


def test_layouts_by_hand():
    rows = torch.arange(6.0)[None] + 10 * torch.arange(2.0)[:, None]  # [D=2, 2F=6]
    gates_then_ups = LAYOUTS["interleaved_transposed"].load(rows, LATENT)
    assert gates_then_ups[:, 0].tolist() == [0, 2, 4, 1, 3, 5]
    assert LAYOUTS["interleaved"].load(rows, LATENT)[1].tolist() == [10, 12, 14, 11, 13, 15]
    heads = LAYOUTS["rope_pairs_of_heads"].load(torch.arange(24.0), LATENT)
    assert heads[:12].tolist() == [0, 1, 2, 3, 4, 6, 8, 10, 5, 7, 9, 11]
    assert heads[12:].tolist() == [12 + n for n in (0, 1, 2, 3, 4, 6, 8, 10, 5, 7, 9, 11)]
    end = LAYOUTS["rope_pairs_at_end"].load(torch.arange(14.0), LATENT)
    assert end.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 7, 9, 11, 13]
    heads = LAYOUTS["pairs_of_heads"].load(torch.arange(16.0), LATENT)
    assert heads.tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]


def test_slices():
    rules = [
        Rule(("q{n}", "k{n}"), "blocks.{n}.qk", sizes=lambda _: (4, 2)),
        Rule(("{n}.{e}.gate", "{n}.{e}.up"), "blocks.{n}.experts[{e}]"),
        Rule(("{n}.down",), "blocks.{n}.down[0]", "transposed"),
        Rule(("unused",), "head.bias"),
    ]
    shapes = {"blocks.7.qk": (6, 3), "blocks.7.experts": (2, 8, 3), "blocks.7.down": (1, 3, 5)}
    found = {each.theirs: each for each in slices(rules, shapes)}
    assert list(found) == ["q7", "k7", "7.0.gate", "7.0.up", "7.1.gate", "7.1.up", "7.down"]
    shapes_of_theirs = [each.shape for each in found.values()]
    assert shapes_of_theirs == [(4, 3), (2, 3), (4, 3), (4, 3), (4, 3), (4, 3), (5, 3)]
    stack = torch.arange(48.0).view(2, 8, 3)
    assert torch.equal(found["7.1.up"].of(stack), stack[1, 4:])
    assert torch.equal(found["q7"].of(stack[0]), stack[0, :4])
    assert found["7.down"].of(torch.zeros(1, 3, 5)).shape == (3, 5)


@pytest.mark.parametrize("rules", [[], [Rule(("a",), "x"), Rule(("b",), "x")]])
def test_every_tensor_has_one_rule(rules):
    with pytest.raises(AssertionError, match="rules for x"):
        slices(rules, {"x": (1,)})


def test_patterns_of_ignored_keys():
    pattern = key_pattern("model.layers.{n}.rotary.*")
    assert pattern.fullmatch("model.layers.12.rotary.inv_freq")
    assert not pattern.fullmatch("model.layers.x.rotary.inv_freq")
    assert not pattern.fullmatch("model_layers.1.rotary.inv_freq")


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_tables_name_no_field_twice(name):
    family = FAMILIES[name]
    fields = [field for entry in family.entries for field in entry.theirs]
    assert len(fields) == len(set(fields))
    assert family.model_type == name
