"""The first DeepSeekMoE, which transformers lacks, against its parts: Llama and V2's mixture."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.writing import write_pretrained

from . import tiny

CONFIG = {
    "architectures": ["DeepseekForCausalLM"],
    "model_type": "deepseek",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 14,
    "moe_layer_freq": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 6,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 6,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": tiny.VOCABULARY,
}


def published(tensors):
    """Stacked experts under the keys of each, as DeepSeek's own code saves them."""
    saved = {}
    for key, tensor in tensors.items():
        place, _, name = key.partition(".mlp.experts.")
        if name == "gate_up_proj":
            for e, (gate, up) in enumerate(expert.chunk(2) for expert in tensor):
                saved[f"{place}.mlp.experts.{e}.gate_proj.weight"] = gate.clone()
                saved[f"{place}.mlp.experts.{e}.up_proj.weight"] = up.clone()
        elif name == "down_proj":
            for e, down in enumerate(tensor):
                saved[f"{place}.mlp.experts.{e}.down_proj.weight"] = down.clone()
        else:
            saved[key] = tensor.clone()
    return saved


def write(folder, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(published(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def pair(tmp_path):
    theirs = tiny.build_deepseek()
    folder = write(tmp_path / "deepseek", theirs.state_dict())
    return theirs, open_checkpoint(folder), folder


def test_logits_and_gradients(pair, tmp_path):
    theirs, read, _ = pair
    tokens_BS = torch.randint(0, tiny.VOCABULARY, (3, 19))
    logits = []
    for model in (theirs, read.model):
        logits.append(model(tokens_BS).logits)
        logits[-1].square().mean().backward()
    scale = logits[0].abs().max()
    assert scale > 0.5
    torch.testing.assert_close(logits[1] / scale, logits[0] / scale, rtol=0, atol=1e-5)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    expected = open_checkpoint(write(tmp_path / "gradients", gradients)).model
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


def test_written_back(pair, tmp_path):
    _, read, folder = pair
    write_pretrained(read.model, tmp_path / "back", hf_config=read.hf_config)
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "back/model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert json.loads((tmp_path / "back/config.json").read_text()) == CONFIG
