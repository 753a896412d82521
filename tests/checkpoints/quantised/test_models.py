"""Quantised checkpoints of whole models against plain ones of the numbers that they stand for."""

import json
import re
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.writing import write_pretrained
from moestro.errors import CheckpointError

from ..families import tiny
from . import packing

# Widths that words of eight values fill.
EVEN = {
    "hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32, "head_dim": 8,
    "shared_expert_intermediate_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "attention_bias": False, "num_hidden_layers": 2,
}  # fmt: skip
PARTS = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight", "_proj_with_mqa.weight")
FAMILIES = (
    "llama", "mistral", "qwen3", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2",
    "deepseek_v3", "phimoe",
)  # fmt: skip


def even(name, folder, monkeypatch):
    """A tiny model of a family, with widths that can be packed, saved."""
    kind, changes = tiny.TINY[name]
    own = {key: value for key, value in EVEN.items()
           if changes.get(key, tiny.BODY.get(key)) is not None}  # fmt: skip
    if name.startswith("deepseek"):
        own["num_key_value_heads"] = own["num_attention_heads"]
    monkeypatch.setitem(tiny.TINY, "even", (kind, {**changes, **own}))
    tiny.save(tiny.build("even"), folder)


def quantise(plain, folder, settings, pack, extra=lambda key: {}):
    """Pack the projections of a folder into another one; the first gets what they stand for."""
    tensors, packed = load_file(plain / "model.safetensors"), {}
    matrices = [key for key in tensors if key.endswith(PARTS)]
    assert len(matrices) >= 7
    for key in matrices:
        parts, tensors[key] = pack(tensors[key])
        base = key.removesuffix(".weight")
        packed |= {base + suffix: part.clone() for suffix, part in parts.items()}
        packed |= extra(base)
    kept = {key: tensor for key, tensor in tensors.items() if key not in matrices}
    shutil.copytree(plain, folder)
    save_file({**kept, **packed}, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    fields = {**json.loads(path.read_text()), "quantization_config": settings}
    path.write_text(json.dumps(fields))
    return matrices


@torch.no_grad()
def logits(model):
    torch.manual_seed(0)
    return model(torch.randint(0, tiny.VOCABULARY, (2, 19))).logits


@pytest.fixture
def plain(tmp_path, monkeypatch):
    even("qwen3_moe", tmp_path / "plain", monkeypatch)
    return tmp_path / "plain"


@pytest.mark.parametrize("form", packing.FORMS)
def test_logits_are_those_of_the_numbers(form, plain, tmp_path):
    before = load_file(plain / "model.safetensors")
    matrices = quantise(plain, tmp_path / "packed", *packing.FORMS[form])
    after = load_file(plain / "model.safetensors")
    for key in matrices:  # the test's own packing is no nonsense
        error = (after[key] - before[key]).norm() / before[key].norm()
        assert 0 < error < 0.25
    ours = open_checkpoint(tmp_path / "packed", dtype="float32")
    expected = open_checkpoint(plain, dtype="float32")
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], tensor), name
    assert torch.equal(logits(ours.model), logits(expected.model))
    # Written back it is plain.
    write_pretrained(ours.model, tmp_path / "back", hf_config=ours.hf_config)
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert again.keys() == after.keys()
    assert all(torch.equal(again[key], after[key]) for key in after)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("form", ["gptq_order", "packed_zeros", "nf4_double"])
def test_every_family_takes_them(name, form, tmp_path, monkeypatch):
    even(name, tmp_path / "plain", monkeypatch)
    quantise(tmp_path / "plain", tmp_path / "packed", *packing.FORMS[form])
    ours = open_checkpoint(tmp_path / "packed", dtype="float32").model
    expected = open_checkpoint(tmp_path / "plain", dtype="float32").model
    assert torch.equal(logits(ours), logits(expected))


