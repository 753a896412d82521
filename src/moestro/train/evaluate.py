"""Held-out bits per byte, for each domain and for all of them together."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from moestro.train.data import HeldOut
from moestro.train.distributed import ALONE, Ranks

ALL = "all"


@torch.no_grad()
def evaluate(
    model: nn.Module,
    held_out: Mapping[str, HeldOut],
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Measure how many bits the model needs for one byte of held-out text.

    A domain's number is the mean cross entropy of its tokens in bits, divided by its bytes per
    token. `all` is all bits over all bytes: the domains' mean weighted by their bytes.

    Args:
        model: Called as `model(tokens_BS).logits`; put into eval mode meanwhile.
        held_out: Windows by domain, tokens [N, S+1].
        batch_size: Windows per forward pass.
        dtype: float32, or bfloat16 for autocast.
        ranks: Each process takes its share of the windows; all get the same result.
    """
    device = next(model.parameters()).device
    names = list(held_out)
    bits_N = torch.zeros(len(names), dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            for place, name in enumerate(names):
                tokens_NS = held_out[name].tokens_NS[ranks.rank :: ranks.world]
                # No windows at all where there are more ranks than windows.
                for window_BS in torch.split(tokens_NS, batch_size) if len(tokens_NS) else ():
                    bits_N[place] += _bits(model, window_BS.to(device))
    finally:
        model.train(was_training)
    bits = ranks.sum_(bits_N).tolist()
    num_bytes = [_bytes(held_out[name]) for name in names]
    result = {name: b / n for name, b, n in zip(names, bits, num_bytes, strict=True)}
    return {ALL: sum(bits) / sum(num_bytes), **result}


def _bits(model: nn.Module, window_BS: torch.Tensor) -> torch.Tensor:
    """Bits of all predicted tokens of one batch of windows [B, S+1]; float64 scalar."""
    logits_BSV = model(window_BS[:, :-1]).logits
    loss_T = cross_entropy(
        logits_BSV.float().flatten(0, 1), window_BS[:, 1:].flatten(), reduction="none"
    )
    return loss_T.double().sum() / math.log(2.0)


def _bytes(held_out: HeldOut) -> float:
    num_windows, length = held_out.tokens_NS.shape
    return num_windows * (length - 1) * held_out.bytes_per_token
