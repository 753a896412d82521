"""What a tuning run takes over from its checkpoint, and what is stated instead."""

import json

import pytest
import torch

from moestro.checkpoints.writing import save_model, write_pretrained
from moestro.config import BalanceConfig, ModelConfig, RunConfig
from moestro.errors import ConfigError
from moestro.models.decoder import Decoder
from moestro.text import ByteTokenizer
from moestro.train.tuning import LORA_LR, tuning_settings

DEFAULT = "[data]\nseq_len = 16\nchat = {}\n"
OWN = BalanceConfig(switch=0.02, scope="global", importance=0.1, z=0.003, bias_rate=0.01)
MODEL = {
    "dim": 8,
    "num_layers": 2,
    "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "context": 32},
    "head": {"tied": False},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders: a Mixtral that names its coefficient, one with selection bias, a run's, a dense."""
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    plain = ModelConfig(**MODEL, moe={"hidden_dim": 8, "num_experts": 4, "top_k": 2})
    write_pretrained(Decoder(plain), root / "plain", family="mixtral")
    config = json.loads((root / "plain" / "config.json").read_text())
    named = config | {"router_aux_loss_coef": 0.004}
    (root / "plain" / "config.json").write_text(json.dumps(named))
    mixture = plain.moe.model_dump(mode="json")
    mixture["router"] |= {"kind": "sigmoid", "selection_bias": True}
    for name in ("biased", "run"):
        (root / name).mkdir()
        cfg = ModelConfig(**MODEL, moe=mixture)
        save_model(Decoder(cfg), root / name)
    (root / "dense").mkdir()
    save_model(Decoder(ModelConfig(**MODEL)), root / "dense")
    run = RunConfig(model=cfg, data={"seq_len": 16}, balance=OWN)
    (root / "run" / "run.json").write_text(run.model_dump_json())
    for folder in root.iterdir():
        ByteTokenizer().save(folder)
    return root


def settings(base, tmp_path, *assignments, config=None):
    default = tmp_path / "default.toml"
    default.write_text(DEFAULT)
    if config is not None:
        path = tmp_path / "own.toml"
        path.write_text(config)
        config = path
    return tuning_settings(base, tmp_path / "run", default, config, assignments)


# What each checkpoint was balanced by. config.json's coefficient counts K / L = 1 times.
MADE_WITH = {
    "plain": BalanceConfig(switch=0.004, z=0.0),
    "biased": BalanceConfig(switch=0.0, z=0.0),
    "run": OWN,
}
STATED = {"balance.z": 0.5, "balance.scope": "sequence", "balance.importance": 0.25}


@pytest.mark.parametrize("name", [None, *STATED])
@pytest.mark.parametrize("base", MADE_WITH)
def test_only_the_coefficient_that_is_stated_changes(base, name, bases, tmp_path):
    own = MADE_WITH[base]
    if name is None:
        assert settings(bases / base, tmp_path).balance == own
        return
    field, value = name.removeprefix("balance."), STATED[name]
    wanted = own.model_copy(update={field: value})
    text = json.dumps(value)
    for stated in (f"{name}={text}", f"balance={{ {field} = {text} }}"):
        assert settings(bases / base, tmp_path, stated).balance == wanted
    file = f"[balance]\n{field} = {text}"
    assert settings(bases / base, tmp_path, config=f"{DEFAULT}{file}").balance == wanted


def test_adapters_keep_the_losses_but_not_the_bias_rate(bases, tmp_path):
    stated = ["lora.rank=2", "lora.base=x", "balance.z=0.5"]
    wanted = OWN.model_copy(update={"z": 0.5, "bias_rate": 0.0})
    assert settings(bases / "run", tmp_path, *stated).balance == wanted


def test_a_part_that_is_stated_whole_keeps_what_else_suits_the_model(bases, tmp_path):
    stated = ["lora.rank=2", "lora.base=x", "optim={ warmup = 0.5 }"]
    assert settings(bases / "plain", tmp_path, *stated).optim.lr == LORA_LR


@pytest.mark.parametrize(
    ("stated", "words"),
    [("balance=3", "balance"), ("balance=null", "balance"), ("data.chat=null", "data.chat")],
)
def test_what_is_no_part_of_settings_is_refused(stated, words, bases, tmp_path):
    with pytest.raises(ConfigError, match=words):
        settings(bases / "plain", tmp_path, stated)


@pytest.mark.parametrize("stated", ["balance.bias_rate=0.1", "balance={bias_rate=0.1}"])
def test_a_rate_for_biases_needs_a_checkpoint_with_biases(stated, bases, tmp_path):
    """Its model is what it is: no setting adds them."""
    with pytest.raises(ConfigError, match=r"no selection bias.*leave balance\.bias_rate out"):
        settings(bases / "plain", tmp_path, stated)
    assert settings(bases / "biased", tmp_path, stated).balance.bias_rate == 0.1
    with pytest.raises(ConfigError, match="which adapters do not keep"):
        settings(bases / "biased", tmp_path, stated, "lora.rank=2", "lora.base=x")


def test_a_dense_model_has_no_router_to_freeze(bases, tmp_path):
    freeze = 'optim.freeze=["router"]'
    assert settings(bases / "plain", tmp_path, freeze).optim.freeze == ("router",)
    with pytest.raises(ConfigError, match="is a dense model, with no router to freeze"):
        settings(bases / "dense", tmp_path, freeze)