def test_attention_of_gpt_oss_in_int8(tmp_path, monkeypatch):
    """Its experts lie in one tensor, which these forms leave plain."""
    tiny.save(tiny.build("gpt_oss_even"), tmp_path / "plain")
    settings, pack = packing.FORMS["int8_rows"]
    quantise(tmp_path / "plain", tmp_path / "packed", settings, pack)
    ours = open_checkpoint(tmp_path / "packed", dtype="float32").model
    assert torch.equal(logits(ours), logits(open_checkpoint(tmp_path / "plain").model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "form", ["gptq_zeros", "awq", "packed_zeros", "int8_rows", "fp8_blocks", "nf4"]
)
def test_other_dtypes_are_rounded_once(form, dtype, plain, tmp_path):
    quantise(plain, tmp_path / "packed", *packing.FORMS[form])
    ours = open_checkpoint(tmp_path / "packed", dtype=dtype).model
    wide = open_checkpoint(plain, dtype="float32").model
    for block, other in zip(ours.blocks, wide.blocks, strict=True):
        assert torch.equal(block.ffn.experts.gate_up, other.ffn.experts.gate_up.to(dtype))
        assert torch.equal(block.ffn.experts.down, other.ffn.experts.down.to(dtype))


def test_scales_of_activations_and_of_the_cache_are_left_out(plain, tmp_path):
    def extra(base):
        found = {f"{base}.input_scale": torch.ones(1)}
        if base.endswith("k_proj"):
            found[base.removesuffix("k_proj") + "k_scale"] = torch.ones(1)
        return found

    quantise(plain, tmp_path / "packed", *packing.FORMS["fp8_static"], extra)
    ours = open_checkpoint(tmp_path / "packed", dtype="float32").model
    assert torch.equal(logits(ours), logits(open_checkpoint(plain).model))


def test_biases_of_zeros_are_nothing_and_others_are_refused(plain, tmp_path):
    def extra(value):
        def of(base):
            rows = 64 if "experts" not in base or "down" in base else 32
            rows = 32 if base.endswith(("k_proj", "v_proj")) else rows
            return {f"{base}.bias": torch.full((rows,), value, dtype=torch.float16)}

        return of

    settings, pack = packing.FORMS["gptq"]
    shutil.copytree(plain, tmp_path / "other")
    quantise(plain, tmp_path / "packed", settings, pack, extra(0.0))
    ours = open_checkpoint(tmp_path / "packed", dtype="float32").model
    assert torch.equal(logits(ours), logits(open_checkpoint(plain).model))
    quantise(tmp_path / "other", tmp_path / "biased", settings, pack, extra(0.5))
    with pytest.raises(CheckpointError, match=r"unknown model\.layers\.0.*bias"):
        open_checkpoint(tmp_path / "biased")


def test_a_quantised_head_is_read_too(plain, tmp_path):
    """Tied ones are compared with the embedding."""
    tensors = load_file(plain / "model.safetensors")
    parts, numbers = packing.nf4(tensors.pop("lm_head.weight"))
    packed = tensors | {f"lm_head{suffix}": part for suffix, part in parts.items()}
    save_file(packed, plain / "model.safetensors")
    path = plain / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "quantization_config": packing.BNB})
    )
    model = open_checkpoint(plain, dtype="float32").model
    assert torch.equal(model.head.weight, numbers)


@pytest.mark.parametrize(
    ("form", "weights", "name", "least", "most"),
    [("gptq", "int4", "GPTQ", 3, 10), ("nf4", "int4-64", "NF4", 3, 12),
     ("nf4", "int8", "NF4", 0.3, 0.7), ("int8_rows", "int4", "compressed-tensors", 3, 10)],
)  # fmt: skip
def test_what_packing_adds_is_said(form, weights, name, least, most, plain, tmp_path):
    quantise(plain, tmp_path / "packed", *packing.FORMS[form])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        open_checkpoint(tmp_path / "packed", weights=weights, keep=False)
    (text,) = (str(one.message) for one in said)
    assert f"weights in {name} are packed in another form" in text
    assert least < float(re.search(r"error of ([\d.]+) %", text)[1]) < most
    assert ("--weights int8, or as-is" in text) == (most > 1)


def test_a_part_in_another_file(plain, tmp_path):
    """Shards are cut anywhere."""
    quantise(plain, tmp_path / "packed", *packing.FORMS["packed_zeros"])
    path = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(path)
    first = {key: one for key, one in tensors.items() if "packed" in key}
    others = {key: one for key, one in tensors.items() if key not in first}
    shards = {"a.safetensors": first, "b.safetensors": others}
    for name, shard in shards.items():
        save_file(shard, path.parent / name)
    places = {key: name for name, shard in shards.items() for key in shard}
    index = {"weight_map": places}
    (path.parent / "model.safetensors.index.json").write_text(json.dumps(index))
    path.unlink()
    ours = open_checkpoint(path.parent, dtype="float32").model
    assert torch.equal(logits(ours), logits(open_checkpoint(plain).model))


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("gptq", lambda t, b: t.pop(f"{b}.qzeros"), r"lacks model\.layers\.0.*qzeros"),
        ("gptq", lambda t, b: t[f"{b}.g_idx"].fill_(9), "g_idx names the group 9; there are 4"),
        ("awq", lambda t, b: t.update({f"{b}.weight": torch.ones(1)}), "q_proj.weight twice"),
        ("packed_int4", lambda t, b: t[f"{b}.weight_shape"].fill_(63), "weight_shape \\[63, 63\\]"),
        ("nf4", lambda t, b: t.pop(f"{b}.weight.absmax"), "lacks .*absmax"),
        (
            "packed_int4",
            lambda t, b: t.update({f"{b}.weight_shape": torch.ones(1000, dtype=torch.int64)}),
            "weight_shape has 8,000 bytes",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(form, change, message, plain, tmp_path):
    quantise(plain, tmp_path / "packed", *packing.FORMS[form])
    path = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(path)
    change(tensors, "model.layers.0.self_attn.q_proj")
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "packed")
