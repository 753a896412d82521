"""The file is read back here by the format's own description, not by the code that wrote it."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moestro.checkpoints.gguf.random_model import KINDS, write_random
from moestro.config import ModelConfig
from moestro.errors import ConfigError

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "dim": 64,
    "num_layers": 2,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "context": 64, "qk_norm": "head"},
    "moe": {"hidden_dim": 96, "num_experts": 4, "top_k": 2},
    "head": {"tied": False},
}


def read(path: Path) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, bytes]]]:
    """Fields, and tensors as (shape, kind, bytes up to the next one's beginning)."""
    raw, at = path.read_bytes(), 0

    def take(code: str) -> Any:
        nonlocal at
        values = struct.unpack_from(f"<{code}", raw, at)
        at += struct.calcsize(f"<{code}")
        return values[0] if len(values) == 1 else values

    def text() -> str:
        nonlocal at
        length = take("Q")
        at += length
        return raw[at - length : at].decode()

    assert raw[:4] == b"GGUF"
    at = 4
    version, num_tensors, num_fields = take("I"), take("Q"), take("Q")
    assert version == 3
    fields: dict[str, Any] = {}
    for _ in range(num_fields):
        name, kind = text(), take("I")
        fields[name] = text() if kind == 8 else take({4: "I", 6: "f", 7: "?"}[kind])
    places = []
    for _ in range(num_tensors):
        name, axes = text(), take("I")
        shape = tuple(take("Q") for _ in range(axes))
        places.append((name, shape, take("I"), take("Q")))
    begin = -(-at // 32) * 32
    ends = [offset for *_, offset in places[1:]] + [len(raw) - begin]
    return fields, {
        name: (shape, kind, raw[begin + offset : begin + end])
        for (name, shape, kind, offset), end in zip(places, ends, strict=True)
    }


@pytest.mark.parametrize("name", KINDS)
def test_every_tensor_is_there_in_its_shape(name: str, tmp_path: Path) -> None:
    write_random(ModelConfig(**SIZES), KINDS[name], tmp_path / "file")
    fields, tensors = read(tmp_path / "file")
    assert fields["general.architecture"] == "qwen3moe"
    assert fields["qwen3moe.expert_used_count"] == 2
    assert fields["qwen3moe.attention.head_count_kv"] == 2
    assert fields["qwen3moe.rope.freq_base"] == 10_000
    assert len(tensors) == 3 + 2 * 12
    shape, kind, raw = tensors["blk.1.ffn_down_exps.weight"]
    assert shape == (96, 64, 4)  # innermost first
    assert kind == {"bf16": 30, "int8": 8, "int4": 2}[name]
    assert len(raw) == 96 * 64 * 4 * {"bf16": 2, "int8": 34 / 32, "int4": 18 / 32}[name]
    assert tensors["blk.0.ffn_gate_inp.weight"][:2] == ((64, 4), 0)
    assert np.frombuffer(tensors["output_norm.weight"][2], "<f4").tolist() == [1.0] * 64


@pytest.mark.parametrize("name", KINDS)
def test_numbers_have_variance_one_over_fan_in(name: str, tmp_path: Path) -> None:
    write_random(ModelConfig(**SIZES), KINDS[name], tmp_path / "file")
    raw = np.frombuffer(read(tmp_path / "file")[1]["blk.0.ffn_up_exps.weight"][2], np.uint8)
    if name == "bf16":
        numbers = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        blocks = raw.reshape(-1, 34 if name == "int8" else 18)
        scales, packed = blocks[:, :2].copy().view("<f2").astype(np.float32), blocks[:, 2:]
        if name == "int8":
            integers = packed.view(np.int8).astype(np.float32)
        else:
            integers = np.concatenate([packed & 15, packed >> 4], 1).astype(np.float32) - 8
        numbers = scales * integers
    assert numbers.std() == pytest.approx(64**-0.5, rel=0.05)


def test_a_dense_model_and_a_mixture_without_norms_are_llama(tmp_path: Path) -> None:
    plain = {**SIZES, "attention": {"num_heads": 4, "context": 64}, "head": {}}
    write_random(ModelConfig(**plain), KINDS["int8"], tmp_path / "moe")
    fields, tensors = read(tmp_path / "moe")
    assert fields["general.architecture"] == "llama"
    assert "output.weight" not in tensors
    dense = {**plain, "moe": None, "dense": {"hidden_dim": 128}}
    write_random(ModelConfig(**dense), KINDS["int8"], tmp_path / "dense")
    assert read(tmp_path / "dense")[1]["blk.0.ffn_gate.weight"][0] == (64, 128)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"norm": {"kind": "layer"}}, "layer norm"),
        ({"dense_first": 1}, "dense layers beside mixtures"),
        ({"attention": {"num_heads": 4, "window": {"size": 4}}}, "windows"),
        ({"moe": {**SIZES["moe"], "shared": {"hidden_dim": 32}}}, "shared experts"),
        ({"moe": {**SIZES["moe"], "activation": "relu"}}, "swiglu"),
        ({"moe": {**SIZES["moe"], "router": {"kind": "sigmoid"}}}, "router"),
        ({"moe": {**SIZES["moe"], "hidden_dim": 40}}, "no multiples of 32"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        write_random(ModelConfig(**{**SIZES, **changes}), KINDS["int4"], tmp_path / "file")
    assert not (tmp_path / "file").exists()
