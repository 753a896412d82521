"""Values in place of zeros: what training starts at zero is checked as if it had been trained.

A selection bias and the B of a low-rank pair start at zero. A layer that leaves such a tensor out,
or puts it where it does not belong, then computes the same as one that is right.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from moestro.check.subject import Subject, named_tensors
from moestro.foreign.routers import BIASES

TOKENS = 64  # of which the spread of scores is taken
SPREAD = 0.1  # of vectors, and of selection biases whose scores are not known


def filled(subject: Subject) -> Subject:
    """The subject, copies of which have random numbers where such a tensor is all zero.

    A selection bias gets the spread of the scores that it is added to: less would change no choice,
    more would give all tokens the same experts.
    """
    values = drawn(subject.module, subject.zeros)
    biases = drawn(subject.module, subject.choice_biases, spread=1.0)
    if not values and not biases:
        return subject
    subject = replace(subject, filled=values)
    scale = _spread(subject) if biases else 0.0
    return replace(subject, filled=values | {name: scale * z for name, z in biases.items()})


def is_choice_bias(name: str) -> bool:
    """Whether a tensor of transformers is a selection bias, by its name."""
    return name.rpartition(".")[2] in BIASES


def drawn(
    module: nn.Module, names: Collection[str], spread: float | None = None
) -> dict[str, Tensor]:
    """Normal numbers for each of these tensors that is all zero.

    Args:
        module: that has them; it is left as it is.
        names: of tensors; others than zeros are left out.
        spread: standard deviation; None: 1 / sqrt(columns) of a matrix, `SPREAD` of a vector.
    """
    generator, found = torch.Generator().manual_seed(0), {}
    tensors = named_tensors(module)
    for name in sorted(set(names) & set(tensors)):
        each = tensors[name]
        if each.is_meta or not each.is_floating_point() or each.any() or not each.numel():
            continue
        made = torch.randn(
            tuple(each.shape), generator=generator, device="cpu", dtype=torch.float32
        )
        usual = each.shape[-1] ** -0.5 if each.dim() > 1 else SPREAD
        found[name] = made * (usual if spread is None else spread)
    return found


def _spread(subject: Subject) -> float:
    """Standard deviation of a token's scores."""
    if not subject.score:
        return SPREAD
    generator = torch.Generator().manual_seed(0)
    shape = TOKENS, subject.dim
    x_TD = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64)
    with torch.no_grad():
        logits_TE = subject.chosen(subject.copied(torch.float64), x_TD).logits_TE
    if logits_TE is None or logits_TE.shape[1] < 2:
        return SPREAD
    scores_TE = logits_TE.sigmoid() if subject.score == "sigmoid" else logits_TE.softmax(-1)
    return float(scores_TE.std(1).mean()) or SPREAD
