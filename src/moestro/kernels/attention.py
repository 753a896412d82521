"""Causal attention with windows, sinks and biases: torch's kernels, and blocks around them.

The definition is `reference_attention.attend`. Letters: B batch, S queries, Q of them in a block,
P keys, H heads, G key/value heads, A width of a head, N = B · H or the rows of one key head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from moestro.kernels.pointwise import transformed

# Longest sequence for which keeping the probabilities, S²/2 for each head, is worth its memory.
LONGEST = 512
# Queries of one block; it sees only the keys up to its end, so nearly half of the square is saved.
BLOCK = 128
# Queries of one block where a mask is needed: it is never larger than this many times P.
ROWS = 256
# Marks the keys that each query of a block attends to: given the places of its queries and of its
# keys among the P, and which of these each sees as `visible` says it; the result is part of that.
Choose = Callable[[range, range, Tensor], Tensor]


class _ShortCausal(torch.autograd.Function):
    """Batched products and a softmax, block by block; keeps the probabilities."""

    @staticmethod
    def forward(ctx: Any, q_NSA: Tensor, k_NSA: Tensor, v_NSA: Tensor, scale: float) -> Tensor:
        length = q_NSA.shape[1]
        ctx.scale = scale
        q_NSA = q_NSA * ctx.scale
        y_NSA = torch.empty_like(v_NSA)
        future_QQ = q_NSA.new_full((BLOCK, BLOCK), -math.inf).triu_(1)
        probs = []
        for start in range(0, length, BLOCK):
            end = min(start + BLOCK, length)
            keys_NAP = k_NSA[:, :end].transpose(1, 2)
            scores_NQP = torch.bmm(q_NSA[:, start:end], keys_NAP)
            scores_NQP[:, :, start:].add_(future_QQ[: end - start, : end - start])
            probs.append(scores_NQP.softmax(-1))
            y_NSA[:, start:end] = torch.bmm(probs[-1], v_NSA[:, :end])
        ctx.save_for_backward(q_NSA, k_NSA, v_NSA, *probs)
        return y_NSA

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NSA: Tensor) -> tuple[Tensor | None, ...]:
        q_NSA, k_NSA, v_NSA, *probs = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q_NSA, k_NSA, v_NSA))
        for number, probs_NQP in enumerate(probs):
            rows = slice(number * BLOCK, number * BLOCK + probs_NQP.shape[1])
            seen = slice(0, rows.stop)
            grad_NQA = grad_NSA[:, rows]
            grad_v[:, seen] += torch.bmm(probs_NQP.transpose(1, 2), grad_NQA)
            grad_NQP = torch.bmm(grad_NQA, v_NSA[:, seen].transpose(1, 2))
            dtype = probs_NQP.dtype
            grad_NQP = torch.ops.aten._softmax_backward_data(grad_NQP, probs_NQP, -1, dtype)
            grad_q[:, rows] = torch.bmm(grad_NQP, k_NSA[:, seen])
            grad_k[:, seen] += torch.bmm(grad_NQP.transpose(1, 2), q_NSA[:, rows])
        return grad_q.mul_(ctx.scale), grad_k, grad_v, None


def short_causal(
    q_BHSA: Tensor, k_BGSA: Tensor, v_BGSA: Tensor, scale: float | None = None
) -> Tensor:
    """Causal attention by plain batched products; see `reference_attention.attend`."""
    heads = q_BHSA.shape[1]
    k_BHSA, v_BHSA = (
        x.repeat_interleave(heads // x.shape[1], dim=1) if x.shape[1] != heads else x
        for x in (k_BGSA, v_BGSA)
    )
    factor = q_BHSA.shape[3] ** -0.5 if scale is None else scale
    rows = (x.flatten(0, 1) for x in (q_BHSA, k_BHSA, v_BHSA))
    y_NSA: Tensor = _ShortCausal.apply(*rows, factor)
    return y_NSA.view(*q_BHSA.shape[:2], *y_NSA.shape[1:])


def causal(q_BHSA: Tensor, k_BGSA: Tensor, v_BGSA: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention by whatever is fastest here.

    On CPU, torch's flash kernel takes twice the time of plain products in 16 bits when it trains
    on short sequences; everywhere else it is the better one.
    """
    training = torch.is_grad_enabled() and q_BHSA.requires_grad and not transformed()
    sixteen_bits = q_BHSA.dtype in (torch.bfloat16, torch.float16)
    if training and sixteen_bits and q_BHSA.device.type == "cpu" and q_BHSA.shape[2] <= LONGEST:
        return short_causal(q_BHSA, k_BGSA, v_BGSA, scale)
    return _fused(q_BHSA, k_BGSA, v_BGSA, scale, causal=True)


