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

from moestro.errors import MoestroError
from moestro.kernels import backends
from moestro.kernels.addresses import CPU
from moestro.kernels.backends import Work
from moestro.kernels.native_layers import Kept, StepDelta, StepLatent, StepLayer, StepShape
from moestro.kernels.native_step import StepDecoder, StepPast
from moestro.models.blocks import Block
from moestro.models.cache import KVCache, LayerCache
from moestro.models.decoder import Decoder
from moestro.models.delta import LENGTH_EPS, DeltaNet
from moestro.models.latent import NORM_EPS, LatentAttention
from moestro.models.network import ModelOutput
from moestro.models.norms import LayerNorm, RMSNorm
from moestro.models.passing import lacks
from moestro.models.rotary import RotaryTable, turning_width
from moestro.moe.layer import MoE
from moestro.moe.lora import Adapter
from moestro.moe.routers import SparseMixerRouter, TopKRouter

# Blocks of angles that all sequences share, some MB: each finds its own, wherever it stands.
MOST_ANGLES = 64


class Stepped(NamedTuple):
    """T new tokens of B sequences; L mixtures in the order of `model.moe_layers`."""

    logits_NV: Tensor  # fp32, after the last tokens of each sequence, as many as were asked for
    experts_LTK: Tensor  # int64
    weights_LTK: Tensor  # fp32


def supports(model: nn.Module) -> str | None:
    """None where decoding can run natively, else the reason.

    Packed and plain weights both can: grouped-query attention with rotary positions of whole heads
    or a part, windows, sinks, biases, gates, norms of queries and keys; latent attention; gated
    DeltaNets; RMSNorm and layer norm; softmax, sigmoid and sparsemixer routers.
    """
    if not isinstance(model, Decoder):
        return f"only decoders of this project decode natively, not {type(model).__name__}"
    own, embed = [getattr(each, "backend", "auto") for each in model.modules()], model.embed.weight
    asked = next((name for name in own if name not in ("auto", "native")), "auto")
    weights, lacking = tuple(model.parameters()), lacks(model.cfg) or _wrapped(model)
    work = Work(embed.device.type, embed.dtype, (), "step", weights, lacking)
    return backends.why_not_whole(asked, work)


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
        self._rotary = RotaryTable(cfg, MOST_ANGLES)
        self._pasts: WeakKeyDictionary[KVCache, StepPast] = WeakKeyDictionary()
        shape, head = _shape(model), model.head.native()
        self._step = StepDecoder(
            [_layer(block) for block in model.blocks if isinstance(block, Block)],
            shape,
            _gain(model.norm),
            head,
            head.bias,
            torch.int8 if model.cache_kind == "int8" else model.embed.weight.dtype,
            _shift(model.norm),
        )
        self._like = [_empty(each) for each in self._step.past_kind.layers]
        mixtures = tuple(model.moe_layers)
        # None: all layers are.
        self._mixtures: Tensor | None = None
        if len(mixtures) < cfg.num_layers:
            self._mixtures = torch.tensor(mixtures, dtype=torch.int64, device=CPU)

    @torch.inference_mode()
    def step(
        self, tokens: Sequence[Sequence[int]], pasts: Sequence[KVCache], told: Sequence[int] = ()
    ) -> Stepped:
        """New tokens of each sequence, at least one.

        A token gets the same bits whatever runs beside it, and however its sequence is cut, except
        where angles depend on its length (longrope).

        Args:
            tokens: of each sequence, those that follow its past.
            pasts: caches of batch 1, each its own; the step extends them in place.
            told: after how many of each sequence's tokens, the last ones, logits are wanted;
                by default 1.
        """
        x_TD = self._embedded([*chain.from_iterable(tokens)])
        pairs = list(zip(tokens, pasts, strict=True))
        angles = [
            self._rotary.at(past.position, len(new), CPU, torch.float32) for new, past in pairs
        ]
        cos_TA, sin_TA = angles[0]
        if len(angles) > 1:
            cos_TA, sin_TA = (torch.cat(each) for each in zip(*angles, strict=True))
        places = [self._place(past, len(new)) for new, past in pairs]
        for place, wanted in zip(places, told or [1] * len(places), strict=True):
            place.told = wanted
        logits_NV, experts_LTK, weights_LTK = self._step.step(x_TD, cos_TA, sin_TA, places)
        for new, past in pairs:
            past.advance(len(new))
        if self._mixtures is not None:
            experts_LTK = experts_LTK.index_select(0, self._mixtures)
            weights_LTK = weights_LTK.index_select(0, self._mixtures)
        return Stepped(logits_NV, experts_LTK, weights_LTK)

    def _embedded(self, tokens_T: list[int]) -> Tensor:
        """What the first block reads, fp32 [T, D].

        The residual runs divided by its scale; its norms, whose eps is divided by the square, are
        the same.
        """
        scale, embed = self.model.cfg.norm.residual_scale, self.model.embed
        if len(tokens_T) == 1 and 0 <= tokens_T[0] < embed.num_embeddings:
            # Without the price of a look-up, which says what is wrong with other ids.
            rows_TD = embed.weight.narrow(0, tokens_T[0], 1)
        else:
            rows_TD = embed(torch.tensor(tokens_T, dtype=torch.int64, device=CPU))
        x_TD = self.model.scaled(rows_TD).float()
        return x_TD if scale == 1.0 else x_TD / scale

    def _place(self, cache: KVCache, added: int) -> StepPast:
        """Where the new positions of a sequence go."""
        past = self._pasts.get(cache)
        if past is None:
            past = self._pasts[cache] = StepPast(self._step)
        for number, (layer, like) in enumerate(zip(cache.layers, self._like, strict=True)):
            if isinstance(layer, LayerCache):
                past.put(number, *layer.room(added, *like), layer.length)
            else:
                past.put(number, layer.room(*like), 0, 0)
        past.rows = added
        return past


