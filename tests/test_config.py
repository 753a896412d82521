import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from moestro.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
    RunConfig,
)
from moestro.errors import ConfigError
from moestro.settings import Settings, load_settings


def subclasses(kind):
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


def test_settings_classes_are_small():
    ours = [kind for kind in subclasses(Settings) if kind.__module__.startswith("moestro.config")]
    assert len(ours) > 8
    for kind in ours:
        assert len(kind.model_fields) <= 10, kind.__name__


def test_settings_are_frozen():
    cfg = MoEConfig(dim=8, hidden_dim=16)
    with pytest.raises(ValidationError, match="frozen"):
        cfg.dim = 16


def test_settings_survive_json():
    cfg = RunConfig(
        model={"moe": {"hidden_dim": 8, "shared": {"hidden_dim": 4}, "capacity": {}}},
        data={"sources": ["a", "b"]},
    )
    assert RunConfig(**json.loads(json.dumps(cfg.model_dump(mode="json")))) == cfg


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"top_k": 9}, ["top_k", "9", "8", "between 1 and 8"]),
        ({"top_k": 0}, ["top_k", "0"]),
        ({"num_experts": 0}, ["num_experts", "0"]),
        ({"dim": -1}, ["dim", "-1"]),
        ({"activation": "swigl"}, ["activation", "swigl", "swiglu"]),
        ({"experts": {"dropout": 1.0}}, ["experts.dropout", "1.0"]),
        ({"init_scale": float("nan")}, ["init_scale"]),
        ({"init_scale": float("inf")}, ["init_scale"]),
        ({"topk": 2}, ["topk", "top_k"]),
        ({"hiden_dim": 2}, ["hiden_dim", "hidden_dim"]),
        ({"router": {"kindd": "softmax"}}, ["router", "kindd", "did you mean kind"]),
        ({"router": {"renormalize": True}, "top_k": 1}, ["renormalize", "top_k"]),
        ({"router": {"num_groups": 3, "top_groups": 1}}, ["8 experts", "3"]),
        ({"router": {"num_groups": 2, "top_groups": 3}}, ["top_groups", "3", "2"]),
        ({"router": {"num_groups": 8, "top_groups": 1}}, ["top_k", "1 of 8 groups"]),
        ({"router": {"kind": "hash", "selection_bias": True}}, ["selection_bias", "hash"]),
        ({"router": {"kind": "noisy_top_k", "num_groups": 2}}, ["num_groups", "noisy_top_k"]),
        ({"router": {"kind": "expert_choice"}, "capacity": {}}, ["expert_choice", "capacity"]),
        ({"capacity": {"factor": 0}}, ["capacity", "factor", "0"]),
    ],
)
def test_bad_mixture_settings_say_what_is_wrong(values, words):
    with pytest.raises(ConfigError) as caught:
        MoEConfig(**{"dim": 8, "hidden_dim": 16, **values})
    for word in words:
        assert word in str(caught.value)


def test_missing_setting_is_named():
    with pytest.raises(ConfigError, match="hidden_dim is required"):
        MoEConfig(dim=8)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dim": 30, "attention": {"num_heads": 4}}, ["dim 30", "4 heads"]),
        ({"dim": 12, "attention": {"num_heads": 4}}, ["dim 12", "even"]),
        ({"attention": {"num_heads": 4, "num_kv_heads": 3}}, ["4 heads", "3 key/value"]),
        ({"attention": {"head_dim": 5}}, ["head_dim", "5", "even"]),
        ({"dim": 64, "moe": {"dim": 32, "hidden_dim": 8}}, ["moe.dim", "32", "64"]),
        ({"num_layers": 2, "dense_first": 2, "moe": {"hidden_dim": 8}}, ["no layer"]),
        ({"num_layers": 2, "moe_every": 3, "moe": {"hidden_dim": 8}}, ["no layer"]),
        ({"moe": {"hidden_dim": 8, "topk": 1}}, ["moe", "topk", "did you mean top_k"]),
    ],
)
def test_bad_model_settings_say_what_is_wrong(values, words):
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**values)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"data": {"seq_len": 512}}, ["seq_len", "512", "256"]),
        ({"train": {"batch_size": 5, "accumulate": 2}}, ["batch_size", "5", "2"]),
        (
            {"model": {"moe": {"hidden_dim": 8}}, "balance": {"bias_rate": 1e-3}},
            ["bias_rate", "selection_bias"],
        ),
        ({"model": {"moe": {"hidden_dim": 8}}, "balance": {"load": 0.1}}, ["load", "noisy"]),
        ({"balance": {"switch": -1}}, ["balance", "switch", "-1"]),
        ({"trian": {}}, ["trian", "train"]),
    ],
)
def test_bad_run_settings_say_what_is_wrong(values, words):
    with pytest.raises(ConfigError) as caught:
        RunConfig(**values)
    for word in words:
        assert word in str(caught.value)


