"""A tiny Mixtral of transformers and our decoder with its weights: the same logits, gradients."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from moestro import Decoder, ModelConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def pair():
    """(transformers' model, ours with the same weights)."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                vocab_size=50,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_local_experts=4,
                num_experts_per_tok=2,
                max_position_embeddings=64,
                rms_norm_eps=1e-6,
                initializer_range=0.3,
                rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
                sliding_window=None,
                attn_implementation="eager",
                experts_implementation="eager",
                **sizes,
            )
        ).eval()
    cfg = ModelConfig(
        vocab_size=50,
        dim=32,
        num_layers=2,
        attention={"num_heads": 4, "num_kv_heads": 2, "context": 64},
        moe={"hidden_dim": 24, "num_experts": 4, "top_k": 2},
        head={"tied": False},
    )
    ours = Decoder(cfg).eval()
    ours.load_state_dict(convert({k: v.detach() for k, v in theirs.state_dict().items()}))
    return theirs, ours


def convert(theirs):
    """transformers' keys to ours; their experts have our layout."""
    names = {"model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "head"}
    ours = {f"{name}.weight": theirs[f"{key}.weight"] for key, name in names.items()}
    for n in range(2):
        old, new = f"model.layers.{n}.", f"blocks.{n}."
        qkv = [theirs[f"{old}self_attn.{letter}_proj.weight"] for letter in "qkv"]
        ours |= {
            f"{new}attention.qkv.weight": torch.cat(qkv),
            f"{new}attention.out.weight": theirs[f"{old}self_attn.o_proj.weight"],
            f"{new}attention_norm.weight": theirs[f"{old}input_layernorm.weight"],
            f"{new}ffn_norm.weight": theirs[f"{old}post_attention_layernorm.weight"],
            f"{new}ffn.router.weight": theirs[f"{old}mlp.gate.weight"],
            f"{new}ffn.experts.gate_up": theirs[f"{old}mlp.experts.gate_up_proj"],
            f"{new}ffn.experts.down": theirs[f"{old}mlp.experts.down_proj"],
        }
    return ours


def test_logits_and_gradients(pair):
    theirs, ours = pair
    tokens_BS = torch.randint(0, 50, (3, 17))
    results = []
    for model in (theirs, ours):
        model.zero_grad()
        logits = model(tokens_BS).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten()).backward()
        results.append(logits.detach())
    scale = results[0].abs().max().item()
    assert scale > 0.5, "logits too small to tell anything"
    torch.testing.assert_close(results[1] / scale, results[0] / scale, rtol=0, atol=1e-5)
    expected = convert({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        scale = expected[name].abs().max().item()
        error = (parameter.grad - expected[name]).abs().max().item()
        assert error <= 1e-4 * scale, name


def test_greedy_decoding_agrees(pair):
    theirs, ours = pair
    prompt_BS = torch.randint(0, 50, (1, 4))
    expected = prompt_BS
    for _ in range(12):
        expected = torch.cat([expected, theirs(expected).logits[:, -1:].argmax(-1)], 1)
    cache, new_BS, generated = ours.new_cache(), prompt_BS, [prompt_BS]
    for _ in range(12):
        new_BS = ours(new_BS, cache=cache).logits[:, -1:].argmax(-1)
        generated.append(new_BS)
    assert torch.equal(torch.cat(generated, 1), expected)
