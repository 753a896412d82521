"""Every module draws what it owns, at the scale of its place, however often and in any order."""

import math

import pytest
import torch
from torch import nn

from moestro import Decoder, ModelConfig
from moestro.config import EncDecConfig, LoraConfig
from moestro.models.adapters import attach
from moestro.models.decoder import Cached
from moestro.models.encdec import EncDec
from moestro.models.linear import Linear
from moestro.moe.packed import Packed
from moestro.moe.parallel import ParallelExperts

RELATIVE = {"kind": "relative", "buckets": 64, "max_distance": 200}
LATENT = {"q_rank": 48, "kv_rank": 40, "nope_dim": 16, "rope_dim": 8, "value_dim": 20}
DELTA = {
    "kind": "delta",
    "key_heads": 2,
    "value_heads": 6,
    "key_dim": 20,
    "value_dim": 30,
    "full_every": 3,
}
MOE = {"hidden_dim": 48, "num_experts": 4, "top_k": 2}
SIZES = {
    "vocab_size": 200,
    "dim": 64,
    "num_layers": 3,
    "dense_first": 1,
    "dense": {"hidden_dim": 96},
    "attention": {"num_heads": 4},
}
SHARED = {"shared": {"hidden_dim": 40, "gate": True}, "experts": {"bias": True}}
LOSS_FREE = {"router": {"kind": "sigmoid", "selection_bias": True, "bias": True}}
BIASES = {"num_heads": 4, "num_kv_heads": 2, "bias": "all", "sinks": True, "qk_norm": "head"}
DECODERS = {
    "loss-free": {"moe": {**MOE, **SHARED, **LOSS_FREE}, "attention": BIASES},
    "noisy, layer norm": {
        "moe": {**MOE, "router": {"kind": "noisy_top_k"}, "init_scale": 0.1},
        "norm": {"kind": "layer"},
        "head": {"tied": False, "bias": True},
    },
    "sparsemixer, latent": {
        "moe": {**MOE, "router": {"kind": "sparsemixer", "jitter": 0.01}},
        "attention": {"num_heads": 4, "latent": LATENT},
    },
    "an indexer": {
        "moe": MOE,
        "attention": {
            "num_heads": 4,
            "latent": {**LATENT, "indexer": {"num_heads": 12, "head_dim": 16, "top_k": 4}},
        },
    },
    "hash, relative": {
        "moe": {**MOE, "router": {"kind": "hash"}},
        "attention": {"num_heads": 4, "positions": RELATIVE},
        "head": {"tied": False},
    },
    "delta": {
        "moe": MOE,
        "norm": {"zero_centred": True},
        "attention": {"num_heads": 4, "qk_norm": "head", "window": DELTA},
    },
    "short convolutions": {
        "moe": MOE,
        "attention": {"num_heads": 4, "window": {"kind": "conv", "attention_layers": [1]}},
    },
    "expert choice": {"moe": {**MOE, "router": {"kind": "expert_choice"}}},
}
ENCDEC = {
    "vocab_size": 200,
    "dim": 64,
    "encoder_layers": 4,
    "decoder_layers": 2,
    "attention": {"num_heads": 4, "head_dim": 16, "positions": {**RELATIVE, "shared": True}},
    "moe": {**MOE, "activation": "relu"},
    "moe_every": 2,
}
ENCDECS = {
    "tied": {"head": {"scale": 64**-0.5}},
    "untied": {"head": {"tied": False, "scale": 1.0}},
}
NAMES = [*DECODERS, *ENCDECS]

pytestmark = pytest.mark.filterwarnings("ignore:expert_choice routing is not causal")


def build(name):
    if name in ENCDECS:
        return EncDec(EncDecConfig(**ENCDEC, **ENCDECS[name]))
    return Decoder(ModelConfig(**{**SIZES, **DECODERS[name]}))


def on_meta(name):
    """Built without memory, then given memory full of NaN."""
    with torch.device("meta"):
        model = build(name)
    model = model.to_empty(device="cpu")
    for tensor in own_tensors(*model.modules()):
        tensor.data.fill_(math.nan)
    return model


def own_tensors(*modules):
    for module in modules:
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)


CONSTANT = ("norm.weight", "bias", "sinks", "noise", "relative.weight", "down_bias")
WRITERS = {"blocks": 2 * 3, "encoder": 2 * 4, "decoder": 3 * 2}
TRUNCATED = 0.8796  # What is left of σ where all beyond 2 σ is cut off.


