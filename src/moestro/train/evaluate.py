"""Held-out bits per byte, for each domain and for all of them together."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moestro.data.domains import ALL, check_domains
from moestro.data.windows import HeldOut
from moestro.train.distributed import ALONE, Ranks
from moestro.train.task import NEXT_TOKEN, Example, Task

HELD_OUT = "held out"


@torch.no_grad()
def evaluate(
    model: nn.Module,
    held_out: Mapping[str, HeldOut],
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    ranks: Ranks = ALONE,
    task: Task = NEXT_TOKEN,
) -> dict[str, float]:
    """Measure how many bits the model needs for one byte of held-out text.

    A domain's number is the mean cross entropy of its tokens in bits, divided by its bytes per
    token. `all` is all bits over all bytes: the domains' mean weighted by their bytes. Of an
    encoder-decoder only the hidden text counts: all bits of the targets over the bytes hidden.

    Args:
        model: Called as `model(*inputs).logits`; put into eval mode meanwhile.
        held_out: Windows by domain, tokens [N, S+1].
        batch_size: Windows per forward pass.
        dtype: float32, or bfloat16 for autocast.
        ranks: Each process takes its share of the windows; all get the same result.
        task: What the model is to predict.

    Raises:
        DataError: one of several domains is called `all`.
    """
    check_domains(held_out)
    device = next(model.parameters()).device
    bits_N = torch.zeros(len(held_out), dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            for place, (name, (tokens_NS, _)) in enumerate(held_out.items()):
                mine = range(ranks.rank, len(tokens_NS), ranks.world)
                most = -(-len(tokens_NS) // ranks.world)
                for first in range(0, most, batch_size):  # as many forwards on every rank
                    rows = list(mine[first : first + batch_size])
                    places = [(HELD_OUT, name, row) for row in rows or [0]]
                    example = task.examples(tokens_NS[rows or [0]], places)
                    bits = _bits(model, example.to(device))
                    bits_N[place] += bits if rows else 0
    finally:
        model.train(was_training)
    sums = ranks.sum_(bits_N).tolist()
    num_bytes = [_bytes(domain, task) for domain in held_out.values()]
    result = {name: b / n for name, b, n in zip(held_out, sums, num_bytes, strict=True)}
    return {ALL: sum(sums) / sum(num_bytes), **result}


def _bits(model: nn.Module, example: Example) -> Tensor:
    """Bits of all predicted tokens of one batch; float64 scalar."""
    logits_BTV = model(*example.inputs).logits
    loss_N = cross_entropy(
        logits_BTV.float().flatten(0, 1), example.targets.flatten(), reduction="none"
    )
    return loss_N.double().sum() / math.log(2.0)


def _bytes(held_out: HeldOut, task: Task) -> float:
    return task.predicted(held_out.tokens_NS) * held_out.bytes_per_token
