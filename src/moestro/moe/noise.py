"""Random numbers that are a function of keys, so that a token gets its own wherever it is computed.

A generator's numbers depend on what was drawn before them, and so on how a batch is cut over ranks
and micro-batches. Here each sequence has a key, from which those of its tokens follow, and of
these the numbers of each layer and use: SplitMix64 (Steele, Lea and Flood 2014), a hash in place
of a state.

Letters: B batch, S sequence, N keys, W numbers of each, T tokens, R rows, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moestro.kernels import reference
from moestro.kernels.reference import Activation
from moestro.moe.routing import Plan

# What a layer's numbers are for.
JITTER, ROUTER, DROPOUT = 1, 2, 3

_STEP = 0x9E3779B97F4A7C15 - 2**64  # int64 wraps around as uint64 does
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
_BITS = 24  # of a uniform number: what fp32 holds


def mixed(keys: Tensor, number: int | Tensor) -> Tensor:
    """Keys that follow of keys and a number, both int64 and broadcast."""
    step = (number + 1) * _STEP
    if isinstance(step, int):
        step = (step + 2**63) % 2**64 - 2**63
    x = keys + step
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def of_rows(seed: int, rows_B: Tensor) -> Tensor:
    """Keys of sequences by their place in all that a run reads. int64 [B] → [B]."""
    return mixed(torch.full_like(rows_B, seed), rows_B)


def of_tokens(keys_B: Tensor, length: int) -> Tensor:
    """Keys of the tokens of sequences. int64 [B] → [B, S]."""
    return mixed(keys_B[:, None], torch.arange(length, device=keys_B.device))


def uniform(keys_N: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[N, W] numbers of at least 0 and below 1."""
    hashed_NW = mixed(keys_N[:, None], torch.arange(width, device=keys_N.device))
    return _shifted(hashed_NW, 64 - _BITS).to(dtype) * 2.0**-_BITS


def normal(keys_N: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[N, W] numbers of N(0, 1), by Box and Muller (1958)."""
    first_NW, second_NW = uniform(keys_N, 2 * width, dtype).chunk(2, dim=1)
    return torch.sqrt(-2 * torch.log1p(-first_NW)) * torch.cos(2 * torch.pi * second_NW)


class Drop(NamedTuple):
    """Dropout of experts' hidden units.

    Attributes:
        chance: of a unit.
        keys_T: int64, of the tokens.
        first: the number of expert 0 among those of all ranks.
    """

    chance: float
    keys_T: Tensor
    first: int = 0

    def after(self, activation: Activation, plan: Plan) -> Callable[[Tensor], Tensor]:
        """The activation of the plan's rows with the dropout after it."""
        places_R = torch.arange(len(plan.tokens_R), device=plan.tokens_R.device)
        experts_R = torch.searchsorted(plan.offsets_E, places_R, right=True)
        if plan.experts_E is not None:
            experts_R = plan.experts_E[experts_R.clamp(max=len(plan.experts_E) - 1)]
        keys_R = mixed(mixed(self.keys_T[plan.tokens_R], DROPOUT), experts_R + self.first)

        def activate(hidden_RH: Tensor) -> Tensor:
            act_RF = reference.activate(hidden_RH, activation)
            kept_RF = uniform(keys_R, act_RF.shape[1], torch.float32) >= self.chance
            return act_RF * kept_RF / (1 - self.chance)

        return activate


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros from the left."""
    shifted: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return shifted