def attend(
    q_BHSA: Tensor,
    k_BGPA: Tensor,
    v_BGPA: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    sinks_H: Tensor | None = None,
    bias_HSP: Tensor | None = None,
    valid_BP: Tensor | None = None,
    choose: Choose | None = None,
    bidirectional: bool = False,
) -> Tensor:
    """`reference_attention.attend`: no mask where it is not needed, and never one over all P keys.

    Causal queries go in blocks, each with the keys that its window reaches. Chosen keys are marked
    block by block too, by `choose`.
    """
    if bidirectional:
        mask = _padded(bias_HSP, valid_BP, q_BHSA)
        return _fused(q_BHSA, k_BGPA, v_BGPA, scale, mask)
    length, span = q_BHSA.shape[2], k_BGPA.shape[2]
    reach = span if window is None else window
    marked = valid_BP is not None or choose is not None
    plain = sinks_H is None and bias_HSP is None and not marked
    if plain and length == span <= reach:
        return causal(q_BHSA, k_BGPA, v_BGPA, scale)
    if length == 1 and span <= reach and not marked:
        return _one_query(q_BHSA, k_BGPA, v_BGPA, scale, sinks_H, bias_HSP)
    parts = []
    for start in range(0, length, ROWS):
        rows = slice(start, min(start + ROWS, length))
        # Positions of the block's queries, and of the keys they see, among the P.
        own = range(span - length + rows.start, span - length + rows.stop)
        keys = slice(max(0, own.start - reach + 1), own.stop)
        seen = visible(own, range(keys.start, keys.stop), reach, valid_BP, q_BHSA.device)
        if choose is not None:
            seen = choose(own, range(keys.start, keys.stop), seen)
        bias_HQP = None if bias_HSP is None else bias_HSP[:, rows, keys]
        block = (q_BHSA[:, :, rows], k_BGPA[:, :, keys], v_BGPA[:, :, keys], scale)
        parts.append(_masked(*block, seen, sinks_H, bias_HQP))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _padded(bias_HSP: Tensor | None, valid_BP: Tensor | None, q_BHSA: Tensor) -> Tensor | None:
    """The bias with padding masked; all keys of a text of padding alone weigh the same."""
    if valid_BP is None:
        return bias_HSP
    added = q_BHSA.new_zeros(()) if bias_HSP is None else bias_HSP.to(q_BHSA.dtype)
    return added.masked_fill(~valid_BP[:, None, None], torch.finfo(added.dtype).min)


def visible(
    own: range, keys: range, reach: int, valid_BP: Tensor | None, device: torch.device
) -> Tensor:
    """Which keys each query sees: bool, [Q, P] or, with padding, [B, 1, Q, P].

    Args:
        own: places of the queries among the keys.
        keys: places of the keys.
        reach: keys that a query sees, its own included.
        valid_BP: see `attend`.
        device: of the result.
    """
    own_Q = torch.arange(own.start, own.stop, device=device)
    distance_QP = own_Q[:, None] - torch.arange(keys.start, keys.stop, device=device)
    seen_QP = (distance_QP >= 0) & (distance_QP < reach)
    if valid_BP is None:
        return seen_QP
    # A padding query still sees itself: a row without any key would be NaN.
    keys_B1P = valid_BP[:, None, keys.start : keys.stop]
    if valid_BP.dtype != torch.bool:  # documents
        keys_B1P = keys_B1P == valid_BP[:, own.start : own.stop, None]
    return ((seen_QP & keys_B1P) | (distance_QP == 0))[:, None]


