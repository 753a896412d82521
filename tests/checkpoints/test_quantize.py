import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moestro.checkpoints.folders import atomic_folder
from moestro.checkpoints.quantize import (
    WEIGHTS,
    format_of,
    is_packed,
    pack,
    packable,
    random_model,
    read_packed,
)
from moestro.checkpoints.writing import save_model, write_pretrained
from moestro.config import EncDecConfig, ModelConfig
from moestro.errors import ConfigError, MoestroError, ShapeError
from moestro.kernels import native_cpu
from moestro.models.decoder import Decoder
from moestro.models.encdec import EncDec
from moestro.models.linear import PackedLinear
from moestro.moe.experts import StackedWeights
from moestro.moe.packed import PackedFeedForward, PackedStack

pytestmark = pytest.mark.skipif(
    native_cpu.available() is not None, reason=str(native_cpu.available())
)

SIZES: dict[str, Any] = {
    "vocab_size": 70,
    "dim": 32,
    "num_layers": 2,
    "dense": {"hidden_dim": 40},
    "attention": {"num_heads": 4, "num_kv_heads": 2, "context": 16},
}
MOE = {"hidden_dim": 24, "num_experts": 4, "top_k": 2}
LATENT = {"q_rank": 12, "kv_rank": 16, "nope_dim": 8, "rope_dim": 4, "value_dim": 8}
HEADS = {"num_heads": 4, "num_kv_heads": 2, "context": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "mixture": {"moe": MOE},
    "dense": {},
    "untied": {"moe": MOE, "head": {"tied": False, "bias": True, "scale": 0.5}},
    "latent": {"moe": MOE, "attention": {"num_heads": 4, "context": 16, "latent": LATENT}},
    "gpt-oss": {
        "moe": {
            **MOE,
            "activation": "clamped_swiglu",
            "router": {"bias": True},
            "experts": {"bias": True},
        },
        "attention": {**HEADS, "bias": "all", "sinks": True, "window": {"size": 5}},
    },
    "shared": {
        "moe": {
            **MOE,
            "shared": {"hidden_dim": 20, "gate": True},
            "router": {"kind": "sigmoid", "selection_bias": True, "scale": 1.5},
        },
        "dense_first": 1,
    },
    "norms": {"moe": MOE, "attention": {**HEADS, "qk_norm": "full"}, "norm": {"kind": "layer"}},
    "relative": {"moe": MOE, "attention": {**HEADS, "positions": {"kind": "relative"}}},
    "relu": {"moe": {**MOE, "activation": "relu"}, "dense": {"hidden_dim": 40}},
    "expert choice": {"moe": {**MOE, "router": {"kind": "expert_choice"}}},
    "capacity": {"moe": {**MOE, "capacity": {"eval_factor": 0.75}}},
}
# Largest difference beside the size. Rows of int8 and int4 weights are themselves rounded to 8
# bits, of bf16 weights to bf16.
FORMATS = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.06, "int4-64": 0.06}


