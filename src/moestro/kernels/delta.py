"""The gated delta rule in chunks: matrix products inside of them, a state from one to the next.

The definition is `reference_delta.gated_delta`. Letters: B batch, S tokens, N chunks of Q tokens,
P the same as seen by those after them, H value heads, G heads of queries and keys, M value heads
that share one of these (1 in what they share), A width of a key, O width of a value, I = A + O.
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
    length, groups, width = q_BSGA.shape[1:]
    if length < 2:
        return reference_delta.gated_delta(
            q_BSGA, k_BSGA, v_BSHO, log_decay_BSH, beta_BSH, state_BHAO
        )
    dtype, size = torch.promote_types(v_BSHO.dtype, torch.float32), min(CHUNK, length)
    q_BGMNQA, k_BGMNQA, v_BGMNQO, logs_BGMNQ1, beta_BGMNQ1 = (
        _chunks(x.to(dtype), groups, size)
        for x in (q_BSGA, k_BSGA, v_BSHO, log_decay_BSH[..., None], beta_BSH[..., None])
    )
    sums_BGMNQ1 = logs_BGMNQ1.cumsum(-2)
    decays_BGMNQP = _decays(sums_BGMNQ1)
    since_BGMNQ1 = sums_BGMNQ1.exp()
    keys_BGMNAP = k_BGMNQA.mT
    system_BGMNQP = beta_BGMNQ1 * ((k_BGMNQA @ keys_BGMNAP) * decays_BGMNQP)
    right_BGMNQI = beta_BGMNQ1 * torch.cat([since_BGMNQ1 * k_BGMNQA, v_BGMNQO], dim=-1)
    # Only what is below the diagonal is read of the system; on it stand ones.
    solved_BGMNQI = torch.linalg.solve_triangular(
        system_BGMNQP, right_BGMNQI, upper=False, unitriangular=True
    )
    from_state_BGMNQA, own_BGMNQO = solved_BGMNQI.tensor_split([width], dim=-1)
    scores_BGMNQP = (q_BGMNQA @ keys_BGMNAP) * decays_BGMNQP
    asked_BGMNQA = since_BGMNQ1 * q_BGMNQA
    # Of each token's change, what is left at the end of the chunk.
    left_BGMNAP = keys_BGMNAP * decays_BGMNQP[..., -1:, :]
    kept_BGMN11 = since_BGMNQ1[..., -1:, :]
    if state_BHAO is None:
        state_BHAO = v_BGMNQO.new_zeros(len(v_BSHO), v_BSHO.shape[2], width, v_BSHO.shape[3])
    state_BGMAO = torch.unflatten(state_BHAO, 1, (groups, -1))
    parts = []
    for n in range(v_BGMNQO.shape[3]):
        change_BGMQO = own_BGMNQO[:, :, :, n] - from_state_BGMNQA[:, :, :, n] @ state_BGMAO
        asked_BGMQO = asked_BGMNQA[:, :, :, n] @ state_BGMAO
        parts.append(asked_BGMQO + scores_BGMNQP[:, :, :, n] @ change_BGMQO)
        state_BGMAO = kept_BGMN11[:, :, :, n] * state_BGMAO
        state_BGMAO = state_BGMAO + left_BGMNAP[:, :, :, n] @ change_BGMQO
    y_BHSO = torch.cat(parts, dim=3)[:, :, :, :length].flatten(1, 2)
    return y_BHSO.transpose(1, 2), state_BGMAO.flatten(1, 2)


def _chunks(x_BSHI: Tensor, groups: int, size: int) -> Tensor:
    """[B, S, H or G, I] → [B, G, M, N, Q, I]; zeros, which change no state, fill the last chunk."""
    x_BGMSI = torch.unflatten(x_BSHI.transpose(1, 2), 1, (groups, -1))
    missing = -x_BGMSI.shape[3] % size
    if missing:
        x_BGMSI = F.pad(x_BGMSI, (0, 0, 0, missing))
    x_BGMNQI: Tensor = torch.unflatten(x_BGMSI, 3, (-1, size))
    return x_BGMNQI


def _decays(sums_BGMNQ1: Tensor) -> Tensor:
    """What token t still holds of token j's change: e^(c_t − c_j) for j ≤ t, else 0."""
    size = sums_BGMNQ1.shape[-2]
    future_QP = torch.ones(size, size, dtype=torch.bool, device=sums_BGMNQ1.device).triu(1)
    # Masked before the exponential, which overflows for tokens to come.
    logs_BGMNQP = sums_BGMNQ1 - sums_BGMNQ1.mT
    decays_BGMNQP: Tensor = logs_BGMNQP.masked_fill(future_QP, -math.inf).exp()
    return decays_BGMNQP
