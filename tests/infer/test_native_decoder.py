from typing import Any

import pytest
import torch

from moestro.checkpoints.quantize import WEIGHTS, pack
from moestro.config import ModelConfig
from moestro.errors import BackendError, MoestroError, ShapeError
from moestro.infer.decoding import Decoding, NativeDecoding
from moestro.infer.native_decoder import AsDecoded, NativeDecoder, supports
from moestro.kernels import native_cpu, native_library
from moestro.kernels.native_library import PATHS
from moestro.models.decoder import Decoder

pytestmark = pytest.mark.skipif(
    native_cpu.available() is not None, reason=str(native_cpu.available())
)

HEADS = {"num_heads": 4, "num_kv_heads": 2, "context": 16}
MOE = {"hidden_dim": 24, "num_experts": 5, "top_k": 2}
SIZES: dict[str, Any] = {
    "vocab_size": 70,
    "dim": 32,
    "num_layers": 3,
    "dense": {"hidden_dim": 40},
    "attention": HEADS,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "mixture": {"moe": MOE},
    "dense": {},
    "one head each": {"moe": MOE, "attention": {"num_heads": 2, "head_dim": 6, "context": 16}},
    "untied": {"moe": MOE, "head": {"tied": False, "bias": True, "scale": 0.5}},
    "every second": {"moe": MOE, "moe_every": 2},
    "gpt-oss": {
        "moe": {
            **MOE,
            "activation": "clamped_swiglu",
            "router": {"bias": True},
            "experts": {"bias": True},
        },
        "attention": {
            **HEADS,
            "bias": "all",
            "sinks": True,
            "window": {"size": 5, "full_every": 2},
            "positions": {"scaling": {"kind": "yarn", "factor": 2.0, "original_context": 8}},
        },
    },
    "deepseek": {
        "moe": {
            **MOE,
            "shared": {"hidden_dim": 20},
            "router": {"kind": "sigmoid", "selection_bias": True, "scale": 1.5},
        },
        "dense_first": 1,
    },
    "qwen": {
        "moe": {
            **MOE,
            "top_k": 1,
            "shared": {"hidden_dim": 20, "gate": True},
            "router": {"renormalize": False},
        },
        "attention": {**HEADS, "qk_norm": "head", "bias": "qkv"},
    },
    "geglu": {"moe": {**MOE, "activation": "geglu"}},
    "olmoe": {"moe": MOE, "attention": {**HEADS, "qk_norm": "full"}},
    "glm": {
        "moe": MOE,
        "attention": {**HEADS, "qk_norm": "head", "positions": {"fraction": 0.5}},
    },
    "hunyuan": {
        "moe": {**MOE, "shared": {"hidden_dim": 24}},
        "attention": {**HEADS, "qk_norm": "rotated"},
    },
    "phi": {
        "moe": {**MOE, "router": {"kind": "sparsemixer", "jitter": 0.4}},
        "norm": {"kind": "layer"},
    },
    "ernie": {"moe": {**MOE, "router": {"selection_bias": True}}},
    "granite": {
        "moe": {**MOE, "shared": {"hidden_dim": 20}},
        "norm": {"residual_scale": 0.22, "eps": 0.1},
        "head": {"embed_scale": 12.0, "scale": 0.2},
        "attention": {**HEADS, "positions": {"score_scale": 0.1}},
    },
    "scaled residual, layer norm": {"norm": {"kind": "layer", "residual_scale": 3.0, "eps": 0.1}},
    "layer norm": {"moe": MOE, "norm": {"kind": "layer"}},
    "groups": {
        "moe": {
            **MOE,
            "num_experts": 8,
            "top_k": 3,
            "router": {"num_groups": 4, "top_groups": 2, "group_score": "max"},
        }
    },
    "best two of groups": {
        "moe": {
            **MOE,
            "num_experts": 12,
            "router": {
                "kind": "sigmoid",
                "selection_bias": True,
                "num_groups": 3,
                "top_groups": 2,
                "group_score": "top2",
            },
        }
    },
    "relu": {"moe": {**MOE, "activation": "relu"}, "dense": {"hidden_dim": 40}},
    "zero-centred": {"norm": {"zero_centred": True}, "attention": {**HEADS, "qk_norm": "head"}},
}
LATENT = {"kv_rank": 24, "nope_dim": 8, "rope_dim": 4, "value_dim": 10}
VARIANTS |= {
    "latent": {"moe": MOE, "attention": {"num_heads": 3, "latent": LATENT, "context": 16}},
    "deepseek-v3": {
        **VARIANTS["deepseek"],
        "attention": {
            "num_heads": 11,
            "latent": {**LATENT, "q_rank": 20},
            "context": 16,
            "positions": {"scaling": {"kind": "yarn", "factor": 2.0, "original_context": 8}},
        },
    },
}
DELTA = {"kind": "delta", "key_heads": 2, "value_heads": 6, "key_dim": 7, "value_dim": 9}
VARIANTS |= {
    "qwen3-next": {
        "num_layers": 4,
        "moe": {**MOE, "shared": {"hidden_dim": 20, "gate": True}},
        "attention": {
            **HEADS,
            "qk_norm": "head",
            "positions": {"fraction": 0.5},
            "window": {**DELTA, "full_every": 3},
        },
        "norm": {"zero_centred": True},
    },
    "delta alone": {
        "attention": {**HEADS, "window": {**DELTA, "conv_width": 1, "full_every": 0}},
    },
}
UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "relative": ({"attention": {**HEADS, "positions": {"kind": "relative"}}}, "relative positions"),
    "scaled residual": (
        {"norm": {"residual_scale": 0.5}, "attention": {**HEADS, "qk_norm": "head"}},
        "a scaled residual with normed queries",
    ),
    "capacity": ({"moe": {**MOE, "capacity": {}}}, "capacity"),
    "hash": ({"moe": {**MOE, "router": {"kind": "hash"}}}, "hash router"),
}


