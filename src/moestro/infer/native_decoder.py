"""Decoding in native code: one token of each sequence through the whole model in one call.

Weights are used where they are, packed or plain; only norms and routers are copied, to fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from moestro.models.cache import KVCache
from moestro.models.decoder import Decoder
from moestro.models.rotary import RotaryTable
from moestro.moe.layer import MoE
from moestro.moe.routers import TopKRouter


class Stepped(NamedTuple):
    """One token of B sequences; L mixtures in the order of `model.moe_layers`."""

    logits_BV: Tensor  # fp32
    experts_LBK: Tensor  # int64
    weights_LBK: Tensor  # fp32


def supports(model: nn.Module) -> str | None:
    """None where decoding can run natively, else the reason.

    Packed and plain weights both can: grouped-query attention with rotary positions, windows,
    sinks, biases and norms per head; RMSNorm; softmax and sigmoid routers without groups.
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
        "relative positions": not isinstance(attention.positions, RopeConfig),
        "a norm over all heads together": attention.qk_norm == "full",
        "layer norm": cfg.norm.kind != "rms",
    }
    if moe is not None:
        router = moe.router
        lacking["a capacity"] = moe.capacity is not None
        lacking[f"the {router.kind} router"] = router.kind not in ("softmax", "sigmoid")
        lacking["a router with groups"] = router.num_groups > 1
    return next((f"{what} decodes in Python" for what, lacks in lacking.items() if lacks), None)


def _wrapped(model: Decoder) -> str | None:
    """What the native step would pass by: hooks, and modules around the experts."""
    for layer in model.mixtures():
        if not hasattr(layer.experts, "native"):
            return f"experts of the class {type(layer.experts).__name__} decode in Python"
    for name, module in model.named_modules():
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
            _fp32(model.norm.weight),
            head,
            head.bias,
            model.embed.weight.dtype,
        )

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], pasts: Sequence[KVCache]) -> Stepped:
        """One new token of each sequence; what a sequence gets does not depend on the others.

        Args:
            tokens: one for each sequence.
            pasts: caches of batch 1, each its own; the step extends them in place.
        """
        tokens_B = torch.tensor(tokens, dtype=torch.int64, device="cpu")
        x_BD = self.model.embed(tokens_B).float()
        device = torch.device("cpu")
        angles = [self._rotary.at(past.position, 1, device, torch.float32) for past in pasts]
        cos_BA, sin_BA = (torch.cat(each) for each in zip(*angles, strict=True))
        places = [self._place(past) for past in pasts]
        logits_BV, experts_LBK, weights_LBK = self._step.step(x_BD, cos_BA, sin_BA, places)
        for past in pasts:
            past.advance()
        mixtures = list(self.model.moe_layers)
        return Stepped(logits_BV, experts_LBK[mixtures], weights_LBK[mixtures])

    def _place(self, cache: KVCache) -> StepPast:
        """Where the new position of a sequence goes."""
        past = self._pasts.get(cache)
        if past is None:
            past = self._pasts[cache] = StepPast(self._step)
        for number, layer in enumerate(cache.layers):
            past.put(number, *layer.room(*self._like), layer.length)
        return past


def _shape(cfg: ModelConfig, score_scale: float) -> StepShape:
    """The numbers that all layers share."""
    moe = cfg.moe
    return StepShape(
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
        score_scale=score_scale,
        head_scale=cfg.head.scale,
    )


def _layer(block: Block) -> StepLayer:
    """One block's weights."""
    attention: Any = block.attention
    ffn: Any = block.ffn
    experts: Any = ffn.experts if isinstance(ffn, MoE) else ffn
    qkv, out = attention.qkv.native(), attention.out.native()
    layer = StepLayer(
        attention_norm=_fp32(block.attention_norm.weight),
        ffn_norm=_fp32(block.ffn_norm.weight),
        qkv=qkv,
        out=out,
        experts=experts.native(),
        window=attention.window,
        qkv_bias=qkv.bias,
        out_bias=out.bias,
        q_norm=None if attention.q_norm is None else _fp32(attention.q_norm.weight),
        k_norm=None if attention.k_norm is None else _fp32(attention.k_norm.weight),
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


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()


def _maybe(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _fp32(tensor)
