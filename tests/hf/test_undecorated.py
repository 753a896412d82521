"""Experts that do not use transformers' interface: the same numbers, on odd shapes, both ways."""

import copy
import warnings

import pytest
import torch

import moestro.hf as hf
from moestro.errors import BackendError
from moestro.foreign import taps
from moestro.hf import forward
from moestro.kernels import native_cpu

from ..checkpoints.families.tiny import BODY, randomise

transformers = pytest.importorskip("transformers")
step = pytest.importorskip("transformers.models.step3p7.modeling_step3p7")

SMALL = {"vocab_size": 61, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
LLAMA4 = {
    "intermediate_size_mlp": 20, "num_local_experts": 4, "head_dim": 8, "attention_chunk_size": 64,
    "num_hidden_layers": 2,
}  # fmt: skip
JETMOE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 8,
    "intermediate_size": 16, "num_local_experts": 5, "num_experts_per_tok": 2,
}  # fmt: skip
LONGCAT = {
    "num_layers": 2, "n_routed_experts": 5, "zero_expert_num": 3, "moe_topk": 3,
    "expert_ffn_hidden_size": 14, "ffn_hidden_size": 20, "q_lora_rank": 12, "kv_lora_rank": 14,
    "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 10,
    "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 32, "head_dim": 8,
    "routed_scaling_factor": 1.5, "max_position_embeddings": 64,
}  # fmt: skip
STEP = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 20, "num_local_experts": 5, "num_experts_per_tok": 2,
    "moe_intermediate_size": 14, "share_expert_dim": 14, "max_position_embeddings": 64,
    "sliding_window": 16, "mlp_layer_types": ["sparse", "sparse"],
}  # fmt: skip


def llama4(**changes):
    config = transformers.Llama4TextConfig(**{**BODY, **LLAMA4, **changes})
    return transformers.Llama4ForCausalLM(config)


def jetmoe(**changes):
    return transformers.JetMoeForCausalLM(transformers.JetMoeConfig(**SMALL, **JETMOE, **changes))


def longcat(**changes):
    config = transformers.LongcatFlashConfig(**SMALL, **LONGCAT, **changes)
    return transformers.LongcatFlashForCausalLM(config)


def step3p7(**changes):
    config = step.Step3p7TextConfig(vocab_size=61, **{**STEP, **changes})
    return step.Step3p7TextModel(config)


def dbrx(**changes):
    config = transformers.DbrxConfig(
        **{**SMALL, "n_layers": 1, **changes}, d_model=32, n_heads=4, max_seq_len=32,
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    config.attn_config.rope_theta = 1e4
    return transformers.DbrxForCausalLM(config).eval()


def nllb(**changes):
    config = transformers.NllbMoeConfig(
        vocab_size=61, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, num_experts=4,
        encoder_sparse_step=1, decoder_sparse_step=1, **changes,
    )  # fmt: skip
    return transformers.NllbMoeForConditionalGeneration(config).eval()


MODELS = {
    "dbrx": (dbrx, {"n_layers": 2}),
    "llama4": (llama4, {}),
    "jetmoe": (jetmoe, {}),
    "longcat": (longcat, {}),
    "step3p7": (step3p7, {}),
    "step3p7, cut at 7": (step3p7, {"swiglu_limits": [7.0, 0.0]}),
    "step3p7, clamped": (step3p7, {"swiglu_limits": [0.1, 0.05]}),
}
# With limits that no kernel has: on the CPU the torch kernels compute it.
TORCH = ("step3p7, clamped",)


def build(name):
    make, changes = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return randomise(make(**changes))


def tokens(batch=2, length=9):
    return torch.randint(3, 61, (batch, length))


def quietly(function, *given):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch kernels")
        return function(*given)


@torch.no_grad()
def output(model, ids):
    return quietly(model, ids)[0]


@pytest.mark.parametrize("name", MODELS)
def test_outputs_in_fp32(name):
    """Of one token, of odd numbers of them; and by transformers again afterwards."""
    hf.install()
    model = build(name)
    texts = [tokens(1, 1), tokens(1, 7), tokens(3, 21)]
    theirs = [output(model, ids) for ids in texts]
    model.set_experts_implementation("moestro")
    checked = quietly(hf.check, model, texts[0])
    assert len(checked.ran) == checked.calls == 2
    native = native_cpu.available() is None and name not in TORCH
    assert all(line.startswith("native") == native for line in checked.ran.values()), checked
    twin = copy.deepcopy(model)
    for ids, expected in zip(texts, theirs, strict=True):
        for each in (model, twin):
            torch.testing.assert_close(output(each, ids), expected, rtol=1e-4, atol=1e-4)
    model.set_experts_implementation("eager")
    with forward.watching() as calls:
        assert all(torch.equal(output(model, i), e) for i, e in zip(texts, theirs, strict=True))
    assert not calls


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name):
    hf.install()
    model, ids = build(name), tokens()

    def gradients():
        model.zero_grad()
        model(ids)[0].square().mean().backward()
        return {
            key: each.grad.clone()
            for key, each in model.named_parameters()
            if each.grad is not None
        }

    theirs = gradients()
    model.set_experts_implementation("moestro")
    with forward.watching() as calls:
        ours = gradients()
    assert [len(lines) for lines in calls.values()] == [1, 1]
    assert ours.keys() == theirs.keys()
    for key, grad in theirs.items():
        bound = 1e-5 * float(grad.abs().max()) + 1e-9
        torch.testing.assert_close(ours[key], grad, rtol=1e-4, atol=bound, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_a_choice_that_is_changed_is_used(name):
    """Ablation and replay see and change the same choices as with transformers' own experts."""
    hf.install()
    model, ids = build(name), tokens()

    def changed(place, choice):
        seen.append(choice.experts_TK.sort(-1).values)
        experts_TK = (choice.experts_TK + 1) % 4
        return experts_TK, choice.weights_TK * torch.linspace(0.1, 0.9, experts_TK.shape[1])

    found = {}
    for kind in ("eager", "moestro"):
        model.set_experts_implementation(kind)
        seen = []
        plain = output(model, ids)
        with taps.tapped(taps.taps(model), changed):
            found[kind] = output(model, ids), seen
        assert (found[kind][0] - plain).abs().max() > 1e-2
    (theirs, chosen), (ours, again) = found.values()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(chosen) == 2
    assert all(torch.equal(one, other) for one, other in zip(chosen, again, strict=True))


@pytest.mark.parametrize("gradients", [False, True])
def test_outputs_under_autocast_keep_the_dtype(gradients):
    """DBRX's projections are apart, and go to the kernels of training in steps."""
    hf.install()
    model = build("dbrx")
    experts = model.transformer.blocks[0].ffn.experts
    x_TD, experts_TK = torch.randn(5, 32), torch.tensor([[0, 3], [1, 2], [2, 0], [3, 1], [0, 1]])
    inputs = (x_TD, experts_TK, torch.rand(5, 2))
    expected = experts(*inputs).detach().view(5, 32)
    model.set_experts_implementation("moestro")
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", dtype=torch.bfloat16):
        found = quietly(experts, *inputs)
    assert found.dtype == torch.float32
    bound = 2**-6 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=2**-5, atol=bound)


