"""Every field that is asked for, of every type that a file can give it: nobody vouches for it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from moestro.checkpoints.families import family_of
from moestro.checkpoints.families.translate import to_settings
from moestro.checkpoints.gguf.fields import flag, number, numbers, text, texts, whole
from moestro.checkpoints.gguf.header import Header
from moestro.checkpoints.gguf.settings import NETWORKS, config_json
from moestro.checkpoints.gguf.tokenizer import tokenizer_files
from moestro.config import ModelConfig
from moestro.errors import ConfigError, MoestroError

# A value of each type of GGUF, and numbers that nothing has that many of.
ODD = (
    0, 2, -1, 7, 2**40, 2**63, 0.0, 2.5, -1.5, float("nan"), float("inf"), 1e300, True, False, "",
    "x", [], ["a", "b"], np.array([], np.int32), np.array([3, 3]), np.array([1, 2]),
    np.array([0.5, np.nan]), np.array([True, False]),
)  # fmt: skip
GOOD = {
    "embedding_length": 32, "block_count": 2, "context_length": 64, "feed_forward_length": 32,
    "attention.head_count": 4, "attention.head_count_kv": 4, "attention.key_length": 8,
    "attention.value_length": 8, "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.kv_lora_rank": 16, "rope.dimension_count": 8,
    "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 16,
    "expert_shared_count": 1, "expert_shared_feed_forward_length": 16, "ssm.time_step_rank": 4,
    "ssm.conv_kernel": 4, "ssm.state_size": 8, "ssm.group_count": 2, "ssm.inner_size": 32,
}  # fmt: skip
YARN = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 32,
}  # fmt: skip
TOKENS = ["<s>", "a", "b", "ab"]


@dataclass(frozen=True)
class Watched(Header):
    """A header that notes which of its fields were asked for."""

    asked: set[str] = field(default_factory=set)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(self.name(key))
        return super().get(key, default)


def of_network(name: str, changes: dict[str, Any]) -> Watched:
    fields = {f"{name}.{key}": value for key, value in GOOD.items()}
    if name in ("llama", "gpt-oss"):
        fields |= {f"{name}.{key}": value for key, value in YARN.items()}
    if name == "deepseek2":
        fields[f"{name}.rope.dimension_count"] = 4
    else:
        del fields[f"{name}.attention.kv_lora_rank"]
    if name == "bailingmoe2":
        fields |= {f"{name}.expert_gating_func": 2, f"{name}.expert_weights_norm": True}
    general = {"general.architecture": name, "tokenizer.ggml.tokens": TOKENS}
    return Watched(Path("m.gguf"), {**general, **fields, **changes}, ())


def of_tokenizer(model: str, changes: dict[str, Any]) -> Watched:
    key = "tokenizer.ggml."
    fields: dict[str, Any] = {f"{key}model": model, f"{key}tokens": TOKENS}
    fields |= {f"{key}bos_token_id": 0, f"{key}token_type": np.array([3, 1, 1, 1])}
    if model == "gpt2":
        fields |= {f"{key}pre": "qwen2", f"{key}merges": ["a b"]}
    else:
        fields[f"{key}scores"] = np.array([0.0, -1.0, -2.0, -3.0])
    return Watched(Path("m.gguf"), {**fields, **changes}, ())


def settings(header: Header) -> None:
    fields = config_json(header)
    to_settings(family_of(fields["model_type"], "m.gguf"), fields)


def altered(
    make: Callable[[str, dict[str, Any]], Watched], name: str, read: Callable[[Header], object]
) -> Iterator[tuple[str, object, Header]]:
    """Each field asked for, with each odd value; the file without changes is read first."""
    good = make(name, {})
    read(good)
    assert len(good.asked) >= 8
    for key in sorted(good.asked):
        for value in ODD:
            yield key, value, make(name, {key: value})


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_read_or_refused(name: str) -> None:
    refused = 0
    for key, value, header in altered(of_network, name, settings):
        try:
            settings(header)
        except MoestroError:
            refused += 1
        except Exception as error:
            pytest.fail(f"{key} = {value!r}: {error!r}")
    assert refused > 100


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_tokenizer_is_read_or_refused(model: str) -> None:
    refused = 0
    for key, value, header in altered(of_tokenizer, model, tokenizer_files):
        try:
            tokenizer_files(header)
        except MoestroError:
            refused += 1
        except Exception as error:
            pytest.fail(f"{key} = {value!r}: {error!r}")
    assert refused > 50


@pytest.mark.parametrize("first", ["", " ", "$A", "a b", "$x", "x:1", "bos"])
def test_a_text_begins_with_any_token(first: str) -> None:
    changes = {f"tokenizer.ggml.{key}": value for key, value in {
        "tokens": [first, "a", "b", "ab"], "add_bos_token": True}.items()}  # fmt: skip
    files = tokenizer_files(of_tokenizer("gpt2", changes))
    assert Tokenizer.from_str(files["tokenizer.json"]).encode("ab").ids == [0, 3]


@pytest.mark.parametrize(
    ("read", "accepted"),
    [
        (number, (0, 2.5, np.array([3, 3]))),
        (whole, (0, 2**63, np.array([3, 3]))),
        (lambda header, key: flag(header, key, False), (True, False)),
        (text, ("", "x")),
        (texts, ([], ["a", "b"])),
        (numbers, (np.array([], np.int32), np.array([1, 2]), np.array([0.5, np.nan]))),
    ],
    ids=["number", "whole", "flag", "text", "texts", "numbers"],
)
def test_each_reader_takes_its_own_type_alone(
    read: Callable[[Header, str], object], accepted: tuple[object, ...]
) -> None:
    def types(values: tuple[object, ...]) -> set[str]:
        return {f"{type(each)}{getattr(each, 'dtype', '')}" for each in values}

    for value in accepted:
        read(Header(Path("m.gguf"), {"qwen2.x": value, "general.architecture": "qwen2"}, ()), ".x")
    for value in ODD:
        if types((value,)) & types(accepted):
            continue
        header = Header(Path("m.gguf"), {"qwen2.x": value, "general.architecture": "qwen2"}, ())
        with pytest.raises(ConfigError, match=r"m\.gguf: .*qwen2\.x (is|differs)"):
            read(header, ".x")


def test_heads_without_width_are_refused() -> None:
    for name, key in (("llama", "attention.key_length"), ("deepseek2", "rope.dimension_count")):
        with pytest.raises(ConfigError, match=r"m\.gguf .*has to be positive"):
            config_json(of_network(name, {f"{name}.{key}": 0}))


def test_the_good_files_are_models() -> None:
    found = config_json(of_network("qwen3moe", {}))
    cfg = to_settings(family_of("qwen3_moe", "m.gguf"), found)
    assert isinstance(cfg, ModelConfig)
    assert (cfg.dim, cfg.num_layers, cfg.head_dim) == (32, 2, 8)
