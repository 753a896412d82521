"""Decoding in native code: tokens of many sequences through the whole model in one call.

Weights are used where they are, packed or plain; only norms and routers are copied, to fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moestro.config import ModelConfig, RopeConfig
from moestro.errors import MoestroError
from moestro.kernels import backends, native_cpu, packing
from moestro.kernels.native_step import StepDecoder, StepLayer, StepPast, StepShape
from moestro.kernels.packing import PackedMatrix
from moestro.models.attention import Attention
from moestro.models.cache import KVCache
from moestro.models.decoder import Block, Decoder
from moestro.models.linear import PackedLinear
from moestro.models.norms import RMSNorm
from moestro.models.rotary import RotaryTable
from moestro.moe.experts import StackedWeights
from moestro.moe.layer import MoE
from moestro.moe.packed import PackedWeights
from moestro.moe.routers import TopKRouter

_DTYPES = (torch.float32, torch.bfloat16)


class Stepped(NamedTuple):
    """One token of B sequences.

    Attributes:
        logits_BV: fp32.
        experts_LBK: int64, the experts of each mixture, in the order of `model.moe_layers`.
        weights_LBK: fp32, their weights.
    """

    logits_BV: Tensor
    experts_LBK: Tensor
    weights_LBK: Tensor


def supports(model: nn.Module) -> str | None:
    """None where decoding can run natively, else the reason.

    Packed and plain weights both can: grouped-query attention with rotary positions, windows,
    sinks, biases and norms per head; RMSNorm; softmax and sigmoid routers without groups.
    """
    if not isinstance(model, Decoder):
        return f"only decoders of this project decode natively, not {type(model).__name__}"
    missing = native_cpu.available()
    if missing is not None:
        return missing
    return _settings(model.cfg) or _weights(model)


def _settings(cfg: ModelConfig) -> str | None:
    """What in the settings the native step has not."""
    attention, moe = cfg.attention, cfg.moe
    if attention.latent is not None:
        return "latent attention decodes in Python"
    if not isinstance(attention.positions, RopeConfig):
        return "relative positions decode in Python"
    if attention.qk_norm == "full":
        return "a norm over all heads together decodes in Python"
    if cfg.norm.kind != "rms":
        return "layer norm decodes in Python"
    if moe is None:
        return None
    if moe.capacity is not None:
        return "a capacity decodes in Python"
    if moe.router.kind not in ("softmax", "sigmoid"):
        return f"the {moe.router.kind} router decodes in Python"
    return "routers with groups decode in Python" if moe.router.num_groups > 1 else None


def _weights(model: Decoder) -> str | None:
    """What about the tensors the native step cannot take."""
    forced = backends.forced()
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            return f"native decoding runs on CPU; {name} is on {parameter.device}"
        if parameter.dtype not in _DTYPES:
            return f"native decoding takes fp32 and bf16 weights; {name} is {parameter.dtype}"
        odd = parameter.dim() > 1 and parameter.shape[-1] % 2
        if not parameter.is_contiguous() or (odd and parameter.dtype == torch.bfloat16):
            return f"native decoding takes contiguous weights of even widths; {name} is not so"
    for layer in model.mixtures():
        if not isinstance(layer.experts, StackedWeights | PackedWeights):
            return f"experts of the class {type(layer.experts).__name__} decode in Python"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name} has hooks, which only decoding in Python calls"
        if isinstance(module, StackedWeights):
            asked = forced if module.backend == "auto" else module.backend
            if asked not in ("auto", "native"):
                return f"the kernel backend {asked} was asked for"
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
        self._like = (empty, empty)
        self._step = StepDecoder(
            [_layer(block) for block in model.blocks if isinstance(block, Block)],
            _shape(cfg, attention.scale),
            _fp32(model.norm.weight),
            _matrix(model.head),
            _bias(model.head),
            model.embed.weight.dtype,
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
        x_TD = self.model.embed(tokens_T).float()
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
            past.put(number, *layer.room(added, *self._like), layer.length)
        past.rows = added
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
    attention, ffn = block.attention, block.ffn
    assert isinstance(attention, Attention)
    layer = StepLayer(
        attention_norm=_gain(block.attention_norm),
        ffn_norm=_gain(block.ffn_norm),
        qkv=_matrix(attention.qkv),
        out=_matrix(attention.out),
        experts=_experts(ffn.experts if isinstance(ffn, MoE) else ffn),
        window=attention.window,
        qkv_bias=_bias(attention.qkv),
        out_bias=_bias(attention.out),
        q_norm=None if attention.q_norm is None else _gain(attention.q_norm),
        k_norm=None if attention.k_norm is None else _gain(attention.k_norm),
        sinks=_maybe(attention.sinks),
    )
    if not isinstance(ffn, MoE):
        return layer
    assert isinstance(ffn.router, TopKRouter)
    gate = ffn.shared_gate
    return layer._replace(
        router=_fp32(ffn.router.weight),
        logit_bias=_maybe(ffn.router.logit_bias),
        selection_bias=_maybe(ffn.router.bias),
        shared=None if ffn.shared is None else _experts(ffn.shared),
        shared_gate=None if gate is None else _fp32(gate.weight[0]),
    )


def _gain(norm: nn.Module) -> Tensor:
    assert isinstance(norm, RMSNorm)
    return _fp32(norm.weight)


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()


def _maybe(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _fp32(tensor)


def _matrix(linear: nn.Module) -> PackedMatrix:
    """A projection's weights, packed or as they are."""
    if isinstance(linear, PackedLinear):
        return linear.weights
    assert isinstance(linear, nn.Linear)
    return native_cpu.plain_matrix(linear.weight.detach())


def _bias(linear: nn.Module) -> Tensor | None:
    if isinstance(linear, PackedLinear):
        return linear.bias_O
    assert isinstance(linear, nn.Linear)
    return _maybe(linear.bias)


def _experts(experts: nn.Module) -> packing.PackedExperts:
    """Experts' weights, packed or as they are."""
    if isinstance(experts, PackedWeights):
        return experts.weights
    assert isinstance(experts, StackedWeights)
    up_EH, down_ED = experts.biases or (None, None)
    return native_cpu.plain_experts(
        experts.gate_up.detach(),
        experts.down.detach(),
        experts.activation,
        _maybe(up_EH),
        _maybe(down_ED),
    )