def decoder(**changes: Any) -> Decoder:
    """A model whose biases and other small parts are not zero."""
    model = Decoder(ModelConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.any():
                tensor.uniform_(-0.3, 0.3)
    return model


def both(model: Decoder, steps: int = 24) -> list[tuple[Any, Any]]:
    """What Python and native code give for a prompt and the tokens after it, past the context."""
    python, native = Decoding(model), NativeDecoding(model)
    prompt = torch.randint(0, 70, (7,)).tolist()
    (mine, first), (theirs, second) = native.begin(prompt), python.begin(prompt)
    results = [(first, second)]
    for token in torch.randint(0, 70, (steps,)).tolist():
        results.append((native.step([[token]], [mine])[0], python.step([[token]], [theirs])[0]))
    return results


@pytest.mark.parametrize("weights", ["plain", "fp32"])
@pytest.mark.parametrize("name", VARIANTS)
def test_steps_are_those_of_the_forward(name: str, weights: str) -> None:
    model = decoder(**VARIANTS[name])
    assert supports(model) is None
    if weights != "plain":
        pack(model, WEIGHTS[weights])
    for got, want in both(model):
        assert got.experts == want.experts
        torch.testing.assert_close(got.logits_NV, want.logits_NV, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("weights", ["plain", "bf16", "int8", "int4"])
def test_16_bit_and_packed_models(weights: str) -> None:
    model = decoder(moe={**MOE, "top_k": 5})  # all experts: no near tie changes who is chosen
    if weights == "plain":
        model = model.to(torch.bfloat16)
    else:
        pack(model, WEIGHTS[weights])
    for got, want in both(model):
        difference = (got.logits_NV.float() - want.logits_NV.float()).norm()
        assert difference <= 0.05 * want.logits_NV.float().norm()


@pytest.mark.parametrize("weights", ["plain", "int4"])
def test_logits_of_whole_texts_are_those_of_decoding(weights: str) -> None:
    model = decoder(moe=MOE)
    if weights != "plain":
        pack(model, WEIGHTS[weights])
    tokens_BS = torch.randint(0, 70, (2, 11))
    logits_BSV, step = AsDecoded(model)(tokens_BS).logits, NativeDecoder(model).step
    for row, whole_SV in zip(tokens_BS.tolist(), logits_BSV, strict=True):
        cache = model.new_cache(1)
        alone_SV = torch.cat([step([[token]], [cache]).logits_NV for token in row])
        assert torch.equal(whole_SV, alone_SV)


@pytest.mark.parametrize("weights", ["plain", "int4"])
def test_a_sequence_does_not_see_its_neighbours(weights: str) -> None:
    """Bit by bit: three sequences of different lengths together, and each alone."""
    model = decoder(moe=MOE)
    if weights != "plain":
        pack(model, WEIGHTS[weights])
    native = NativeDecoding(model)
    prompts = [torch.randint(0, 70, (length,)).tolist() for length in (3, 20, 9)]
    tokens = torch.randint(0, 70, (6, 3)).tolist()
    together = [native.begin(prompt)[0] for prompt in prompts]
    outputs = [native.step([[token] for token in row], together) for row in tokens]
    for place, prompt in enumerate(prompts):
        past = native.begin(prompt)[0]
        for row, output in zip(tokens, outputs, strict=True):
            alone = native.step([[row[place]]], [past])[0]
            assert torch.equal(alone.logits_NV, output[place].logits_NV)
            assert alone.experts == output[place].experts


@pytest.mark.parametrize("name", ["plain", "int4"])
def test_a_prompt_is_read_between_steps_and_a_past_is_forked(name: str) -> None:
    """One memory for both ways: read, step, read on, fork, past windows of 5, context of 16."""
    model = decoder(moe=MOE, attention={**SIZES["attention"], "window": {"size": 5}})
    if name != "plain":
        pack(model, WEIGHTS[name])
    way, tokens = NativeDecoding(model), torch.randint(0, 70, (40,)).tolist()
    past, other = way.new(), way.new()
    way.read(past, tokens[:9])
    way.read(other, tokens[:4])
    way.step([tokens[9:10]], [past])
    way.read(other, tokens[4:9])
    way.step([tokens[9:10]], [other])
    first = way.read(past, tokens[10:20])
    twin = past.fork()
    for at in range(20, 40):  # the fork's text goes another way, and leaves no trace in the first
        stepped = way.step([[tokens[at]], [tokens[at - 20]]], [past, twin])
    with torch.inference_mode():
        whole = model(torch.tensor([tokens])).logits[0]
        branch = model(torch.tensor([tokens[:20] + tokens[:20]])).logits[0]
    near = {"atol": 2e-4, "rtol": 2e-4} if name == "plain" else {"atol": 0.1, "rtol": 0.1}
    torch.testing.assert_close(first.logits_NV[0], whole[19], **near)
    torch.testing.assert_close(stepped[0].logits_NV[0], whole[-1], **near)
    torch.testing.assert_close(stepped[1].logits_NV[0], branch[-1], **near)
    assert past.position == twin.position == 40


def paths() -> list[str]:
    """Those that this machine runs."""
    native = native_library.library()
    kept = native.moestro_path()
    there = [name for n, name in enumerate(PATHS) if native.moestro_use_path(n) == 0]
    native.moestro_use_path(kept)
    return there


@pytest.fixture
def native():
    native = native_library.library()
    kept = native.moestro_path()
    yield native
    native.moestro_use_path(kept)


@pytest.mark.parametrize("weights", ["plain", "bf16", "int8", "int4"])
@pytest.mark.parametrize(
    "name",
    [
        "mixture",
        "one head each",
        "gpt-oss",
        "deepseek",
        "qwen",
        "olmoe",
        "glm",
        "hunyuan",
        "layer norm",
        "phi",
        "best two of groups",
        "latent",
        "deepseek-v3",
        "qwen3-next",
    ],
)
def test_a_prompt_gives_the_same_bits_however_it_is_cut(native, name: str, weights: str) -> None:
    """One token at a time, in odd chunks, all at once, beside another's tokens; on every path."""
    changes = VARIANTS[name]
    attention = {**changes.get("attention", HEADS), "context": 64}
    model = decoder(**{**changes, "attention": attention})
    if weights == "bf16":
        model = model.to(torch.bfloat16)
    elif weights != "plain":
        pack(model, WEIGHTS[weights])
    way, tokens = NativeDecoding(model), torch.randint(0, 70, (75,)).tolist()
    want = cut(way, tokens, [1] * 75)
    for path in paths():
        native.moestro_use_path(PATHS.index(path))
        for sizes in ([75], [3, 1, 40, 31], [64, 11]):
            for got, expected in zip(cut(way, tokens, sizes), want, strict=True):
                assert torch.equal(got, expected), (path, sizes)
        past, other = way.new(), way.new()
        way.step([tokens[:33]], [past])
        way.step([tokens[33:34], tokens[:50]], [past, other])
        way.step([tokens[34:70], tokens[50:51]], [past, other])
        first, second = way.step([tokens[70:], tokens[51:]], [past, other])
        assert torch.equal(first.logits_NV, want[0])
        assert torch.equal(second.logits_NV, want[0])


def cut(
    way: NativeDecoding, tokens: list[int], sizes: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits after the last token, and the experts of all."""
    past, at, experts = way.model.new_cache(1), 0, []
    for size in sizes:
        stepped = way._native.step([tokens[at : at + size]], [past])
        experts.append(stepped.experts_LTK)
        at += size
    return stepped.logits_NV, torch.cat(experts, 1)


def test_weights_of_the_experts_are_returned() -> None:
    model = decoder(moe=MOE)
    native = NativeDecoder(model)
    cache = model.new_cache(1)
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3]]), cache=cache)
        stepped = native.step([[4]], [cache.fork()])
        routings = model(torch.tensor([[4]]), cache=cache).routings
    for layer, routing in enumerate(routings):
        assert torch.equal(stepped.experts_LTK[layer], routing.experts_TK())
        torch.testing.assert_close(stepped.weights_LTK[layer, 0], routing.weights_R)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_decodes_in_python_says_why(name: str) -> None:
    changes, reason = UNSUPPORTED[name]
    model = decoder(**changes)
    assert reason in str(supports(model))
    with pytest.raises(MoestroError, match=reason):
        NativeDecoder(model)


def test_what_stands_around_a_modules_forward_decodes_in_python() -> None:
    """Hooks, and experts that somebody wrapped: the native step would pass them by."""
    model = decoder(moe=MOE)
    experts = model.mixtures()[0].experts
    for register in (experts.register_forward_hook, experts.register_forward_pre_hook):
        handle = register(lambda *_: None)
        assert "ffn.experts has hooks" in str(supports(model))
        handle.remove()
    assert supports(model) is None
    model.mixtures()[0].experts = torch.nn.Sequential(experts)
    assert "Sequential decode in Python" in str(supports(model))


def test_other_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not Linear" in str(supports(torch.nn.Linear(2, 2)))
    assert "float64" in str(supports(decoder().double()))
    assert "meta" in str(supports(decoder().to("meta")))
    asked = Decoder(ModelConfig(**SIZES), backend="reference")
    assert "reference was asked for" in str(supports(asked))
    monkeypatch.setenv("MOESTRO_BACKEND", "segments")
    assert "segments was asked for" in str(supports(decoder()))
    packed = decoder()
    monkeypatch.delenv("MOESTRO_BACKEND")
    pack(packed, WEIGHTS["int8"])
    assert supports(packed) is None
    monkeypatch.setenv("MOESTRO_BACKEND", "segments")
    assert "segments was asked for" in str(supports(packed))
    with pytest.raises(BackendError, match=r"'segments'.*packed weights run by native alone"):
        packed(torch.tensor([[1, 2, 3]]))
    with pytest.raises(BackendError, match="packed weights run by native alone"):
        pack(decoder(), WEIGHTS["int8"])


def test_ids_that_are_no_tokens():
    decoding = NativeDecoding(Decoder(ModelConfig(**SIZES)).eval())
    past, _ = decoding.begin([1, 2])
    for token in (70, -1):
        with pytest.raises(ShapeError, match=rf"from 0 to 69.*given \[{token}\]"):
            decoding.step([[token]], [past])
        with pytest.raises(ShapeError, match=rf"given \[{token}\]"):
            decoding.begin([1, token])
    assert decoding.step([[3]], [past])
