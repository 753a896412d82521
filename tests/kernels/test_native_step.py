"""A whole decoding step in native code, against the decoder's own forward."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.config import ModelConfig
from moestro.errors import ShapeError
from moestro.kernels import native_cpu
from moestro.kernels.native_layers import StepLayer, StepShape
from moestro.kernels.native_library import _team
from moestro.kernels.native_step import StepDecoder, StepPast
from moestro.kernels.packing import ExpertSlabs, Format
from moestro.models.decoder import Decoder
from moestro.models.rotary import rotary

VOCAB = 99
HEADS: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "context": 24}
MOE: dict[str, Any] = {"hidden_dim": 24, "num_experts": 6, "top_k": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one group": {"attention": {**HEADS, "num_kv_heads": 1, "head_dim": 6}},
    "qk_norm": {"attention": {**HEADS, "qk_norm": "head"}},
    "gpt-oss": {
        "attention": {
            **HEADS,
            "bias": "all",
            "sinks": True,
            "window": {"size": 5, "full_every": 2},
        },
        "moe": {
            **MOE,
            "activation": "clamped_swiglu",
            "experts": {"bias": True},
            "router": {"bias": True},
        },
    },
    "deepseek": {
        "dense_first": 1,
        "dense": {"hidden_dim": 50},
        "moe": {
            **MOE,
            "router": {"kind": "sigmoid", "selection_bias": True, "scale": 2.5},
            "shared": {"hidden_dim": 40},
        },
    },
    "gated shared": {
        "moe": {**MOE, "router": {"renormalize": False}, "shared": {"hidden_dim": 40, "gate": True}}
    },
    "dense": {"moe": None, "dense": {"hidden_dim": 40}},
    "head": {"head": {"tied": False, "bias": True, "scale": 0.7}},
    "gelu": {"moe": {**MOE, "activation": "gelu"}},
}


@pytest.fixture(autouse=True)
def _needs_the_library(native):
    pass


def new_model(**changes: Any) -> Decoder:
    """Small, with no part that is still zero or one."""
    settings = {"vocab_size": VOCAB, "dim": 32, "num_layers": 3, "attention": HEADS, "moe": MOE}
    model = Decoder(ModelConfig(**{**settings, **changes})).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.2)
    return model


def fp32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float().contiguous()


def matrix(weight: Tensor, format: Format | None):
    weight = weight.detach()
    return (
        native_cpu.plain_matrix(weight)
        if format is None
        else native_cpu.pack_matrix(weight, format)
    )


def experts(module, format: Format | None) -> ExpertSlabs:
    up, down, biases = module.gate_up.detach(), module.down.detach(), module.biases or (None, None)
    if format is None:
        return native_cpu.plain_experts(up, down, module.activation, *biases)
    size = native_cpu.slab_bytes(*down.shape[1:], module.activation, format)
    slabs = native_cpu.aligned(len(down) * size).view(len(down), size)
    for number, slab in enumerate(slabs):
        native_cpu.pack_expert(up[number], down[number], module.activation, format, slab)
    return ExpertSlabs(slabs.view(-1), *down.shape, module.activation, format, *map(fp32, biases))


def step_layer(block, window: int | None, format: Format | None) -> StepLayer:
    attention, ffn = block.attention, block.ffn
    layer = StepLayer(
        fp32(block.attention_norm.weight),
        fp32(block.ffn_norm.weight),
        matrix(attention.out.weight, format),
        experts(getattr(ffn, "experts", ffn), format),
        matrix(attention.qkv.weight, format),
        window=window or 0,
        qkv_bias=fp32(attention.qkv.bias),
        out_bias=fp32(attention.out.bias),
        q_norm=None if attention.q_norm is None else fp32(attention.q_norm.weight),
        k_norm=None if attention.k_norm is None else fp32(attention.k_norm.weight),
        sinks=fp32(attention.sinks),
    )
    if not hasattr(ffn, "router"):
        return layer
    return layer._replace(
        router=fp32(ffn.router.weight),
        logit_bias=fp32(ffn.router.logit_bias),
        selection_bias=fp32(ffn.router.bias),
        shared=None if ffn.shared is None else experts(ffn.shared, format),
        shared_gate=None if ffn.shared_gate is None else fp32(ffn.shared_gate.weight[0]),
    )


def native_of(
    model: Decoder, format: Format | None = None, cache_dtype: torch.dtype = torch.float32
) -> StepDecoder:
    cfg, moe = model.cfg, model.cfg.moe
    shape = StepShape(
        dim=cfg.dim,
        heads=cfg.attention.num_heads,
        groups=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        vocab=cfg.vocab_size,
        top_k=0 if moe is None else moe.top_k,
        sigmoid=moe is not None and moe.router.kind == "sigmoid",
        renormalize=moe is not None and moe.renormalizes,
        router_scale=1.0 if moe is None else moe.router.scale,
        eps=cfg.norm.eps,
        score_scale=model.blocks[0].attention.scale,
        head_scale=cfg.head.scale,
    )
    layers = [step_layer(b, cfg.window(n), format) for n, b in enumerate(model.blocks)]
    head = matrix(model.head.weight, format)
    norm = fp32(model.norm.weight)
    return StepDecoder(layers, shape, norm, head, fp32(model.head.bias), cache_dtype)


class Past:
    """One sequence's cache, and the step's view of it."""

    def __init__(self, native: StepDecoder, model: Decoder) -> None:
        self.cache, self.view = model.new_cache(1), StepPast(native)
        size = (1, model.cfg.num_kv_heads, 0, model.cfg.head_dim)
        self._like = (torch.empty(size, dtype=native.past_kind.layers[0][0].dtype),) * 2

    @property
    def position(self) -> int:
        return self.cache.position

    def placed(self) -> StepPast:
        for number, layer in enumerate(self.cache.layers):
            self.view.put(number, *layer.room(1, *self._like), layer.length)
        return self.view


@torch.inference_mode()
def step(model: Decoder, native: StepDecoder, tokens_B: Tensor, pasts: list[Past]):
    device = torch.device("cpu")
    turns = [rotary(past.position, 1, model.cfg, device, torch.float32) for past in pasts]
    cos_BA, sin_BA = (torch.cat(each) for each in zip(*turns, strict=True))
    x_BD, placed = model.embed(tokens_B).float(), [past.placed() for past in pasts]
    results = native.step(x_BD, cos_BA, sin_BA, placed)
    for past in pasts:
        past.cache.advance(1)
    return results


def same(model: Decoder, native: StepDecoder, tokens_BS: Tensor, share: float) -> None:
    """Token by token, logits and routing as the forward's, for all sequences together."""
    batch, length = tokens_BS.shape
    pasts = [Past(native, model) for _ in range(batch)]
    cache = model.new_cache(batch)
    for position in range(length):
        with torch.inference_mode():
            expected = model(tokens_BS[:, position : position + 1], cache=cache)
        logits_BV, experts_LBK, weights_LBK = step(model, native, tokens_BS[:, position], pasts)
        size = expected.logits.abs().max().item()
        torch.testing.assert_close(logits_BV, expected.logits[:, 0], rtol=0, atol=share * size)
        routed = dict(zip(model.moe_layers, expected.routings, strict=True))
        for layer in range(model.cfg.num_layers):
            if layer in routed:
                experts_BK = routed[layer].experts_R.view(batch, -1)
                weights_BK = routed[layer].weights_R.view(batch, -1)
                assert torch.equal(experts_LBK[layer], experts_BK)
                torch.testing.assert_close(weights_LBK[layer], weights_BK, rtol=1e-4, atol=1e-5)
            else:
                assert (experts_LBK[layer] == -1).all()
                assert (weights_LBK[layer] == 0).all()
    assert [past.position for past in pasts] == [length] * batch