class AsDecoded(nn.Module):
    """A decoder's logits of whole texts as decoding computes them, bit by bit.

    The residual between packed matrices is fp32 in the native step, and keys and values are what a
    new cache keeps; the model's own forward rounds both to its dtype.

    Args:
        model: one that `supports` accepts; must not change while this lives.
    """

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model, self.training = model, model.training
        self._native = NativeDecoder(model)

    def forward(self, tokens_BS: Tensor) -> ModelOutput:
        """Logits fp32 [B, S, V], without routings."""
        rows = tokens_BS.tolist()
        caches = [self.model.new_cache(1) for _ in rows]
        logits_NV = self._native.step(rows, caches, [len(row) for row in rows]).logits_NV
        return ModelOutput(logits_NV.view(*tokens_BS.shape, -1), ())


def _empty(kinds: Sequence[Kept]) -> tuple[Tensor, ...]:
    """Tensors of a layer's buffers without positions."""
    sizes = ([n or 0 for n in each.shape] for each in kinds)
    pairs = zip(sizes, kinds, strict=True)
    return tuple(torch.empty(size, dtype=kind.dtype, device="cpu") for size, kind in pairs)


def _shape(model: Decoder) -> StepShape:
    """The numbers that all layers share."""
    cfg, moe, latent = model.cfg, model.cfg.moe, model.cfg.attention.latent
    attentions: list[Any] = [block.attention for block in model.blocks if block.delta is None]
    shape = StepShape(
        dim=cfg.dim,
        heads=cfg.attention.num_heads,
        groups=cfg.num_kv_heads if latent is None else 1,
        head_dim=cfg.head_dim if latent is None else latent.kv_rank + latent.rope_dim,
        vocab=cfg.vocab_size,
        top_k=0,
        turning=turning_width(cfg),
        norm_all=cfg.attention.qk_norm == "full",
        norm_rotated=cfg.attention.qk_norm == "rotated",
        gated=any(getattr(each, "gated", False) for each in attentions),
        eps=cfg.norm.eps / cfg.norm.residual_scale**2,
        score_scale=attentions[0].scale if attentions else 1.0,
        head_scale=cfg.head.scale,
    )
    if moe is None:
        return shape
    router, size = moe.router, moe.num_experts // moe.router.num_groups
    return shape._replace(
        top_k=moe.top_k,
        sigmoid=router.kind == "sigmoid",
        rivals=2 * router.jitter if router.kind == "sparsemixer" else 0.0,
        renormalize=moe.renormalizes,
        router_scale=router.scale,
        expert_groups=router.num_groups,
        top_groups=router.top_groups,
        group_best=min(2, size) if router.group_score == "top2" else 1,
    )


