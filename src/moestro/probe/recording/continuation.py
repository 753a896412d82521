"""Let a model write on after each text, always the most likely token."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from moestro.errors import MoestroError
from moestro.models.decoder import Decoder
from moestro.probe.recording.passages import Reading


def continued(
    model: nn.Module,
    readings: tuple[Reading, ...],
    count: int,
    ends: Collection[int],
    device: torch.device,
) -> tuple[Reading, ...]:
    """The texts, each with at most `count` tokens that the model writes after it.

    Sequence by sequence, so that none depends on another; the model's cache serves only here.

    Args:
        model: in evaluation mode.
        readings: what it reads.
        count: most tokens to write.
        ends: tokens of an own model after which it stops.
        device: where the model is.

    Raises:
        MoestroError: the model cannot generate.
    """
    if count == 0:
        return readings
    found = []
    for reading in readings:
        prompt_1S = reading.tokens_S[None].to(device)
        if isinstance(model, Decoder):
            new_S = _own(model, prompt_1S, count, ends)
        else:
            new_S = _foreign(model, prompt_1S, count)
        found.append(reading._replace(tokens_S=torch.cat([reading.tokens_S, new_S.cpu()])))
    return tuple(found)


def _own(model: Decoder, prompt_1S: Tensor, count: int, ends: Collection[int]) -> Tensor:
    cache, tokens_1S, new = model.new_cache(1), prompt_1S, []
    for _ in range(count):
        tokens_1S = model(tokens_1S, cache=cache).logits[:, -1:].argmax(-1)
        new.append(tokens_1S[0])
        if ends and int(tokens_1S) in ends:
            break
    return torch.cat(new)


def _foreign(model: Any, prompt_1S: Tensor, count: int) -> Tensor:
    if not hasattr(model, "generate"):
        raise MoestroError(
            f"{type(model).__name__} cannot generate; give its causal language model "
            "(…ForCausalLM), or generate=0"
        )
    whole_1S: Tensor = model.generate(
        input_ids=prompt_1S,
        attention_mask=torch.ones_like(prompt_1S),
        max_new_tokens=count,
        do_sample=False,
        num_beams=1,
    )
    return whole_1S[0, prompt_1S.shape[1] :]
