"""Rows of numbers as bytes with a scale each: what a cache of int8 keeps."""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 127


def to_whole(x_RA: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to integers in [-127, 127] times one scale.

    The definition of what native steps write, bit by bit: x · (127 / max) in fp32, to the nearest
    with ties to even. A row whose largest size is below 1e-30 becomes zero; the scale of one that
    is not finite is NaN.

    Args:
        x_RA: floating-point [..., A].

    Returns:
        (int8 [..., A], fp32 scales [..., 1]).
    """
    rows = x_RA.detach().float()
    most = rows.abs().amax(-1, keepdim=True)
    finite, some = most.isfinite(), most > 1e-30
    inverse = torch.where(finite & some, MOST / most, torch.zeros_like(most))
    whole = torch.where(finite, rows * inverse, torch.zeros_like(rows)).round().to(torch.int8)
    return whole, torch.where(finite, most / MOST, torch.full_like(most, torch.nan))


def from_whole(whole_RA: Tensor, scale_R1: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that they stand for."""
    return (whole_RA.float() * scale_R1).to(dtype)
