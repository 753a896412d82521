"""The gated delta rule in chunks: matrix products inside of them, a state from one to the next.

The definition is `reference_delta.gated_delta`. Letters: B batch, S tokens, N chunks of Q tokens,
P the same as seen by those after them, H value heads, G heads of queries and keys, A width of a
key, O width of a value, I = A + O.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.kernels import reference_delta

# Tokens of one chunk: their products take a square of it, and chunks run one after the other.
CHUNK = 64


def gated_delta(
    q_BSGA: Tensor,
    k_BSGA: Tensor,
    v_BSHO: Tensor,
    log_decay_BSH: Tensor,
    beta_BSH: Tensor,
    state_BHAO: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference_delta.gated_delta`.

    Inside a chunk that begins with the state S, let c_t be the sum of ln α up to token t. Then
    S_t = e^{c_t} S + Σ_{j ≤ t} e^{c_t − c_j} k_j u_jᵀ, where the changes u solve the triangular
    system u_t + β_t Σ_{j < t} e^{c_t − c_j} (k_t · k_j) u_j = β_t (v_t − e^{c_t} Sᵀ k_t). Its
    solution for v and for e^c k needs no state, so all chunks are solved at once.
    """
    length, width = v_BSHO.shape[1], q_BSGA.shape[-1]
    if length < 2:
        return reference_delta.gated_delta(
            q_BSGA, k_BSGA, v_BSHO, log_decay_BSH, beta_BSH, state_BHAO
        )
    dtype = torch.promote_types(v_BSHO.dtype, torch.float32)
    heads, groups = v_BSHO.shape[2], q_BSGA.shape[2]
    q_BSHA, k_BSHA = (
        x.repeat_interleave(heads // groups, dim=2) if heads != groups else x
        for x in (q_BSGA.to(dtype), k_BSGA.to(dtype))
    )
    size = min(CHUNK, length)
    q_BHNQA, k_BHNQA, v_BHNQO, logs_BHNQ1, beta_BHNQ1 = (
        _chunks(x.to(dtype), size)
        for x in (q_BSHA, k_BSHA, v_BSHO, log_decay_BSH[..., None], beta_BSH[..., None])
    )
    sums_BHNQ1 = logs_BHNQ1.cumsum(3)
    decays_BHNQP = _decays(sums_BHNQ1)
    since_BHNQ1 = sums_BHNQ1.exp()
    keys_BHNAP = k_BHNQA.transpose(3, 4)
    system_BHNQP = beta_BHNQ1 * (k_BHNQA @ keys_BHNAP) * decays_BHNQP
    right_BHNQI = beta_BHNQ1 * torch.cat([since_BHNQ1 * k_BHNQA, v_BHNQO], dim=-1)
    # Only what is below the diagonal is read of the system; on it stand ones.
    solved_BHNQI = torch.linalg.solve_triangular(
        system_BHNQP, right_BHNQI, upper=False, unitriangular=True
    )
    from_state_BHNQA, own_BHNQO = solved_BHNQI.split_with_sizes([width, v_BHNQO.shape[-1]], dim=-1)
    scores_BHNQP = (q_BHNQA @ keys_BHNAP) * decays_BHNQP
    asked_BHNQA = since_BHNQ1 * q_BHNQA
    # Of each token's change, what is left at the end of the chunk.
    left_BHNAP = keys_BHNAP * decays_BHNQP[..., -1:, :]
    kept_BHN11 = since_BHNQ1[..., -1:, :]
    if state_BHAO is None:
        state_BHAO = v_BHNQO.new_zeros(*v_BHNQO.shape[:2], width, v_BHNQO.shape[-1])
    parts = []
    for n in range(v_BHNQO.shape[2]):
        change_BHQO = own_BHNQO[:, :, n] - from_state_BHNQA[:, :, n] @ state_BHAO
        parts.append(asked_BHNQA[:, :, n] @ state_BHAO + scores_BHNQP[:, :, n] @ change_BHQO)
        state_BHAO = kept_BHN11[:, :, n] * state_BHAO + left_BHNAP[:, :, n] @ change_BHQO
    y_BHSO = torch.cat(parts, dim=2)[:, :, :length]
    return y_BHSO.transpose(1, 2), state_BHAO


def _chunks(x_BSHI: Tensor, size: int) -> Tensor:
    """[B, S, H, I] → [B, H, N, Q, I]; tokens of zeros, which change no state, fill the last."""
    x_BHSI = x_BSHI.transpose(1, 2)
    missing = -x_BHSI.shape[2] % size
    if missing:
        x_BHSI = F.pad(x_BHSI, (0, 0, 0, missing))
    x_BHNQI: Tensor = torch.unflatten(x_BHSI, 2, (-1, size))
    return x_BHNQI


def _decays(sums_BHNQ1: Tensor) -> Tensor:
    """What token t still holds of token j's change: e^(c_t − c_j) for j ≤ t, else 0."""
    size = sums_BHNQ1.shape[3]
    future_QP = torch.ones(size, size, dtype=torch.bool, device=sums_BHNQ1.device).triu(1)
    # Masked before the exponential, which overflows for tokens to come.
    logs_BHNQP = sums_BHNQ1 - sums_BHNQ1.transpose(3, 4)
    decays_BHNQP: Tensor = logs_BHNQP.masked_fill(future_QP, -math.inf).exp()
    return decays_BHNQP
