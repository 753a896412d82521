"""How far apart two tensors may be, and how far they are.

The measure is the norm of the difference over the norm of the exact tensor. A number that is stored
once is off by at most eps / 2; a sum of n products accumulated in a precision of eps' is off by
about eps' · sqrt(n). Hence one formula for every check:

    tolerance = 8 · (eps(dtype) + eps(max(dtype, fp32)) · sqrt(n)),  n = D + F + K + T
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Difference(NamedTuple):
    """Of one tensor from the exact one.

    Attributes:
        name: of the tensor.
        relative: norm of the difference over the norm of the exact one; inf for a tensor that is
            missing or not finite.
        largest: largest absolute difference of an element.
        where: its index.
        sentence: what a person is told.
    """

    name: str
    relative: float
    largest: float
    where: tuple[int, ...]
    sentence: str


def tolerance(dtype: torch.dtype, terms: int, eps: float = 0.0) -> float:
    """Largest relative difference that rounding explains; see above.

    Args:
        dtype: of what is stored.
        terms: n.
        eps: that of another form in which it is rounded on the way, where that is larger.
    """
    accumulated = torch.promote_types(dtype, torch.float32)
    return 8 * (max(eps, torch.finfo(dtype).eps) + torch.finfo(accumulated).eps * math.sqrt(terms))


def difference(name: str, got: Tensor | None, exact: Tensor, floor: float = 0.0) -> Difference:
    """How far `got` is from the exact tensor.

    Args:
        name: what is compared.
        got: of any dtype; None, which gradients can be, counts as zero.
        exact: float64.
        floor: a norm below which the exact tensor counts as zero: rounding of larger numbers that
            cancel in it is no defect.
    """
    if got is None and not exact.any():
        return Difference(name, 0.0, 0.0, (), "")
    if got is None:
        return Difference(name, math.inf, math.inf, (), f"{name} is None")
    if got.shape != exact.shape:
        words = f"{name} has shape {list(got.shape)}, not {list(exact.shape)}"
        return Difference(name, math.inf, math.inf, (), words)
    if not got.numel():
        return Difference(name, 0.0, 0.0, (), f"{name} is empty")
    apart = (got.detach().double() - exact.detach()).abs()
    if not apart.isfinite().all():
        place = tuple(int(i) for i in (~apart.isfinite()).nonzero()[0])
        return Difference(name, math.inf, math.inf, place, f"{name} is not finite at {list(place)}")
    place = tuple(int(i) for i in torch.unravel_index(apart.argmax(), apart.shape))
    largest, norm = float(apart.max()), float(exact.detach().norm())
    relative = float(apart.norm()) / max(norm, floor, 1e-300) if largest else 0.0
    words = f"{name} differs most at {list(place)}: {float(got[place]):.6g}"
    words += f", not {float(exact[place]):.6g}"
    ratio = _ratio(got.detach().double(), exact.detach(), norm)
    return Difference(name, relative, largest, place, words + ratio)


def _ratio(got: Tensor, exact: Tensor, norm: float) -> str:
    """Where everything is off by one factor, which."""
    if not norm:
        return ""
    factor = float((got * exact).sum() / norm**2)
    if abs(factor - 1) < 1e-3 or float((got - factor * exact).norm()) > 1e-3 * norm:
        return ""
    return " (all of it is zero)" if abs(factor) < 1e-6 else f" (all of it is {factor:.4g} times)"