def _layer(block: Block) -> StepLayer:
    """One block's weights."""
    attention: Any = block.attention if block.delta is None else block.delta
    ffn: Any = block.ffn
    experts: Any = ffn.experts if isinstance(ffn, MoE) else ffn
    out = attention.out.native()
    layer = StepLayer(
        attention_norm=_gain(block.attention_norm),
        ffn_norm=_gain(block.ffn_norm),
        attention_norm_bias=_shift(block.attention_norm),
        ffn_norm_bias=_shift(block.ffn_norm),
        out=out,
        experts=experts.native(),
        out_bias=out.bias,
    )
    if isinstance(attention, DeltaNet):
        layer = layer._replace(delta=_delta(attention))
    elif isinstance(attention, LatentAttention):
        layer = layer._replace(latent=_latent(attention), window=attention.window)
    else:
        qkv = attention.qkv.native()
        layer = layer._replace(
            qkv=qkv,
            qkv_bias=qkv.bias,
            window=attention.window,
            q_norm=None if attention.q_norm is None else _gain(attention.q_norm),
            k_norm=None if attention.k_norm is None else _gain(attention.k_norm),
            sinks=_maybe(attention.sinks),
        )
    if not isinstance(ffn, MoE):
        return layer
    assert isinstance(ffn.router, TopKRouter | SparseMixerRouter)
    shared: Any = ffn.shared
    return layer._replace(
        router=_fp32(ffn.router.weight),
        logit_bias=_maybe(ffn.router.logit_bias),
        selection_bias=_maybe(ffn.router.bias),
        shared=None if shared is None else shared.native(),
        shared_gate=None if ffn.shared_gate is None else _fp32(ffn.shared_gate.weight[0]),
    )


def _latent(attention: LatentAttention) -> StepLatent:
    """Latent attention's weights."""
    latent: Any = attention.latent
    ranked = latent.q_rank is not None
    return StepLatent(
        nope=latent.nope_dim,
        value=latent.value_dim,
        q=attention.q_up.native() if ranked else attention.q.native(),
        kv_down=attention.kv_down.native(),
        kv_norm=_gain(attention.kv_norm),
        kv_up=attention.kv_up.weight.detach().contiguous(),
        eps=NORM_EPS,
        q_down=attention.q_down.native() if ranked else None,
        q_norm=_gain(attention.q_norm) if ranked else None,
    )


def _delta(delta: DeltaNet) -> StepDelta:
    """A gated DeltaNet's weights."""
    settings = delta.settings
    return StepDelta(
        key_heads=settings.key_heads,
        value_heads=settings.value_heads,
        key_dim=settings.key_dim,
        value_dim=settings.value_dim,
        qkvz=delta.qkvz.native(),
        ba=_fp32(delta.ba.weight),
        conv=_fp32(delta.conv_weight[:, 0].T),
        rate=_fp32(delta.log_rate).exp(),
        time_bias=_fp32(delta.time_bias),
        gain=_gain(delta.norm),
        length_eps=LENGTH_EPS,
        eps=delta.norm.eps,
    )


def _gain(norm: RMSNorm | LayerNorm) -> Tensor:
    return _fp32(norm.gain() if isinstance(norm, RMSNorm) else norm.weight)


def _shift(norm: RMSNorm | LayerNorm) -> Tensor | None:
    return _fp32(norm.bias) if isinstance(norm, LayerNorm) else None


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()


def _maybe(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _fp32(tensor)