@pytest.mark.parametrize("name", VARIANTS)
def test_steps_are_the_forward(name):
    """Past the context of 24: rings close, and windows of 5 long before."""
    model = new_model(**VARIANTS[name])
    same(model, native_of(model), torch.randint(0, VOCAB, (2, 40)), 2e-5)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", ["gpt-oss", "deepseek"])
def test_packed_steps_are_the_forward_of_what_is_packed(name, kind):
    """All experts are chosen, so that rounding cannot turn a choice."""
    changes = VARIANTS[name]
    model = new_model(**{**changes, "moe": {**changes["moe"], "num_experts": 3}})
    format, tokens_B = Format(kind), torch.randint(0, VOCAB, (2,))
    native = native_of(model, format)
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if is_packed(n, p)):
            for part in parameter.view(-1, *parameter.shape[-2:]):
                part.copy_(native_cpu.unpack_matrix(native_cpu.pack_matrix(part, format)))
        expected = model(tokens_B[:, None]).logits[:, 0]
    pasts = [Past(native, model) for _ in tokens_B]
    logits_BV, _, _ = step(model, native, tokens_B, pasts)
    error = ((logits_BV - expected).norm() / expected.norm()).item()
    assert error < {"float32": 1e-5, "bfloat16": 0.02}.get(kind, 0.05)


