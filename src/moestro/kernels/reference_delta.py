"""The definition of the gated delta rule, one token at a time; `delta.gated_delta` is tested by it.

Letters: B batch, S tokens, H value heads, G heads of queries and keys, A width of a key, O width of
a value.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gated_delta(
    q_BSGA: Tensor,
    k_BSGA: Tensor,
    v_BSHO: Tensor,
    log_decay_BSH: Tensor,
    beta_BSH: Tensor,
    state_BHAO: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A state that decays, in which each token replaces what is held for its key.

    Gated Delta Networks (Yang, Kautz and Hatamizadeh 2024), eq. 10, with S transposed:
    S_t = (I − β_t k_t k_tᵀ) α_t S_{t−1} + β_t k_t v_tᵀ, and the output is S_tᵀ q_t.

    Args:
        q_BSGA: queries; each of the G heads serves H / G value heads in a row.
        k_BSGA: keys, of length 1.
        v_BSHO: values.
        log_decay_BSH: ln α, at most 0.
        beta_BSH: β, from 0 (the token writes nothing) to 1 (it replaces all that its key finds).
        state_BHAO: S before the first token; None: zeros.

    Returns:
        (outputs [B, S, H, O], S after the last token), in the dtype of what was given, and at least
        fp32.
    """
    dtype = torch.promote_types(v_BSHO.dtype, torch.float32)
    heads, groups = v_BSHO.shape[2], q_BSGA.shape[2]
    q_BSHA, k_BSHA = (
        x.to(dtype).repeat_interleave(heads // groups, dim=2) for x in (q_BSGA, k_BSGA)
    )
    v_BSHO, beta_BSH1 = v_BSHO.to(dtype), beta_BSH.to(dtype)[..., None]
    decay_BSH11 = log_decay_BSH.to(dtype).exp()[..., None, None]
    if state_BHAO is None:
        state_BHAO = v_BSHO.new_zeros(len(v_BSHO), heads, q_BSHA.shape[-1], v_BSHO.shape[-1])
    outputs = []
    for s in range(v_BSHO.shape[1]):
        k_BHA = k_BSHA[:, s]
        state_BHAO = decay_BSH11[:, s] * state_BHAO
        held_BHO = torch.einsum("bhao,bha->bho", state_BHAO, k_BHA)
        change_BHO = beta_BSH1[:, s] * (v_BSHO[:, s] - held_BHO)
        state_BHAO = state_BHAO + k_BHA[..., :, None] * change_BHO[..., None, :]
        outputs.append(torch.einsum("bhao,bha->bho", state_BHAO, q_BSHA[:, s]))
    y_BSHO = torch.stack(outputs, dim=1) if outputs else torch.empty_like(v_BSHO)
    return y_BSHO, state_BHAO
