"""Muon for matrices, AdamW for the rest: one optimizer with both kinds of parameter groups.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/), scaled as by Liu et al. 2025,
"Muon is Scalable for LLM Training" (arXiv 2502.16982), so that it takes AdamW's learning rate and
weight decay. `torch.optim.Muon` is the same of single matrices; here stacked experts [E, O, I] are
E matrices, and matrices of one shape are orthogonalised together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
# The state of a matrix: the running average of its gradients.
MOMENTUM_STATE = "momentum_buffer"
# The quintic's coefficients, its iterations, and what keeps a zero gradient from dividing by 0.
COEFFICIENTS, ITERATIONS, EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7
# An orthogonal update times this and the root of the longer side is as large as AdamW's (RMS).
RMS = 0.2
# Numbers of matrices that are orthogonalised together: what bounds the memory of a step.
TOGETHER = 2**23


class Muon(torch.optim.Optimizer):
    """Muon over the groups with `matrices` = True, AdamW over the others.

    Args:
        groups: Parameter groups, each with `params`, `weight_decay` and `matrices`. Those of
            matrices have at least two dimensions, of which the last two are the matrix.
        lr: Learning rate of all.
        betas: AdamW's two averages.
        fused: Whether AdamW runs fused.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        fused: bool,
    ) -> None:
        groups = list(groups)
        super().__init__(groups, {"lr": lr})
        rest = [group for group in self.param_groups if not group["matrices"]]
        # The groups and the state are the same objects, so what is set on one is set on both.
        self._adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, fused=fused) if rest else None
        if self._adamw is not None:
            self._adamw.state = self.state

    # torch's returns the loss of a closure, of which none is taken here.
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None
        if self._adamw is not None:
            self._adamw.step()
        for group in self.param_groups:
            if group["matrices"]:
                self._step_matrices(group["params"], group["lr"], group["weight_decay"])

    def _step_matrices(self, parameters: list[Tensor], lr: float, decay: float) -> None:
        pieces: dict[torch.Size, list[tuple[Tensor, ...]]] = {}
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state, shape = self.state[parameter], parameter.shape[-2:]
            if MOMENTUM_STATE not in state:
                state[MOMENTUM_STATE] = torch.zeros_like(parameter)
            average = state[MOMENTUM_STATE].lerp_(parameter.grad, 1 - MOMENTUM)
            gradient = parameter.grad.reshape(-1, *shape)
            matrices = (parameter.view(-1, *shape), gradient, average.view(-1, *shape))
            several = max(1, TOGETHER // shape.numel())
            parts = zip(*(torch.split(each, several) for each in matrices), strict=True)
            pieces.setdefault(shape, []).extend(parts)
        for shape, parts_of in pieces.items():
            size = RMS * math.sqrt(max(shape))
            for batch in _batches(parts_of):
                nesterov = [grad.lerp(average, MOMENTUM) for _, grad, average in batch]
                counts = [len(each) for each in nesterov]
                updates = torch.split(orthogonalized(torch.cat(nesterov)), counts)
                for (weights, _, _), update in zip(batch, updates, strict=True):
                    weights.mul_(1 - lr * decay).add_(update, alpha=-lr * size)


def flops(parameters: Iterable[Tensor]) -> int:
    """Operations that orthogonalising these matrices [.., O, I] takes in one step."""
    total = 0
    for parameter in parameters:
        short, long = sorted(parameter.shape[-2:])
        count = parameter.numel() // (short * long)
        total += count * ITERATIONS * (4 * short * short * long + 2 * short**3)
    return total


def _batches(pieces: list[tuple[Tensor, ...]]) -> Iterator[list[tuple[Tensor, ...]]]:
    """Runs of pieces with as many numbers as are orthogonalised together, or one piece."""
    batch: list[tuple[Tensor, ...]] = []
    for piece in pieces:
        if batch and sum(each[0].numel() for each in (*batch, piece)) > TOGETHER:
            yield batch
            batch = []
        batch.append(piece)
    yield batch


def orthogonalized(x_NOI: Tensor) -> Tensor:
    """About U·Vᵀ of each matrix U·S·Vᵀ, by Newton-Schulz in bfloat16: most singular values near 1.

    Args:
        x_NOI: N matrices; one of zeros stays zero.

    Returns:
        bfloat16 [N, O, I].
    """
    a, b, c = COEFFICIENTS
    tall = x_NOI.shape[1] > x_NOI.shape[2]
    x = x_NOI.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).contiguous()
