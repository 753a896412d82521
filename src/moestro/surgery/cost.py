"""What a change costs: held-out bits per byte, by domain, beside the whole model's.

Letters: C changes, N windows, M domains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from moestro.checkpoints.transfer import Progress
from moestro.data.domains import ALL, check_domains
from moestro.data.windows import HeldOut
from moestro.surgery.layers import Change, Layers

WHOLE = "whole"


class Cost(NamedTuple):
    """The loss of one model on held-out text.

    Attributes:
        bits: bits per byte by domain, `all` first.
        change: of `all` over the whole model, in bits per byte.
        error: standard error of `change`, from the windows' differences within each domain; NaN
            where a domain has a single window.
    """

    bits: dict[str, float]
    change: float
    error: float

    @property
    def relative(self) -> float:
        """`change` as a share of the whole model's bits."""
        return self.change / (self.bits[ALL] - self.change)


def costs(
    layers: Layers,
    held_out: Mapping[str, HeldOut],
    changes: Mapping[str, Change],
    memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Cost]:
    """The whole model's loss, named `WHOLE`, and that under each change, on the same windows.

    Args:
        layers: of the model.
        held_out: windows by domain.
        changes: by name.
        memory_bytes: see `Layers.bits`.
        progress: see `Layers.bits`.

    Raises:
        DataError: one of several domains is called `all`.
    """
    check_domains(held_out)
    tokens_NS = torch.cat([domain.tokens_NS for domain in held_out.values()])
    named = {WHOLE: layers.unchanged(), **changes}
    bits_CN = layers.bits(tokens_NS, list(named.values()), None, memory_bytes, progress)
    return {
        name: _cost(bits_N, bits_CN[0], held_out)
        for name, bits_N in zip(named, bits_CN, strict=True)
    }


def _cost(bits_N: Tensor, whole_N: Tensor, held_out: Mapping[str, HeldOut]) -> Cost:
    counts = [len(domain.tokens_NS) for domain in held_out.values()]
    sizes = [
        domain.tokens_NS[:, 1:].numel() * domain.bytes_per_token for domain in held_out.values()
    ]
    sums = [float(part.sum()) for part in bits_N.split_with_sizes(counts)]
    each = {name: bits / size for name, bits, size in zip(held_out, sums, sizes, strict=True)}
    more = list((bits_N - whole_N).split_with_sizes(counts))
    variance = sum(len(part) * float(part.var()) if len(part) > 1 else math.nan for part in more)
    return Cost(
        {ALL: sum(sums) / sum(sizes), **each},
        sum(float(part.sum()) for part in more) / sum(sizes),
        math.sqrt(variance) / sum(sizes),
    )


def fewest(allowed: list[int], fits: Callable[[int], bool]) -> int | None:
    """The smallest of ascending numbers for which `fits` is true; None: not even the largest.

    By bisection: it takes for granted that with a number all larger ones fit too.
    """
    low, high = 0, len(allowed)
    while low < high:
        middle = (low + high) // 2
        if fits(allowed[middle]):
            high = middle
        else:
            low = middle + 1
    return allowed[low] if low < len(allowed) else None