def test_mixture_takes_the_models_width():
    assert ModelConfig(dim=64, moe={"hidden_dim": 8}).moe.dim == 64
    assert ModelConfig(moe={"hidden_dim": 8}).moe.dim == ModelConfig().dim


@given(st.integers(1, 12), st.integers(0, 11), st.integers(1, 4))
def test_which_layers_are_mixtures(num_layers, dense_first, moe_every):
    expected = [n for n in range(num_layers) if n >= dense_first and n % moe_every == moe_every - 1]
    values = {"num_layers": num_layers, "dense_first": dense_first, "moe_every": moe_every}
    if not expected:
        with pytest.raises(ConfigError):
            ModelConfig(moe={"hidden_dim": 8}, **values)
        return
    cfg = ModelConfig(moe={"hidden_dim": 8}, **values)
    assert [n for n in range(num_layers) if cfg.is_moe_layer(n)] == expected
    assert not any(map(ModelConfig(**values).is_moe_layer, range(num_layers)))


def test_heads_default_to_plain_attention():
    cfg = ModelConfig(dim=64, attention=AttentionConfig(num_heads=4))
    assert (cfg.head_dim, cfg.num_kv_heads) == (16, 4)
    cfg = ModelConfig(dim=64, attention={"num_heads": 4, "num_kv_heads": 2, "head_dim": 10})
    assert (cfg.head_dim, cfg.num_kv_heads) == (10, 2)


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_settings_files(tmp_path, suffix):
    path = tmp_path / f"run{suffix}"
    text = '{"model": {"dim": 64}}' if suffix == ".json" else "[model]\ndim = 64\n"
    path.write_text(text)
    cfg = load_settings(RunConfig, path, ["model.num_layers=2", "data.tokenizer=bpe:512"])
    assert (cfg.model.dim, cfg.model.num_layers, cfg.data.tokenizer) == (64, 2, "bpe:512")


def test_overrides_reach_deep_and_take_toml_values():
    overrides = [
        "model.moe.hidden_dim=8",
        "model.moe.router.renormalize=true",
        "optim.betas=[0.8, 0.9]",
        "data.sources=['x.txt']",
    ]
    cfg = load_settings(RunConfig, None, overrides)
    assert cfg.model.moe.hidden_dim == 8
    assert cfg.model.moe.router == RouterConfig(renormalize=True)
    assert cfg.optim.betas == (0.8, 0.9)
    assert cfg.data == DataConfig(sources=("x.txt",))


def test_an_override_can_unset():
    overrides = ["model.moe.hidden_dim=8", "model.moe=null", "data.domains=none"]
    cfg = load_settings(RunConfig, None, overrides)
    assert cfg.model.moe is None
    assert cfg.data.domains == "none"


@pytest.mark.parametrize("assignment", ["model.dim", "=3", "model..dim=3", ""])
def test_malformed_override(assignment):
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        load_settings(RunConfig, None, [assignment])


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.toml", "x = = 1"), ("a.json", "{"), ("a.json", "[1]"), ("a.toml", "\udcff")],
)
def test_unreadable_settings_file(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=name):
        load_settings(RunConfig, path)


def test_missing_settings_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.toml"):
        load_settings(RunConfig, tmp_path / "nothing.toml")


@pytest.mark.parametrize("name", ["train", "data"])
def test_a_seed_is_what_torch_takes(name):
    for seed in (-(2**63), 2**63 - 1):
        torch.Generator().manual_seed(getattr(RunConfig(**{name: {"seed": seed}}), name).seed)
    for seed in (-(2**63) - 1, 2**63):
        with pytest.raises(ConfigError, match=rf"{name}\.seed"):
            RunConfig(**{name: {"seed": seed}})