@pytest.mark.parametrize("name", ["dbrx", "llama4", "jetmoe", "longcat", "step3p7"])
def test_packed(name):
    if native_cpu.available() is not None:
        pytest.skip("no native library")
    model, ids = build(name), tokens()
    theirs = output(model, ids)
    packed = hf.quantize(model, "float32")
    assert len(packed.experts) == 2
    torch.testing.assert_close(output(model, ids), theirs, rtol=1e-4, atol=1e-4)
    assert all("float32" in line for line in hf.check(model, ids).ran.values())


def test_asked_for_while_the_model_is_made():
    hf.install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = randomise(llama4(experts_implementation="moestro"))
    assert quietly(hf.check, model, tokens()).calls == 2


def test_nllb_runs_two_experts_in_transformers():
    """Why it is refused: whatever the router chooses, experts 0 and 1 compute, and no others."""
    model = quietly(nllb)
    blocks = [each for each in model.modules() if type(each).__name__ == "NllbMoeSparseMLP"]
    ran, chosen = set(), set()
    for block in blocks:
        block.router.register_forward_hook(
            lambda _, __, output: chosen.update(output[0].argmax(-1).tolist())
        )
        for name, expert in block.experts.items():
            expert.register_forward_hook(lambda *_, name=name: ran.add(name))
    with torch.no_grad():
        model(input_ids=tokens(3, 21), decoder_input_ids=tokens(3, 7))
    assert ran == {"expert_0", "expert_1"}
    assert len(chosen) > 2


def test_refused_while_the_model_is_made():
    hf.install()
    with pytest.raises(BackendError, match="NllbMoeExperts cannot run"):
        quietly(lambda: nllb(experts_implementation="moestro"))
    quietly(nllb)


@pytest.mark.parametrize("name", ["dbrx", "llama4"])
def test_compiled(name):
    hf.install()
    model, ids = build(name), tokens()
    expected = output(model, ids)
    model.set_experts_implementation("moestro")
    compiled = torch.compile(lambda x: model(x, use_cache=False)[0], backend="aot_eager")
    torch.testing.assert_close(output_of(compiled, ids), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def output_of(function, ids):
    return quietly(function, ids)


def test_what_cannot_run_says_why():
    hf.install()
    model = quietly(nllb)
    words = "NllbMoeExperts cannot run .*: transformers takes .* mask of zeros"
    for act in (
        lambda: model.set_experts_implementation("moestro"),
        lambda: hf.quantize(model, "int8"),
        lambda: hf.check(model, tokens()),
    ):
        with pytest.raises(BackendError, match=words):
            act()