def _one_query(
    q_BH1A: Tensor,
    k_BGPA: Tensor,
    v_BGPA: Tensor,
    scale: float | None,
    sinks_H: Tensor | None,
    bias_H1P: Tensor | None,
) -> Tensor:
    """One query that sees every key: the heads that share keys become rows of one product."""
    batch, heads, _, width = q_BH1A.shape
    groups = k_BGPA.shape[1]
    mask = None if bias_H1P is None else bias_H1P.reshape(groups, heads // groups, -1)
    q_BGNA = q_BH1A.reshape(batch, groups, heads // groups, width)
    if sinks_H is None:
        y_BGNA = _fused(q_BGNA, k_BGPA, v_BGPA, scale, mask)
    else:
        sinks_GN = sinks_H.view(groups, heads // groups)
        y_BGNA = _with_sinks(q_BGNA, k_BGPA, v_BGPA, scale, mask, sinks_GN)
    return y_BGNA.reshape(batch, heads, 1, -1)


def _masked(
    q_BHQA: Tensor,
    k_BGPA: Tensor,
    v_BGPA: Tensor,
    scale: float | None,
    seen: Tensor,
    sinks_H: Tensor | None,
    bias_HQP: Tensor | None,
) -> Tensor:
    """One block: of the keys given, each query sees those marked."""
    if sinks_H is None and bias_HQP is None:
        return _fused(q_BHQA, k_BGPA, v_BGPA, scale, seen)
    added = q_BHQA.new_zeros(()) if bias_HQP is None else bias_HQP
    added = added.masked_fill(~seen, -math.inf)
    if sinks_H is None:
        return _fused(q_BHQA, k_BGPA, v_BGPA, scale, added)
    return _with_sinks(q_BHQA, k_BGPA, v_BGPA, scale, added, sinks_H[:, None])


def _fused(
    q_BHSA: Tensor,
    k_BGPA: Tensor,
    v_BGPA: Tensor,
    scale: float | None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Attention by torch; its fused kernels want one width of keys and values, so one is padded."""
    key_width, value_width = k_BGPA.shape[3], v_BGPA.shape[3]
    if key_width != value_width:
        scale = key_width**-0.5 if scale is None else scale
        width = max(key_width, value_width)
        q_BHSA, k_BGPA = (F.pad(x, (0, width - key_width)) for x in (q_BHSA, k_BGPA))
        v_BGPA = F.pad(v_BGPA, (0, width - value_width))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q_BHSA.dtype)
    # torch's flash kernel takes masks of four dimensions; for one row of 16 bits it is slower.
    if mask is not None and mask.dim() == 3 and (q_BHSA.shape[2] > 1 or mask.dtype.itemsize > 2):
        mask = mask[None]
    grouped = q_BHSA.shape[1] != k_BGPA.shape[1]
    # The fused kernels have neither forward derivatives nor a rule for vmap.
    with sdpa_kernel(SDPBackend.MATH) if transformed() else nullcontext():
        y_BHSA = F.scaled_dot_product_attention(
            q_BHSA, k_BGPA, v_BGPA, mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    return y_BHSA[..., :value_width]


def _with_sinks(
    q_BHSA: Tensor,
    k_BGPA: Tensor,
    v_BGPA: Tensor,
    scale: float | None,
    added: Tensor | None,
    sinks: Tensor,
) -> Tensor:
    """Attention whose softmax has one more score; sinks as [H, 1], or one for each row [H, S].

    Without gradients on CPU, torch's kernel gives the sum of the exponentials as well, and the
    sink's share is taken off the result; else by plain products, softmax in at least fp32.
    """
    batch, heads, length, width = q_BHSA.shape
    groups, span = k_BGPA.shape[1:3]
    on_cpu = q_BHSA.device.type == "cpu" and width == v_BGPA.shape[3]
    if on_cpu and not torch.is_grad_enabled():
        mask = None if added is None else added.to(q_BHSA.dtype)
        mask = mask[None] if mask is not None and mask.dim() == 3 else mask
        y_BHSA, total_BHS = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHSA, k_BGPA, v_BGPA, attn_mask=mask, scale=scale
        )
        share_BHS1 = (total_BHS - sinks).sigmoid().to(q_BHSA.dtype)[..., None]
        return torch.mul(y_BHSA, share_BHS1)
    factor = width**-0.5 if scale is None else scale
    # Query heads that share keys lie behind each other, so no key is copied.
    q_BGNA = (q_BHSA * factor).reshape(batch, groups, -1, width)
    scores_BGNP = torch.matmul(q_BGNA, k_BGPA.transpose(2, 3))
    scores_BHSP = scores_BGNP.view(batch, heads, length, span)
    scores_BHSP = scores_BHSP.to(torch.promote_types(scores_BHSP.dtype, torch.float32))
    if added is not None:
        scores_BHSP = scores_BHSP + added
    total_BHS1 = scores_BHSP.logsumexp(-1, keepdim=True)
    total_BHS1 = torch.logaddexp(total_BHS1, sinks.to(total_BHS1.dtype)[..., None])
    weights_BHSP = (scores_BHSP - total_BHS1).exp().to(v_BGPA.dtype)
    y_BGNA = torch.matmul(weights_BHSP.view(batch, groups, -1, span), v_BGPA)
    return y_BGNA.view(batch, heads, length, -1)
