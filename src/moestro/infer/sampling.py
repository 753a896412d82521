"""Choosing the next token: temperature, top-k, top-p, and one random draw per token.

The order is: divide by the temperature, softmax, keep the top_k likeliest, keep the smallest
likeliest set whose share of what is left reaches top_p, renormalise, draw. Between equal
probabilities the lower token id counts as likelier. All of it runs on the CPU in float64, so that
a seed gives the same tokens on every device for the same logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Generator, Tensor

from moestro.errors import MoestroError, ShapeError
from moestro.settings import Settings


class SamplingConfig(Settings):
    """How to choose tokens, and when to stop."""

    temperature: Annotated[float, Field(ge=0.0)] = Field(
        0.8, description="0 takes the likeliest token every time; 1 follows the model's own odds."
    )
    top_k: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Only the K likeliest tokens; unset: all."
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="Only the likeliest tokens that together reach this probability."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    max_tokens: Annotated[int, Field(ge=1)] = 256
    stop: tuple[str, ...] = Field((), description="Strings that end the text; never part of it.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if "" in self.stop:
            raise ValueError("stop holds an empty string, which every text contains; leave it out")
        return self


def new_generator(sampling: SamplingConfig) -> Generator:
    """The source of randomness of one request, on the CPU, at the start of its seed."""
    return torch.Generator().manual_seed(sampling.seed)


def probabilities(logits_BV: Tensor, sampling: SamplingConfig) -> Tensor:
    """The distribution that `next_tokens` draws from.

    Args:
        logits_BV: any float dtype, any device; -inf masks a token.
        sampling: temperature, top_k and top_p are used.

    Returns:
        float64 [B, V] on the CPU: rows sum to 1, 0 for every token that is not kept.

    Raises:
        ShapeError: the logits are not [B, V] floats.
        MoestroError: a row holds NaN or +inf, or every token of it is masked.
    """
    logits_BV = _checked(logits_BV)
    if sampling.temperature == 0.0:
        return torch.nn.functional.one_hot(logits_BV.argmax(-1), logits_BV.shape[1]).double()
    # The maximum goes first: a tiny temperature would otherwise overflow.
    shifted_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
    p_BV = torch.softmax(shifted_BV / sampling.temperature, -1)
    if sampling.top_k is None and sampling.top_p == 1.0:
        return p_BV
    # Sorted by logit, where what the softmax rounds to equal still has its order.
    order_BV = logits_BV.argsort(dim=-1, descending=True, stable=True)
    p_BV = p_BV.gather(-1, order_BV)
    if sampling.top_k is not None:
        p_BV[:, sampling.top_k :] = 0.0
    if sampling.top_p < 1.0:
        share_BV = p_BV / p_BV.sum(-1, keepdim=True)
        reached_BV = share_BV.cumsum(-1) >= sampling.top_p
        p_BV[:, 1:][reached_BV[:, :-1]] = 0.0
    p_BV = p_BV / p_BV.sum(-1, keepdim=True)
    return torch.zeros_like(p_BV).scatter(-1, order_BV, p_BV)


def next_tokens(
    logits_BV: Tensor, sampling: SamplingConfig, generators: Sequence[Generator]
) -> Tensor:
    """Choose one token for each row.

    Each row takes exactly one number from its own generator (none at temperature 0), so a
    request's tokens do not depend on what else is in the batch.

    Args:
        logits_BV: any float dtype, any device; -inf masks a token.
        sampling: how to choose.
        generators: one per row, from `new_generator`.

    Returns:
        int64 [B] on the CPU.

    Raises:
        ShapeError: the logits are not [B, V] floats, or the generators are not B.
        MoestroError: a row holds NaN or +inf, or every token of it is masked.
    """
    if logits_BV.ndim and len(generators) != logits_BV.shape[0]:
        raise ShapeError(
            f"{logits_BV.shape[0]} rows of logits need one generator each, "
            f"but {len(generators)} were given"
        )
    if sampling.temperature == 0.0:
        return _checked(logits_BV).argmax(-1)
    p_BV = probabilities(logits_BV, sampling)
    draws = [torch.rand(1, generator=each, dtype=torch.float64) for each in generators]
    draw_B1 = torch.stack(draws) if draws else p_BV.new_zeros(0, 1)
    ends_BV = p_BV.cumsum(-1)
    # Rounding can lift a draw to the very end, past the last token that is kept.
    total_B1 = ends_BV[:, -1:]
    draw_B1 = torch.minimum(draw_B1 * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    return torch.searchsorted(ends_BV, draw_B1, right=True).squeeze(-1)


def _checked(logits_BV: Tensor) -> Tensor:
    """The logits in float64 on the CPU, once they are known to allow a choice."""
    if logits_BV.ndim != 2 or not logits_BV.is_floating_point() or logits_BV.shape[1] == 0:
        raise ShapeError(
            f"logits are {list(logits_BV.shape)} {logits_BV.dtype}; "
            "give floats of shape [batch, vocabulary]"
        )
    logits_BV = logits_BV.detach().to("cpu", torch.float64)
    usable_B = logits_BV.amax(-1).isfinite()  # NaN and +inf rise to the maximum
    if not usable_B.all():
        row = int((~usable_B).nonzero()[0])
        raise MoestroError(
            f"no token can be chosen: row {row} of the logits holds NaN or +inf, or masks every "
            "token; check the model's weights and the mask"
        )
    return logits_BV
