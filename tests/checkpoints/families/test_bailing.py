"""Ling 2.0, which transformers lacks, against a twin there: Sarvam is GLM-4.5 in Ling's layout."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.writing import write_pretrained
from moestro.infer.native_decoder import supports
from moestro.kernels import native_cpu

from . import tiny
from .published_newer import NEWER
from .tiny_newer import PLAIN_ROPE, SMALL_EXPERTS

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 14,
    "moe_shared_expert_intermediate_size": 14,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "vocab_size": tiny.VOCABULARY,
}
CONFIG = {
    **NEWER["Ling-mini-2.0"][0],
    **SIZES,
    "rope_theta": 10_000.0,
    "torch_dtype": "float32",
    "num_nextn_predict_layers": 0,
}


def build():
    changes = {
        **SMALL_EXPERTS,
        **{name: SIZES[name] for name in ("head_dim", "n_group", "topk_group")},
        "n_shared_experts": 1,
        "routed_scaling_factor": CONFIG["routed_scaling_factor"],
        "rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 0.5},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = tiny.transformers.SarvamMoEConfig(**{**tiny.BODY, **changes})
        config._attn_implementation = config._experts_implementation = "eager"
        return tiny.randomise(tiny.transformers.AutoModelForCausalLM.from_config(config))


def save(model, folder):
    tiny.save(model, folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def pair(tmp_path):
    theirs = build()
    folder = save(theirs, tmp_path / "ling")
    return theirs, open_checkpoint(folder), folder


def test_logits_and_gradients(pair, tmp_path):
    theirs, read, _ = pair
    tokens_BS = torch.randint(0, tiny.VOCABULARY, (3, 19))
    logits = []
    for model in (theirs, read.model):
        logits.append(model(tokens_BS).logits)
        F.cross_entropy(logits[-1][:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten()).backward()
    scale = logits[0].abs().max()
    assert scale > 0.5
    torch.testing.assert_close(logits[1] / scale, logits[0] / scale, rtol=0, atol=1e-5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            gradient = parameter.grad
            parameter.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
    expected = open_checkpoint(save(theirs, tmp_path / "gradients")).model
    for (name, parameter), gradient in zip(
        read.model.named_parameters(), expected.parameters(), strict=True
    ):
        scale = gradient.abs().max()
        assert scale > 0, name
        assert (parameter.grad - gradient).abs().max() <= 1e-4 * scale, name


@torch.no_grad()
def test_greedy_generation(pair):
    theirs, read, _ = pair
    expected = prompt = torch.randint(0, tiny.VOCABULARY, (1, 5))
    cache, new, generated = read.model.new_cache(1), prompt, [prompt]
    for _ in range(32):
        expected = torch.cat([expected, theirs(expected).logits[:, -1:].argmax(-1)], 1)
        new = read.model(new, cache=cache).logits[:, -1:].argmax(-1)
        generated.append(new)
    assert torch.equal(torch.cat(generated, 1), expected)
    assert supports(read.model) == native_cpu.available()


def test_written_back(pair, tmp_path):
    _, read, folder = pair
    write_pretrained(read.model, tmp_path / "back", hf_config=read.hf_config)
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "back/model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert json.loads((tmp_path / "back/config.json").read_text()) == CONFIG
