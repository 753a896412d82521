"""Every mixture of the installed transformers by its own default config.json: counted, or refused.

`moestro plan` counts exactly what transformers' class would have, or says in one sentence why not.
"""

import json
import re
from pathlib import Path

import pytest
import torch

from moestro.checkpoints.families import FAMILIES, TEXT_PARTS
from moestro.checkpoints.reading import read_settings
from moestro.cli.main import main
from moestro.errors import ConfigError

transformers = pytest.importorskip("transformers")

_MIXTURE = re.compile(
    r"^class \w+(Experts|MoE|Moe|SparseMLP|TopkRouter|TopKRouter)\(", re.MULTILINE
)
_TYPE = re.compile(r'^    model_type = "([\w.-]+)"', re.MULTILINE)


def model_types() -> set[str]:
    """Of all packages of transformers that have a mixture; encoders of images beside it too."""
    found: set[str] = set()
    for package in (Path(transformers.__file__).parent / "models").iterdir():
        modeling = (path.read_text(encoding="utf-8") for path in package.glob("modeling_*.py"))
        if any(map(_MIXTURE.search, modeling)):
            for path in package.glob("configuration_*.py"):
                found |= set(_TYPE.findall(path.read_text(encoding="utf-8")))
    return found


FOUND = model_types()
KNOWN = sorted(FOUND & (FAMILIES.keys() | TEXT_PARTS.keys()))
# Defaults that describe no model that is published, why they are refused, and what counts instead.
UNUSUAL = {
    "deepseek_v2": (
        "num_experts_per_tok is null",
        {"num_experts_per_tok": 6, "moe_intermediate_size": 1408, "first_k_dense_replace": 1},
    ),
    "dots1": (
        "n_routed_experts is null",
        {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2},
    ),
    "glm4_moe": ("of a head of width 42 is 21", {"head_dim": 128}),
    "hunyuan_v1_moe": (
        "every weight the constant 1",
        {"num_experts": 64, "moe_topk": 8, "head_dim": 128},
    ),
    "lfm2_moe": ("layer_types is null", {"layer_types": (["conv"] * 3 + ["full_attention"]) * 8}),
    "switch_transformers": (
        "only 1 or 2",
        {"num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6},
    ),
}


def written(config, folder):
    path = folder / "config.json"
    path.write_text(config.to_json_string(use_diff=False))
    return str(path)


def in_transformers(config):
    """Parameters of transformers' class, selection biases included, which are buffers."""
    text = config.get_text_config() if config.model_type in TEXT_PARTS else config
    with torch.device("meta"):
        model = getattr(transformers, FAMILIES[text.model_type].architecture)(text)
    biases = (x for name, x in model.named_buffers() if name.endswith("bias"))
    return sum(tensor.numel() for tensor in (*model.parameters(), *biases))


def test_there_are_mixtures():
    assert len(KNOWN) >= 20
    assert len(FOUND - set(KNOWN)) >= 30
    assert UNUSUAL.keys() <= set(KNOWN)


@pytest.mark.parametrize("kind", KNOWN)
def test_the_default_model_is_counted_exactly(kind, tmp_path, capsys):
    config = transformers.AutoConfig.for_model(kind)
    if kind in UNUSUAL:
        message, changes = UNUSUAL[kind]
        assert main(["plan", written(config, tmp_path)]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
        config = transformers.AutoConfig.for_model(kind, **changes)
    assert main(["plan", written(config, tmp_path), "--json"]) == 0
    (planned,) = json.loads(capsys.readouterr().out)["models"]
    assert planned["total"] == in_transformers(config)


def test_all_others_are_refused_by_name_with_the_plug(tmp_path):
    path = tmp_path / "config.json"
    for kind in sorted(FOUND - set(KNOWN)):
        path.write_text(json.dumps({"model_type": kind, "num_experts": 8}))
        with pytest.raises(ConfigError, match=rf"'{kind}' is not known.*moestro\.hf\.install\(\)"):
            read_settings(path)