def decoder(name: str) -> Decoder:
    """A model whose biases and other small parts are not zero."""
    model = Decoder(ModelConfig(**{**SIZES, **VARIANTS[name]})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.uniform_(-0.5, 0.5)
    return model


def unpacked(original: nn.Module, packed: nn.Module) -> nn.Module:
    """The original with the weights that the packed ones stand for."""
    model = copy.deepcopy(original)
    modules = dict(packed.named_modules())
    with torch.no_grad():
        for path, own in packable(model).items():
            module = modules[path]
            if isinstance(own, nn.Linear):
                assert isinstance(module, PackedLinear)
                weight_OI = native_cpu.unpack_matrix(module.weights)
                # A tied head must not change the embedding.
                own.weight = nn.Parameter(weight_OI)
                continue
            assert isinstance(own, StackedWeights)
            assert isinstance(module, PackedStack)
            for expert in range(len(own.down)):
                gate_up, down = native_cpu.unpack_expert(module.weights, expert)
                own.gate_up[expert], own.down[expert] = gate_up, down
    return model


def close(got: torch.Tensor, want: torch.Tensor, part: float) -> bool:
    """Whether the difference is within a part of the size of what is wanted."""
    return bool((got - want).norm() <= part * want.norm())


@pytest.mark.filterwarnings("ignore:expert_choice routing is not causal")
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_packed_model_is_the_model_of_the_unpacked_weights(name: str, kind: str) -> None:
    model = decoder(name)
    packed = copy.deepcopy(model)
    pack(packed, WEIGHTS[kind])
    assert is_packed(packed)
    assert not is_packed(model)
    tokens_BS = torch.randint(0, 70, (2, 9))
    with torch.no_grad():
        want = unpacked(model, packed)(tokens_BS)
    got = packed(tokens_BS)
    assert got.logits.dtype == torch.float32
    assert len(got.routings) == len(model.moe_layers)
    same = all(
        torch.equal(mine.experts_R, theirs.experts_R)
        for mine, theirs in zip(got.routings, want.routings, strict=True)
    )
    assert same or kind != "fp32"
    # A near tie chosen otherwise changes the tokens after it.
    assert close(got.logits, want.logits, FORMATS[kind] if same else 0.5)


def test_each_original_is_freed_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, alive = decoder("mixture"), []
    weights = [weakref.ref(layer.experts.gate_up) for layer in model.mixtures()]
    real = native_cpu.pack_experts

    def pack_experts(*given: Any, **named: Any) -> Any:
        alive.append(sum(weight() is not None for weight in weights))
        return real(*given, **named)

    monkeypatch.setattr(native_cpu, "pack_experts", pack_experts)
    pack(model, WEIGHTS["int8"])
    assert alive == [2, 1]


def test_routers_and_norms_stay_and_experts_go() -> None:
    packed = decoder("shared")
    pack(packed, WEIGHTS["int4"])
    names = {name for name, _ in packed.named_parameters()}
    assert not any(name.endswith(("gate_up", "down", "qkv.weight")) for name in names)
    assert {"embed.weight", "norm.weight", "blocks.1.ffn.router.weight"} <= names
    assert packed.blocks[1].ffn.router.bias.dtype == torch.float32
    assert isinstance(packed.blocks[1].ffn.shared, PackedFeedForward)
    assert isinstance(packed.blocks[0].ffn, PackedFeedForward)
    assert "int4" in repr(packed)


@pytest.mark.parametrize("name", ["latent", "gpt-oss", "shared", "relative"])
def test_the_cache_changes_nothing(name: str) -> None:
    """Past the context of 16 too."""
    packed = decoder(name)
    pack(packed, WEIGHTS["int8"])
    tokens_1S = torch.randint(0, 70, (1, 24))
    whole = packed(tokens_1S).logits
    cache = packed.new_cache(1)
    parts = [
        packed(part_1S, cache=cache).logits for part_1S in tokens_1S.split([7, 1, 5, 1, 10], 1)
    ]
    assert close(torch.cat(parts, 1), whole, 0.02)


def test_an_encoder_decoder_packs_too() -> None:
    cfg = EncDecConfig(
        vocab_size=70,
        dim=32,
        encoder_layers=2,
        decoder_layers=2,
        moe=MOE,
        moe_every=2,
        dense={"hidden_dim": 40},
    )
    model = EncDec(cfg).eval()
    packed = copy.deepcopy(model)
    pack(packed, WEIGHTS["fp32"])
    source, target = torch.randint(0, 70, (2, 6)), torch.randint(0, 70, (2, 5))
    with torch.no_grad():
        want = unpacked(model, packed)(source, target)
    got = packed(source, target)
    assert close(got.logits, want.logits, 1e-5)
    assert torch.equal(got.routings[0].experts_R, want.routings[0].experts_R)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_keep_their_dtype(dtype: torch.dtype) -> None:
    model = decoder("mixture").to(dtype)
    packed = copy.deepcopy(model)
    pack(packed, WEIGHTS["bf16"])
    tokens_BS = torch.randint(0, 70, (1, 6))
    with torch.no_grad():
        want = model.float()(tokens_BS).logits
    got = packed(tokens_BS).logits
    assert got.dtype == dtype
    assert close(got.float(), want, 0.1)


def test_each_part_gives_its_memory_back() -> None:
    model = decoder("mixture")
    weight = model.blocks[0].ffn.experts.gate_up
    alive = weight.untyped_storage().data_ptr()
    del weight
    pack(model, WEIGHTS["int4"])
    assert alive not in [p.untyped_storage().data_ptr() for p in model.parameters()]
    size = sum(p.numel() for p in model.parameters())
    assert size == 70 * 32 + 5 * 32 + 2 * 4 * 32  # embedding, norms, routers


def test_packed_weights_never_train(tmp_path: Path) -> None:
    packed = decoder("mixture")
    pack(packed, WEIGHTS["int8"])
    with pytest.raises(MoestroError, match="cannot be trained"):
        packed.train()
    with pytest.raises(MoestroError, match="no gradients"):
        packed.blocks[0].ffn(torch.randn(1, 3, 32, requires_grad=True))
    with pytest.raises(MoestroError, match="no state dict"):
        packed.state_dict()
    with pytest.raises(MoestroError, match="no state dict"):
        write_pretrained(packed, tmp_path / "new", family="mixtral")


def test_refusals() -> None:
    with pytest.raises(MoestroError, match=r"model\.eval"):
        pack(Decoder(ModelConfig(**SIZES)), WEIGHTS["int8"])
    packed = decoder("mixture")
    pack(packed, WEIGHTS["int8"])
    with pytest.raises(MoestroError, match="packed already"):
        pack(packed, WEIGHTS["int4"])
    broken = decoder("mixture")
    with torch.no_grad():
        broken.blocks[1].ffn.experts.down[3, 0, 0] = torch.nan
    with pytest.raises(ShapeError, match=r"blocks\.1\.ffn\.experts: .*NaN"):
        pack(broken, WEIGHTS["int8"])
    with pytest.raises(MoestroError, match="on meta"):
        pack(decoder("mixture").to("meta"), WEIGHTS["int8"])
    with pytest.raises(ConfigError, match=r"weights are fp32, bf16, int8.*as-is; given 'int5'"):
        format_of("int5")
    assert format_of("as-is") is None


@pytest.mark.parametrize("tied", [True, False])
def test_reading_straight_into_packed_form(tied: bool, tmp_path: Path) -> None:
    """Module by module from a published layout; ours whole; both as packing in place."""
    model = Decoder(ModelConfig(**{**SIZES, "moe": MOE, "head": {"tied": tied}})).eval()
    write_pretrained(model, tmp_path / "theirs", family="mixtral")
    with atomic_folder(tmp_path / "ours") as folder:
        save_model(model, folder)
    pack(model, WEIGHTS["int4"])
    tokens_BS = torch.randint(0, 70, (1, 8))
    want = model(tokens_BS).logits
    seen: list[tuple[int, int]] = []
    theirs = read_packed(tmp_path / "theirs", WEIGHTS["int4"], lambda *now: seen.append(now))
    assert torch.equal(theirs(tokens_BS).logits, want)
    assert seen[-1][0] == seen[-1][1]
    assert [now for now, _ in seen] == sorted(now for now, _ in seen)
    ours = read_packed(tmp_path / "ours", WEIGHTS["int4"])
    assert torch.equal(ours(tokens_BS).logits, want)


@pytest.mark.parametrize("weights", ["int4", "as-is"])
@pytest.mark.parametrize("name", ["mixture", "untied", "latent", "gpt-oss", "shared"])
def test_random_models(name: str, weights: str) -> None:
    cfg = ModelConfig(**{**SIZES, **VARIANTS[name]})
    packed = random_model(cfg, format_of(weights))
    assert is_packed(packed) == (weights == "int4")
    assert packed.embed.weight.dtype == torch.bfloat16
    logits = packed(torch.randint(0, 70, (1, 8))).logits
    assert logits.isfinite().all()
    assert 0.1 < float(logits.float().std()) < 5
    assert not any(parameter.requires_grad for parameter in packed.parameters())
