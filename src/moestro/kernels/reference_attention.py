"""The definition of attention, one query at a time; every fast path is tested against it.

Letters: B batch, S queries, P keys, H heads, G key/value heads, A width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    chosen_BSP: Tensor | None = None,
    bidirectional: bool = False,
) -> Tensor:
    """Causal attention of S queries that stand at the last S of P positions, or to all P.

    For each query: softmax(scale · q · k + bias) over the keys it sees, times their values. A sink
    is one more score in the softmax, without a value (gpt-oss; Xiao et al. 2023).

    Args:
        q_BHSA: queries.
        k_BGPA: keys; each of the G heads serves H / G query heads in a row.
        v_BGPA: values, of any width.
        scale: of the scores; None: 1 / sqrt(A).
        window: keys that a query sees, its own included; None: all up to its own.
        sinks_H: score of each head's sink.
        bias_HSP: added to the scores.
        valid_BP: bool, False for keys that only their own query sees; or int64, the document of
            each key, where P = S: a query sees the keys of its own.
        chosen_BSP: bool, the keys that each query may see of these; at least one of them.
        bidirectional: every query sees every valid key, and all alike where none is valid; P is
            any length. Without window, sinks and chosen keys.

    Returns:
        [B, H, S, width of a value].
    """
    batch, heads, length, width = q_BHSA.shape
    groups, span = k_BGPA.shape[1:3]
    factor = width**-0.5 if scale is None else scale
    y_BHSA = q_BHSA.new_zeros(batch, heads, length, v_BGPA.shape[3])
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            for s in range(length):
                own = span - length + s
                valid_P = None if valid_BP is None else valid_BP[b]
                keys = _seen(own, span, window, valid_P, bidirectional)
                if chosen_BSP is not None:
                    keys = [p for p in keys if chosen_BSP[b, s, p]]
                if not keys:
                    y_BHSA[b, h, s] = v_BGPA[b, g].mean(0)
                    continue
                scores_P = k_BGPA[b, g, keys] @ q_BHSA[b, h, s] * factor
                if bias_HSP is not None:
                    scores_P = scores_P + bias_HSP[h, s, keys]
                if sinks_H is not None:
                    scores_P = torch.cat([scores_P, sinks_H[h : h + 1]])
                weights_P = scores_P.softmax(0)[: len(keys)]
                y_BHSA[b, h, s] = weights_P @ v_BGPA[b, g, keys]
    return y_BHSA


def _seen(
    own: int, span: int, window: int | None, marks_P: Tensor | None, bidirectional: bool
) -> list[int]:
    """Places of the keys that the query at place `own` sees, by the marks of its text."""
    valid_P = [True] * span if marks_P is None else marks_P.tolist()
    if marks_P is not None and marks_P.dtype != torch.bool:
        valid_P = [document == valid_P[own] for document in valid_P]
    if bidirectional:
        return [p for p in range(span) if valid_P[p]]
    first = 0 if window is None else max(0, own - window + 1)
    return [p for p in range(first, own + 1) if p == own or valid_P[p]]
