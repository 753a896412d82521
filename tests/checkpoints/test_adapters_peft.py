"""Adapters of ours in peft and of peft here, float64, on models of transformers (where peft is)."""

import copy
import warnings

import pytest
import torch

from moestro.checkpoints.families import family_of
from moestro.checkpoints.opening import open_checkpoint, use_adapter
from moestro.checkpoints.peft import read_peft, write_peft
from moestro.checkpoints.transfer import outgoing
from moestro.config import LoraConfig
from moestro.errors import ConfigError
from moestro.models.adapters import attach, attached, merge

from .families.tiny import build, save

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")

FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "gpt_oss", "llama", "deepseek_v3", "llama4")


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    """A tiny model of transformers in float64, its folder, and tokens."""
    theirs = build(request.param).double()
    folder = tmp_path_factory.mktemp("base") / request.param
    save(theirs, folder)
    return theirs, folder, torch.randint(3, 60, (2, 9))


def ours(folder):
    return open_checkpoint(folder, dtype=torch.float64).model


def merged(theirs, own):
    """The model of transformers with the weights of ours, adapters merged into them.

    In it, and not in ours: its norms and routers compute in fp32 even in float64.
    """
    own = copy.deepcopy(own)
    merge(own)
    family = family_of(theirs.config.model_type, "")
    state = {each.key: each.make() for each in outgoing(family, own, fused_experts=True)}
    other = copy.deepcopy(theirs)
    other.load_state_dict(state)
    return other


def gap(one, other, tokens):
    with torch.no_grad():
        return (one(tokens).logits - other(tokens).logits).abs().max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "targets", [("attention", "router", "experts", "dense"), ("experts",), ("attention",)]
)
def test_ours_in_peft(both, targets, tmp_path):
    theirs, folder, tokens = both
    own = ours(folder)
    try:
        attach(own, LoraConfig(rank=4, alpha=6.0, targets=targets))
    except ConfigError as error:  # a dense model has no experts
        pytest.skip(str(error))
    if len(targets) > 1:  # of another rank and scale than the others
        attach(own, LoraConfig(rank=2, alpha=5.0, targets=targets[-2:]))
    for adapter in attached(own).values():
        torch.nn.init.normal_(adapter.b)
        adapter.double()
    family = family_of(theirs.config.model_type, "")
    write_peft(own, family, tmp_path / "adapter", str(folder))
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "adapter").double()
    assert gap(wrapped, theirs, tokens) > 1e-3
    assert gap(wrapped, merged(theirs, own), tokens) < 1e-12
    opened = open_checkpoint(folder, dtype=torch.float64)
    use_adapter(opened, tmp_path / "adapter")
    assert gap(wrapped, merged(theirs, opened.model), tokens) < 1e-12


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"target_parameters": ["mlp.experts.down_proj"], "target_modules": ["q_proj", "o_proj"]},
        {
            "target_modules": ["k_proj", "v_proj"],
            "use_rslora": True,
            "alpha_pattern": {"v_proj": 3},
        },
        # Llama-4's router is a linear layer that returns a pair, which peft's wrapper cannot.
        {"target_modules": "all-linear", "exclude_modules": ["router"]},
    ],
)
def test_peft_in_ours(both, options, tmp_path):
    theirs, folder, tokens = both
    options = {"target_modules": [], **options}
    cfg = peft.LoraConfig(
        r=4, lora_alpha=10, init_lora_weights=False, task_type="CAUSAL_LM", **options
    )
    try:
        wrapped = peft.get_peft_model(copy.deepcopy(theirs), cfg).double()
    except ValueError as error:
        pytest.skip(str(error))
    wrapped.save_pretrained(tmp_path / "adapter")
    own = ours(folder)
    if any("kv_b_proj" in name for name in wrapped.state_dict() if "lora" in name):
        # Decoding multiplies by parts of it, so it takes no adapter here.
        with pytest.raises(ConfigError, match=r"self_attn.kv_b_proj: no adapters are taken"):
            read_peft(own, family_of(theirs.config.model_type, ""), tmp_path / "adapter")
        return
    read_peft(own, family_of(theirs.config.model_type, ""), tmp_path / "adapter")
    assert gap(wrapped, theirs, tokens) > 1e-3
    assert gap(wrapped, merged(theirs, own), tokens) < 1e-12


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("qwen2_moe", "mlp.shared_expert_gate"),
        ("qwen3_next", "linear_attn.in_proj_ba, linear_attn.in_proj_qkvz, linear_attn.out_proj"),
        ("lfm2", "conv.in_proj, conv.out_proj"),
        ("deepseek_v32", "self_attn.indexer.weights_proj"),
    ],
)
def test_modules_of_peft_that_take_no_adapters_here_are_named(name, modules, tmp_path):
    theirs = build(name)
    save(theirs, tmp_path / "base")
    cfg = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear")
    peft.get_peft_model(theirs, cfg).save_pretrained(tmp_path / "adapter")
    family = family_of(theirs.config.model_type, "")
    with pytest.raises(ConfigError, match="no adapters are taken there") as raised:
        read_peft(ours(tmp_path / "base"), family, tmp_path / "adapter")
    assert modules in str(raised.value)
    assert "q_proj" not in str(raised.value)