def is_packed(name: str, parameter: Tensor) -> bool:
    """Projections and experts, and the embedding where it is the head too."""
    return (
        parameter.dim() > 1
        and "router" not in name
        and "gate.weight" not in name
        and (not name.endswith("_bias"))
    )


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [None, "float32", "bfloat16", "int8", "int4"])
def test_a_sequence_alone_or_in_a_batch(kind, cache_dtype, on_every_path):
    """Different positions side by side: each the bits it has alone, on every path."""
    model = new_model(**VARIANTS["gpt-oss"])
    native = native_of(model, kind and Format(kind), cache_dtype)
    tokens_BS = torch.randint(0, VOCAB, (9, 30))
    starts = list(range(0, 27, 3))  # how far each one is when all come together

    def alone() -> list[Tensor]:
        results = []
        for tokens_S, start in zip(tokens_BS, starts, strict=True):
            past = Past(native, model)
            for token in tokens_S[: start + 2]:
                last = step(model, native, token[None], [past])
            results.append(torch.cat([last[0][0], last[1].flatten(), last[2].flatten()]))
        return torch.stack(results)

    def together() -> list[Tensor]:
        pasts = [Past(native, model) for _ in starts]
        for past, tokens_S, start in zip(pasts, tokens_BS, starts, strict=True):
            for token in tokens_S[:start]:
                step(model, native, token[None], [past])
        for offset in range(2):
            tokens_B = torch.stack(
                [s[at + offset] for s, at in zip(tokens_BS, starts, strict=True)]
            )
            logits, chosen, weights = step(model, native, tokens_B, pasts)
        parts = (chosen.transpose(0, 1).flatten(1), weights.transpose(0, 1).flatten(1))
        return torch.cat([logits, *parts], dim=1)

    assert torch.equal(on_every_path(together), alone())


def test_threads_do_not_show(native):
    model = new_model(**VARIANTS["gated shared"])
    decoder, before = native_of(model), native.moestro_threads()
    tokens_BS = torch.randint(0, VOCAB, (5, 12))

    def run(threads: int) -> Tensor:
        native.moestro_use_threads(threads, None)
        pasts = [Past(decoder, model) for _ in range(5)]
        return torch.stack([step(model, decoder, tokens, pasts)[0] for tokens in tokens_BS.T])

    try:
        expected = run(1)
        assert torch.equal(run(2), expected)
        assert torch.equal(run(3), expected)
    finally:
        native.moestro_use_threads(before, _team())