def deviation(model, name, shape, queries):
    """σ of a tensor at the start; 0 where it is constant."""
    cfg, module = model.cfg, name.split(".")[-2]
    encdec = isinstance(model, EncDec)
    noisy = cfg.moe.router.kind == "noisy_top_k" and module == "router"
    if name.endswith(CONSTANT) or noisy:
        return 0
    std = shape[-1] ** -0.5
    if name.endswith("conv_weight"):
        return std / math.sqrt(3)  # torch's own
    if module in ("embed", "head"):
        return std / cfg.head.scale if encdec else std
    if module == "shared_gate":
        return std / math.sqrt(3)  # torch's own
    if module == "out" or name.endswith("down"):
        std /= math.sqrt(WRITERS[name.split(".")[0]])
    if module in ("router", "experts", "shared", "ffn"):
        return TRUNCATED * std * (1 if module == "ffn" else math.sqrt(cfg.moe.init_scale))
    unscaled = encdec or cfg.attention.positions.kind == "relative"
    return std / math.sqrt(head_dim(cfg)) if unscaled and queries else std


def head_dim(cfg):
    return cfg.attention.head_dim or cfg.dim // cfg.attention.num_heads


def check_statistics(model):
    cfg = model.cfg
    for name, tensor in model.state_dict().items():
        if name.endswith(("log_rate", "time_bias")):  # They have their own test.
            assert tensor.std() > 0
            continue
        parts = {name.endswith(".q.weight"): tensor}
        if name.endswith("qkv.weight"):
            rows = cfg.attention.num_heads * head_dim(cfg)
            parts = {True: tensor[:rows], False: tensor[rows:]}
        for queries, part in parts.items():
            wanted, error = deviation(model, name, tensor.shape, queries), part.numel() ** -0.5
            if wanted:
                assert part.std().item() == pytest.approx(wanted, rel=4 * error), name
                assert abs(part.mean().item()) < 5 * wanted * error, name
            else:
                gain = name.endswith("norm.weight") and gains_start_at_1(cfg, name)
                assert torch.equal(part, torch.full_like(part, float(gain))), name


def gains_start_at_1(cfg, name):
    """Zero-centred norms start at 0; that of a delta layer is never one."""
    return not cfg.norm.zero_centred or name.endswith("delta.norm.weight")


def each(modules):
    for module in modules:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


FLOWS = {
    "root": lambda model: model.reset_parameters(),
    "root five times": lambda model: [model.reset_parameters() for _ in range(5)],
    "each": lambda model: each(model.modules()),
    "each, from the leaves": lambda model: each(list(model.modules())[::-1]),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_new_model(name):
    check_statistics(build(name))


@pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS)
@pytest.mark.parametrize("name", NAMES)
def test_a_model_from_meta_is_like_a_new_one(name, flow):
    model = on_meta(name)
    flow(model)
    check_statistics(model)
    assert (model.head.weight is model.embed.weight) == model.cfg.head.tied
    for buffer in model.buffers():
        assert buffer.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_a_reset_draws_everything_anew(name):
    model = build(name)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in own_tensors(*model.modules()):
        tensor.data += 1
    model.reset_parameters()
    check_statistics(model)
    for name, tensor in model.state_dict().items():
        assert not before[name].std() > 0 or not torch.isclose(tensor, before[name]).all(), name


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", ["loss-free", "tied"])
def test_a_tied_head_stays_tied(name, assign):
    """New memory for each name and a state under both names leave one tensor."""
    state = build(name).state_dict()
    model = on_meta(name)
    whole = nn.Sequential(model)
    whole.load_state_dict({f"0.{key}": tensor for key, tensor in state.items()}, assign=assign)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, state["embed.weight"])


def test_every_module_resets_what_it_owns():
    seen = set()
    for name in NAMES:
        model = on_meta(name)
        if isinstance(model, Decoder):
            attach(model, LoraConfig())
        for module in model.modules():
            seen.add(type(module))
            own = list(own_tensors(module))
            if own:
                module.reset_parameters()
                assert all(tensor.isfinite().all() for tensor in own), type(module)
    # tests/moe/test_parallel.py has the second; the third owns nothing.
    apart = (Packed, ParallelExperts, Cached)
    assert {kind for kind in leaves(nn.Module) if not issubclass(kind, apart)} <= seen
    assert Linear in seen


def leaves(kind):
    """The classes of moestro.models and moestro.moe without a subclass."""
    below = kind.__subclasses__()
    if not below and kind.__module__.startswith(("moestro.models", "moestro.moe")):
        yield kind
    for one in below:
        yield from leaves(one)
