"""Causal attention for short sequences in 16 bits on CPU, where torch's flash kernel is slow.

The definition is `torch.nn.functional.scaled_dot_product_attention(..., is_causal=True)`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Longest sequence for which keeping the probabilities, S²/2 for each head, is worth its memory.
LONGEST = 512
# Queries of one block; it sees only the keys up to its end, so nearly half of the square is saved.
BLOCK = 128


class _ShortCausal(torch.autograd.Function):
    """Batched products and a softmax, block by block; keeps the probabilities."""

    @staticmethod
    def forward(ctx: Any, q_NSA: Tensor, k_NSA: Tensor, v_NSA: Tensor) -> Tensor:
        length = q_NSA.shape[1]
        ctx.scale = q_NSA.shape[2] ** -0.5
        q_NSA = q_NSA * ctx.scale
        y_NSA = torch.empty_like(q_NSA)
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
    def backward(ctx: Any, grad_NSA: Tensor) -> tuple[Tensor, ...]:
        q_NSA, k_NSA, v_NSA, *probs = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q_NSA, k_NSA, v_NSA))
        for number, probs_NQP in enumerate(probs):
            rows = slice(number * BLOCK, number * BLOCK + probs_NQP.shape[1])
            seen = slice(0, rows.stop)
            grad_NQA = grad_NSA[:, rows]
            grad_v[:, seen] += torch.bmm(probs_NQP.transpose(1, 2), grad_NQA)
            grad_NQP = torch.bmm(grad_NQA, v_NSA[:, seen].transpose(1, 2))
            grad_NQP = torch.ops.aten._softmax_backward_data(
                grad_NQP, probs_NQP, -1, probs_NQP.dtype
            )
            grad_q[:, rows] = torch.bmm(grad_NQP, k_NSA[:, seen])
            grad_k[:, seen] += torch.bmm(grad_NQP.transpose(1, 2), q_NSA[:, rows])
        return grad_q.mul_(ctx.scale), grad_k, grad_v


def short_causal(q_BHSA: Tensor, k_BGSA: Tensor, v_BGSA: Tensor) -> Tensor:
    """Causal attention by plain batched products.

    Args:
        q_BHSA: queries of H heads.
        k_BGSA: keys of G heads, each serving H / G query heads.
        v_BGSA: values.

    Returns:
        [B, H, S, A].
    """
    heads = q_BHSA.shape[1]
    k_BHSA, v_BHSA = (
        x.repeat_interleave(heads // x.shape[1], dim=1) if x.shape[1] != heads else x
        for x in (k_BGSA, v_BGSA)
    )
    y_NSA: Tensor = _ShortCausal.apply(*(x.flatten(0, 1) for x in (q_BHSA, k_BHSA, v_BHSA)))
    return y_NSA.view(q_BHSA.shape)


def causal(q_BHSA: Tensor, k_BGSA: Tensor, v_BGSA: Tensor) -> Tensor:
    """Causal attention by whatever is fastest here; see `short_causal` for shapes.

    On CPU, torch's flash kernel takes twice the time of plain products in 16 bits when it trains
    on short sequences; everywhere else it is the better one.
    """
    training = torch.is_grad_enabled() and q_BHSA.requires_grad
    sixteen_bits = q_BHSA.dtype in (torch.bfloat16, torch.float16)
    if training and sixteen_bits and q_BHSA.device.type == "cpu" and q_BHSA.shape[2] <= LONGEST:
        return short_causal(q_BHSA, k_BGSA, v_BGSA)
    grouped = q_BHSA.shape[1] != k_BGSA.shape[1]
    return F.scaled_dot_product_attention(
        q_BHSA, k_BGSA, v_BGSA, is_causal=True, enable_gqa=grouped
    )