@pytest.mark.parametrize("length", [1, 255, 700])
def test_steps_go_on_from_a_prompt_in_the_same_memory(length):
    """The forward and the step take turns on one cache, which grows and slides meanwhile."""
    changes = VARIANTS["gpt-oss"]
    model = new_model(**{**changes, "attention": {**changes["attention"], "context": 300}})
    native, tokens_1S = native_of(model), torch.randint(0, VOCAB, (1, length + 60))
    past, cache = Past(native, model), model.new_cache(1)
    with torch.inference_mode():
        for each in (past.cache, cache):
            model(tokens_1S[:, :length], cache=each)
        for position in range(length, length + 60):
            expected = model(tokens_1S[:, position : position + 1], cache=cache).logits[0]
            if position % 3 == 0:
                got_BV = model(tokens_1S[:, position : position + 1], cache=past.cache).logits[0]
            else:
                got_BV, _, _ = step(model, native, tokens_1S[:, position], [past])
            size = expected.abs().max().item()
            torch.testing.assert_close(got_BV, expected, rtol=0, atol=2e-5 * size)


def test_16_bit_weights_and_past():
    model = new_model().bfloat16()
    native = native_of(model, cache_dtype=torch.bfloat16)
    tokens_B = torch.randint(0, VOCAB, (2,))
    with torch.inference_mode():
        expected_BV = model.float()(tokens_B[:, None]).logits[:, 0]
    pasts = [Past(native, model) for _ in range(2)]
    logits_BV, _, _ = step(model, native, tokens_B, pasts)
    assert ((logits_BV - expected_BV).norm() / expected_BV.norm()).item() < 0.02


def test_what_does_not_fit_is_refused():
    model = new_model()
    native = native_of(model)
    past = Past(native, model)
    turn = torch.ones(1, model.cfg.head_dim // 2)
    with pytest.raises(ShapeError, match=r"embeddings must be .*\[1, 32\]"):
        native.step(torch.zeros(1, 31), turn, turn, [past.placed()])
    with pytest.raises(ShapeError, match=r"embeddings must be .*\[1, 32\]"):
        native.step(torch.zeros(2, 32), turn, turn, [past.placed()])
    view, good = StepPast(native), torch.zeros(1, model.cfg.num_kv_heads, 4, model.cfg.head_dim)
    for bad in (good[0], good[:, :1], good.double(), good.transpose(2, 3), good[:, :, ::2]):
        with pytest.raises(ShapeError, match="keys and values must be"):
            view.put(0, (good, bad), 0, 0)
    with pytest.raises(ShapeError, match="every layer put"):  # a layer that was never put
        native.step(torch.zeros(1, 32), turn, turn, [view])
    for number in range(model.cfg.num_layers):
        view.put(number, (good, good.clone()), 4, 0)  # past the end
    with pytest.raises(ShapeError, match="every layer put"):
        native.step(torch.zeros(1, 32), turn, turn, [view])
    view.put(0, (good, good.clone()), 2, 3)  # more kept than there are
    with pytest.raises(ShapeError, match="every layer put"):
        native.step(torch.zeros(1, 32), turn, turn, [view])
    for number in range(model.cfg.num_layers):
        view.put(number, (good, good.clone()), 2, 2)
    other = past.placed()
    for rows, more in (
        (3, 1),
        (0, 1),
        (-1, 2),
        (2**62, 1),
    ):  # beyond the end, none, fewer, overflow
        view.rows, other.rows = rows, more
        total = max(0, min(rows + more, 8))
        with pytest.raises(ShapeError, match=r"every layer put|must be"):
            native.step(
                torch.zeros(total, 32),
                turn.expand(total, -1),
                turn.expand(total, -1),
                [view, other],
            )
    layers = [step_layer(block, None, None) for block in model.blocks]
    layers[0] = layers[0]._replace(ffn_norm=layers[0].ffn_norm.double())
    with pytest.raises(ShapeError, match="float64"):
        StepDecoder(layers, native.shape, fp32(model.norm.weight), matrix(model.head.weight, None))
