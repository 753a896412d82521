"""Decoding in native code: tokens of many sequences through the whole model in one call.

Weights are used where they are, packed or plain; only norms and routers are copied, to fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moestro.config import ModelConfig, RopeConfig
from moestro.errors import MoestroError
from moestro.kernels import backends
from moestro.kernels.backends import Work
from moestro.kernels.native_step import StepDecoder, StepLayer, StepPast, StepShape
from moestro.models.attention import Attention
from moestro.models.blocks import Block
from moestro.models.cache import KVCache, LayerCache
from moestro.models.decoder import Decoder
from moestro.models.norms import LayerNorm, RMSNorm
from moestro.models.rotary import RotaryTable, turning_width
from moestro.moe.layer import MoE
from moestro.moe.lora import Adapter
from moestro.moe.routers import TopKRouter


class Stepped(NamedTuple):
    """T new tokens of B sequences; L mixtures in the order of `model.moe_layers`."""

    logits_BV: Tensor  # fp32, after each sequence's last token
    experts_LTK: Tensor  # int64
    weights_LTK: Tensor  # fp32


def supports(model: nn.Module) -> str | None:
    """None where decoding can run natively, else the reason.

    Packed and plain weights both can: grouped-query attention with rotary positions of whole heads
    or a part, windows, sinks, biases, norms of queries and keys; RMSNorm and layer norm; softmax
    and sigmoid routers.
    """
    if not isinstance(model, Decoder):
        return f"only decoders of this project decode natively, not {type(model).__name__}"
    own, embed = [getattr(each, "backend", "auto") for each in model.modules()], model.embed.weight
    asked = next((name for name in own if name not in ("auto", "native")), "auto")
    weights, lacks = tuple(model.parameters()), _lacks(model.cfg) or _wrapped(model)
    work = Work(embed.device.type, embed.dtype, (), "step", weights, lacks)
    return backends.why_not_whole(asked, work)


def _lacks(cfg: ModelConfig) -> str | None:
    """What in the settings the native step does not have."""
    attention, moe = cfg.attention, cfg.moe
    lacking = {
        "latent attention": attention.latent is not None,
        "gated DeltaNet layers": attention.delta is not None,
        "relative positions": not isinstance(attention.positions, RopeConfig),
        "a scaled residual with normed queries": cfg.norm.residual_scale != 1
        and attention.qk_norm != "none",
    }
    if moe is not None:
        router = moe.router
        lacking["a capacity"] = moe.capacity is not None
        lacking[f"the {router.kind} router"] = router.kind not in ("softmax", "sigmoid")
    return next((f"no native step for {what}" for what, lacks in lacking.items() if lacks), None)


def _wrapped(model: Decoder) -> str | None:
    """What the native step would pass by: hooks, and modules around the experts."""
    for layer in model.mixtures():
        if not hasattr(layer.experts, "native"):
            return f"experts of the class {type(layer.experts).__name__} decode in Python"
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            return "adapters that are not merged decode in Python"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name} has hooks, which only decoding in Python calls"
    return None


class NativeDecoder:
    """A decoder's weights as the native step takes them.

    Args:
        model: one that `supports` accepts; must not change while this lives.

    Raises:
        MoestroError: `supports` does not accept it; says why.
    """

    def __init__(self, model: Decoder) -> None:
        reason = supports(model)
        if reason is not None:
            raise MoestroError(f"this model cannot decode natively: {reason}")
        self.model, cfg = model, model.cfg
        attention = model.blocks[0].attention
        assert isinstance(attention, Attention)
        self._rotary = RotaryTable(cfg)
        self._pasts: WeakKeyDictionary[KVCache, StepPast] = WeakKeyDictionary()
        empty = model.embed.weight.new_empty(1, cfg.num_kv_heads, 0, cfg.head_dim)
        self._like, head = (empty, empty), model.head.native()
        self._step = StepDecoder(
            [_layer(block) for block in model.blocks if isinstance(block, Block)],
            _shape(cfg, attention.scale),
            _gain(model.norm),
            head,
            head.bias,
            model.embed.weight.dtype,
            _shift(model.norm),
        )

    @torch.inference_mode()
    def step(self, tokens: Sequence[Sequence[int]], pasts: Sequence[KVCache]) -> Stepped:
        """New tokens of each sequence, at least one.

        A token gets the same bits however its sequence is cut, and whatever runs beside it.

        Args:
            tokens: of each sequence, those that follow its past.
            pasts: caches of batch 1, each its own; the step extends them in place.
        """
        tokens_T = torch.tensor([*chain.from_iterable(tokens)], dtype=torch.int64, device="cpu")
        # The residual runs divided by its scale; its norms, whose eps is divided by the square,
        # are the same.
        x_TD = self.model.embedded(tokens_T).float() / self.model.cfg.norm.residual_scale
        device = torch.device("cpu")
        pairs = list(zip(tokens, pasts, strict=True))
        angles = [
            self._rotary.at(past.position, len(new), device, torch.float32) for new, past in pairs
        ]
        cos_TA, sin_TA = (torch.cat(each) for each in zip(*angles, strict=True))
        places = [self._place(past, len(new)) for new, past in pairs]
        logits_BV, experts_LTK, weights_LTK = self._step.step(x_TD, cos_TA, sin_TA, places)
        for new, past in pairs:
            past.advance(len(new))
        mixtures = list(self.model.moe_layers)
        return Stepped(logits_BV, experts_LTK[mixtures], weights_LTK[mixtures])

    def _place(self, cache: KVCache, added: int) -> StepPast:
        """Where the new positions of a sequence go."""
        past = self._pasts.get(cache)
        if past is None:
            past = self._pasts[cache] = StepPast(self._step)
        for number, layer in enumerate(cache.layers):
            assert isinstance(layer, LayerCache)
            past.put(number, *layer.room(added, *self._like), layer.length)
        past.rows = added
        return past


def _shape(cfg: ModelConfig, score_scale: float) -> StepShape:
    """The numbers that all layers share."""
    moe = cfg.moe
    shape = StepShape(
        dim=cfg.dim,
        heads=cfg.attention.num_heads,
        groups=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        vocab=cfg.vocab_size,
        top_k=0,
        turning=turning_width(cfg),
        norm_all=cfg.attention.qk_norm == "full",
        norm_rotated=cfg.attention.qk_norm == "rotated",
        eps=cfg.norm.eps / cfg.norm.residual_scale**2,
        score_scale=score_scale,
        head_scale=cfg.head.scale,
    )
    if moe is None:
        return shape
    router, size = moe.router, moe.num_experts // moe.router.num_groups
    return shape._replace(
        top_k=moe.top_k,
        sigmoid=router.kind == "sigmoid",
        renormalize=moe.renormalizes,
        router_scale=router.scale,
        expert_groups=router.num_groups,
        top_groups=router.top_groups,
        group_best=min(2, size) if router.group_score == "top2" else 1,
    )


def _layer(block: Block) -> StepLayer:
    """One block's weights."""
    attention: Any = block.attention
    ffn: Any = block.ffn
    experts: Any = ffn.experts if isinstance(ffn, MoE) else ffn
    qkv, out = attention.qkv.native(), attention.out.native()
    layer = StepLayer(
        attention_norm=_gain(block.attention_norm),
        ffn_norm=_gain(block.ffn_norm),
        attention_norm_bias=_shift(block.attention_norm),
        ffn_norm_bias=_shift(block.ffn_norm),
        qkv=qkv,
        out=out,
        experts=experts.native(),
        window=attention.window,
        qkv_bias=qkv.bias,
        out_bias=out.bias,
        q_norm=None if attention.q_norm is None else _gain(attention.q_norm),
        k_norm=None if attention.k_norm is None else _gain(attention.k_norm),
        sinks=_maybe(attention.sinks),
    )
    if not isinstance(ffn, MoE):
        return layer
    assert isinstance(ffn.router, TopKRouter)
    shared: Any = ffn.shared
    return layer._replace(
        router=_fp32(ffn.router.weight),
        logit_bias=_maybe(ffn.router.logit_bias),
        selection_bias=_maybe(ffn.router.bias),
        shared=None if shared is None else shared.native(),
        shared_gate=None if ffn.shared_gate is None else _fp32(ffn.shared_gate.weight[0]),
    )


def _gain(norm: RMSNorm | LayerNorm) -> Tensor:
    return _fp32(norm.gain() if isinstance(norm, RMSNorm) else norm.weight)


def _shift(norm: RMSNorm | LayerNorm) -> Tensor | None:
    return _fp32(norm.bias) if isinstance(norm, LayerNorm) else None


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()


def _maybe(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _fp32(tensor)
