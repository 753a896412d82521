"""What the tables of the families refuse, and what they make of fields said in several ways."""

import pytest
import torch

from moestro.checkpoints.families import FAMILIES
from moestro.checkpoints.families.translate import to_fields, to_settings
from moestro.config import ModelConfig
from moestro.errors import ConfigError

from . import tiny
from .published import PUBLISHED

Lfm2MLP = pytest.importorskip("transformers.models.lfm2.modeling_lfm2").Lfm2MLP


def settings(name, **changes):
    fields = {**PUBLISHED[name][0], **changes}
    fields = {key: value for key, value in fields.items() if value != "left out"}
    return to_settings(FAMILIES[fields["model_type"]], fields)


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_unknown_field_is_refused(name):
    with pytest.raises(ConfigError, match="unknown field attention_of_tomorrow"):
        settings(name, attention_of_tomorrow=True)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("OLMoE-1B-7B-0924", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ("OLMoE-1B-7B-0924", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ("Qwen3-30B-A3B", {"mlp_only_layers": [3]}, "only the first layers can be kept dense"),
        ("Qwen3-30B-A3B", {"mlp_only_layers": list(range(48))}, "some have to be mixtures"),
        ("Qwen3-30B-A3B", {"num_local_experts": 64}, r"say \[64, 128\]"),
        ("Qwen3-30B-A3B", {"num_experts": "left out"}, r"say \[\]"),
        ("deepseek-moe-16b-base", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ("deepseek-moe-16b-base", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ("DeepSeek-V2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
        ("DeepSeek-V2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("DeepSeek-V2", {"num_key_value_heads": 8}, "num_key_value_heads is 8.* make it 128"),
        ("DeepSeek-V3", {"rope_interleave": False}, "rope_interleave is False"),
        ("DeepSeek-V3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("DeepSeek-V3", {"attention_bias": True}, "attention_bias is True"),
        ("DeepSeek-V3.2", {"q_lora_rank": None}, "set q_rank"),
        ("DeepSeek-V3.2", {"layer_types": ["full_attention"] * 61}, "layer_types is .* make it"),
        ("DeepSeek-V3.2", {"mlp_layer_types": ["sparse"] * 61}, "mlp_layer_types is .* make it"),
        ("DeepSeek-V3.2", {"index_topk": 0}, "top_k"),
        ("GLM-4.7-Flash", {"mlp_layer_types": ["sparse"] * 46 + ["dense"]}, "only 47 entries"),
        ("GLM-4.7-Flash", {"first_k_dense_replace": 3}, "is 3.* make it 1"),
        ("GLM-4.5-Air", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("GLM-4.5-Air", {"partial_rotary_factor": 0.01}, "is 1; pairs turn"),
        ("Qwen3-30B-A3B", {"partial_rotary_factor": 0.5}, "unknown field partial_rotary_factor"),
        ("MiniMax-M2", {"partial_rotary_factor": 1.0}, "rotary_dim is 64.* make it 128"),
        ("MiniMax-M2", {"attn_type_list": [0] * 62}, "attn_type_list"),
        ("MiniMax-M2", {"use_routing_bias": False}, "use_routing_bias is False"),
        ("MiniMax-M2", {"qk_norm_type": "per_head"}, "qk_norm_type is 'per_head'"),
        ("MiniMax-M2", {"layernorm_mlp_beta": 2.0}, "a residual that is scaled"),
        ("ERNIE-4.5-21B-A3B-PT", {"moe_layer_end_index": 20}, "layer 27 is a mixture"),
        ("ERNIE-4.5-21B-A3B-PT", {"use_bias": True}, "use_bias is True"),
        ("ERNIE-4.5-21B-A3B-PT", {"moe_use_aux_free": False}, "without a selection bias"),
        ("Hunyuan-A13B-Instruct", {"use_cla": True}, "keys and values that layers share"),
        ("Hunyuan-A13B-Instruct", {"moe_topk": [8] * 31 + [4]}, "one number for all layers"),
        ("Hunyuan-A13B-Instruct", {"moe_topk": "left out"}, "moe_topk is missing"),
        ("Hunyuan-A13B-Instruct", {"moe_intermediate_size": [1] * 32}, "only 3072 can be"),
        ("Hunyuan-A13B-Instruct", {"num_shared_expert": 2}, "num_shared_expert is 2; only 1"),
        ("Hunyuan-A13B-Instruct", {"rope_scaling": {"type": "dynamic"}}, "only with an alpha"),
        ("Ling-mini-2.0", {"score_function": "left out"}, "only 'sigmoid', of Ling 2.0"),
        ("Ling-mini-2.0", {"moe_shared_expert_intermediate_size": 99}, "other fields make it 512"),
        ("Ling-mini-2.0", {"norm_head": True}, "a head whose rows are normalised"),
        ("dots.llm1.inst", {"scoring_func": "softmax"}, "'noaux_tc' or 'sigmoid'"),
        ("dots.llm1.inst", {"use_sliding_window": True}, "layers that look back on a few"),
        ("dots.llm1.inst", {"sliding_window": 64, "max_window_layers": 9}, "no other pattern"),
        ("LFM2-8B-A1B", {"layer_types": "left out"}, "layer_types is missing"),
        ("LFM2-8B-A1B", {"layer_types": ["conv"] * 23}, "23 entries for 24 layers"),
        ("LFM2-8B-A1B", {"layer_types": ["mamba"] * 24}, "has 'mamba'; known: conv and full"),
        ("LFM2-8B-A1B", {"conv_bias": True}, "conv_bias is True"),
        ("LFM2-1.2B", {"use_pos_enc": False}, "would mean no positions"),
        ("LFM2-1.2B", {"conv_dim": 1024}, "conv_dim is 1024.* make it 2048"),
        ("gpt-oss-20b", {"swiglu_limit": 9.0}, "swiglu_limit is 9.0"),
        ("gpt-oss-20b", {"experts_per_token": 8}, "experts_per_token is 8.* make it 4"),
        ("gpt-oss-20b", {"sliding_window": None}, "sliding_window is not set"),
        ("gpt-oss-20b", {"layer_types": ["full_attention"] * 7}, "7 entries for 24 layers"),
        ("Phi-3.5-MoE-instruct", {"num_experts_per_tok": 3}, "sparsemixer chooses 2"),
    ],
)
def test_what_cannot_be_expressed_is_refused(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(name, **changes)


def test_kimi_k2_is_deepseek_v3_by_another_name():
    fields = {**PUBLISHED["DeepSeek-V3"][0], "model_type": "kimi_k2"}
    assert to_settings(FAMILIES["kimi_k2"], fields) == settings("DeepSeek-V3")
    assert FAMILIES["kimi_k2"].rules == FAMILIES["deepseek_v3"].rules
    cfg = settings("Kimi-K2-Instruct")
    assert (cfg.moe.num_experts, cfg.attention.positions.scaling.factor) == (384, 32)
    assert to_fields(FAMILIES["kimi_k2"], cfg, {})["model_type"] == "kimi_k2"


@pytest.mark.parametrize(
    ("start", "end", "every", "mixtures"),
    [(1, -1, 1, range(1, 28)), (3, 27, 1, range(3, 28)), (0, 26, 3, range(2, 28, 3))],
)
def test_layers_of_ernie_that_are_mixtures(start, end, every, mixtures):
    indices = {"moe_layer_start_index": start, "moe_layer_end_index": end}
    cfg = settings("ERNIE-4.5-21B-A3B-PT", **indices, moe_layer_interval=every)
    assert [n for n in range(28) if cfg.is_moe_layer(n)] == list(mixtures)


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({}, 8192),
        ({"block_ff_dim": 10240}, 6912),
        ({"block_ff_dim": "left out", "intermediate_size": 6656}, 4608),
        ({"block_ffn_dim_multiplier": 1.5, "block_multiple_of": 100}, 12300),
        ({"block_auto_adjust_ff_dim": False}, 12288),
    ],
)
def test_width_of_lfm2(changes, width):
    """As the module of transformers has it."""
    cfg = settings("LFM2-1.2B", **changes)
    assert cfg.dense.hidden_dim == width
    assert to_settings(FAMILIES["lfm2"], to_fields(FAMILIES["lfm2"], cfg, {})) == cfg
    fields = {key: value for key, value in changes.items() if value != "left out"}
    theirs = tiny.transformers.Lfm2Config(**{"intermediate_size": 12288, **fields})
    with torch.device("meta"):
        assert tuple(Lfm2MLP(theirs).w1.weight.shape) == (width, 2560)


def test_alpha_of_hunyuan_stretches_the_base():
    theta = settings("Hunyuan-A13B-Instruct").attention.positions.theta
    assert theta == 10_000.0 * 1000.0 ** (128 / 126)
    plain = settings("Hunyuan-A13B-Instruct", rope_scaling=None).attention.positions
    assert (plain.theta, plain.scaling) == (10_000.0, None)


def test_layers_of_glm_that_are_dense():
    fields = dict(PUBLISHED["GLM-4.7-Flash"][0])
    del fields["first_k_dense_replace"]
    two = ["dense"] * 2 + ["sparse"] * 45
    cfg = to_settings(FAMILIES["glm4_moe_lite"], {**fields, "mlp_layer_types": two})
    assert cfg.dense_first == 2
    assert to_fields(FAMILIES["glm4_moe_lite"], cfg, {})["mlp_layer_types"] == two


def test_how_much_of_a_head_turns_is_said_in_three_ways():
    """Beside the other fields (GLM), among the rotary ones (transformers 5), or as a width."""
    for changes, fraction in (
        ({}, 0.5),
        ({"partial_rotary_factor": "left out"}, 0.5),
        ({"partial_rotary_factor": 0.25}, 0.25),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.75}}, 0.75),
    ):
        assert settings("GLM-4.5-Air", **changes).attention.positions.fraction == fraction
    for changes, fraction in (
        ({}, 0.5),
        ({"rotary_dim": "left out"}, 1.0),
        ({"rotary_dim": 32}, 0.25),
        ({"rotary_dim": 32, "partial_rotary_factor": 0.25}, 0.25),
    ):
        assert settings("MiniMax-M2", **changes).attention.positions.fraction == fraction
    cfg = settings("GLM-4.5-Air", partial_rotary_factor=0.25)
    assert to_fields(FAMILIES["glm4_moe"], cfg, PUBLISHED["GLM-4.5-Air"][0]) == {
        **PUBLISHED["GLM-4.5-Air"][0],
        "num_nextn_predict_layers": 0,
        "partial_rotary_factor": 0.25,
    }
    with pytest.raises(ConfigError, match=r"cannot express attention\.positions\.fraction"):
        to_fields(FAMILIES["dots1"], settings("dots.llm1.inst").model_copy(
            update={"attention": cfg.attention.model_copy(update={
                "bias": "none", "qk_norm": "head", "num_heads": 32, "num_kv_heads": 32})}
        ), {})  # fmt: skip


def test_first_layers_kept_dense_and_every_other_layer_a_mixture():
    cfg = settings("Qwen3-30B-A3B", mlp_only_layers=[0, 1, 2, 3], decoder_sparse_step=2)
    assert [n for n in range(8) if cfg.is_moe_layer(n)] == [5, 7]
    fields = to_fields(FAMILIES["qwen3_moe"], cfg, {})
    assert (fields["mlp_only_layers"][-1], fields["decoder_sparse_step"]) in ((3, 2), (4, 2))
    assert to_settings(FAMILIES["qwen3_moe"], fields).is_moe_layer(5)


def test_the_number_of_experts_has_two_names():
    cfg = settings("Qwen3-30B-A3B", num_local_experts=128, num_experts="left out")
    assert cfg.moe.num_experts == 128
    original = {**PUBLISHED["Qwen3-30B-A3B"][0], "num_local_experts": 128}
    del original["num_experts"]
    assert to_fields(FAMILIES["qwen3_moe"], cfg, original) == original


def test_windows_that_are_switched_off_are_no_windows():
    assert settings("Qwen1.5-MoE-A2.7B").attention.window is None
    cfg = settings("Qwen1.5-MoE-A2.7B", use_sliding_window=True, max_window_layers=24)
    assert [cfg.window(n) for n in range(4)] == [32768, None, 32768, None]
    cfg = settings("Qwen3-30B-A3B", use_sliding_window=True, sliding_window=512)
    assert [cfg.window(n) for n in range(3)] == [512] * 3
    cfg = settings("gpt-oss-20b", layer_types="left out")
    assert [cfg.window(n) for n in range(4)] == [128, None, 128, None]


def test_shared_experts_lie_side_by_side():
    assert settings("DeepSeek-V2").moe.shared.hidden_dim == 2 * 1536
    cfg = settings("DeepSeek-V2")
    odd = cfg.model_copy(
        update={"moe": cfg.moe.model_copy(update={"shared": cfg.moe.shared.model_copy(
            update={"hidden_dim": 1000})})}
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"a multiple of moe\.hidden_dim"):
        to_fields(FAMILIES["deepseek_v2"], odd, {})


def test_a_family_refuses_settings_that_it_cannot_express():
    with pytest.raises(ConfigError, match="cannot express"):
        to_fields(FAMILIES["mixtral"], settings("OLMoE-1B-7B-0924"), {})
    with pytest.raises(ConfigError, match="takes ModelConfig, not EncDecConfig"):
        to_fields(FAMILIES["mixtral"], settings("switch-base-8"), {})


def test_key_value_heads_are_written_out_where_ours_leaves_them_to_the_heads():
    """Not every class of transformers takes null for "as many as heads"."""
    experts = {"hidden_dim": 16, "num_experts": 4, "top_k": 2}
    cfg = ModelConfig(dim=32, head={"tied": False}, attention={"num_heads": 4}, moe=experts)
    assert to_fields(FAMILIES["mixtral"], cfg, {})["num_key_value_heads"] == 4
