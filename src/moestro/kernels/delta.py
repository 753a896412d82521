"""The gated delta rule in chunks: matrix products inside of them, a state from one to the next.

The definition is `reference_delta.gated_delta`. Letters: B batch, S tokens, N chunks of T tokens,
J the chunk's tokens up to one of T, H value heads, G heads of queries and keys, A width of a key,
O width of a value.
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
    q_BHNTA, k_BHNTA, v_BHNTO, logs_BHNT1, beta_BHNT1 = (
        _chunks(x.to(dtype), size)
        for x in (q_BSHA, k_BSHA, v_BSHO, log_decay_BSH[..., None], beta_BSH[..., None])
    )
    sums_BHNT1 = logs_BHNT1.cumsum(3)
    decays_BHNTJ = _decays(sums_BHNT1)
    since_BHNT1 = sums_BHNT1.exp()
    keys_BHNAT = k_BHNTA.transpose(3, 4)
    system_BHNTJ = beta_BHNT1 * (k_BHNTA @ keys_BHNAT) * decays_BHNTJ
    right_BHNTR = beta_BHNT1 * torch.cat([since_BHNT1 * k_BHNTA, v_BHNTO], dim=-1)
    # Only what is below the diagonal is read of the system; on it stand ones.
    solved_BHNTR = torch.linalg.solve_triangular(
        system_BHNTJ, right_BHNTR, upper=False, unitriangular=True
    )
    from_state_BHNTA, own_BHNTO = solved_BHNTR.split_with_sizes([width, v_BHNTO.shape[-1]], dim=-1)
    scores_BHNTJ = (q_BHNTA @ keys_BHNAT) * decays_BHNTJ
    asked_BHNTA = since_BHNT1 * q_BHNTA
    # Of each token's change, what is left at the end of the chunk.
    left_BHNAT = keys_BHNAT * decays_BHNTJ[..., -1:, :]
    kept_BHN11 = since_BHNT1[..., -1:, :]
    if state_BHAO is None:
        state_BHAO = v_BHNTO.new_zeros(*v_BHNTO.shape[:2], width, v_BHNTO.shape[-1])
    parts = []
    for n in range(v_BHNTO.shape[2]):
        change_BHTO = own_BHNTO[:, :, n] - from_state_BHNTA[:, :, n] @ state_BHAO
        parts.append(asked_BHNTA[:, :, n] @ state_BHAO + scores_BHNTJ[:, :, n] @ change_BHTO)
        state_BHAO = kept_BHN11[:, :, n] * state_BHAO + left_BHNAT[:, :, n] @ change_BHTO
    y_BHSO = torch.cat(parts, dim=2)[:, :, :length]
    return y_BHSO.transpose(1, 2), state_BHAO


def _chunks(x_BSHI: Tensor, size: int) -> Tensor:
    """[B, S, H, I] → [B, H, N, T, I]; tokens of zeros, which change no state, fill the last."""
    x_BHSI = x_BSHI.transpose(1, 2)
    missing = -x_BHSI.shape[2] % size
    if missing:
        x_BHSI = F.pad(x_BHSI, (0, 0, 0, missing))
    x_BHNTI: Tensor = torch.unflatten(x_BHSI, 2, (-1, size))
    return x_BHNTI


def _decays(sums_BHNT1: Tensor) -> Tensor:
    """What token t still holds of token j's change: e^(c_t − c_j) for j ≤ t, else 0."""
    size = sums_BHNT1.shape[3]
    future_TJ = torch.ones(size, size, dtype=torch.bool, device=sums_BHNT1.device).triu(1)
    # Masked before the exponential, which overflows for tokens to come.
    logs_BHNTJ = sums_BHNT1 - sums_BHNT1.transpose(3, 4)
    decays_BHNTJ: Tensor = logs_BHNTJ.masked_fill(future_TJ, -math.inf).exp()
    return decays_BHNTJ
