"""What one mixture decided in one forward pass, and the few numbers of it that a trace keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moestro.moe.routing import Routing
from moestro.probe.recording.passages import Batch
from moestro.probe.recording.traces import Subject, Trace, smallest_dtype


class Choice(NamedTuple):
    """The experts of every token of a forward pass, padding included.

    Attributes:
        experts_TK: int64, first choice first; E marks an empty place.
        weights_TK: the weight of that expert's output; 0 in an empty place.
        probs_TE: the router's probabilities; None where they are not known.
        num_experts: E.
        top_k: K; 0 where tokens have varying numbers of experts.
        kept_TK: bool, False for an assignment that found no room; None: all were kept.
    """

    experts_TK: Tensor
    weights_TK: Tensor
    probs_TE: Tensor | None
    num_experts: int
    top_k: int
    kept_TK: Tensor | None = None


class Kept(NamedTuple):
    """What a trace keeps of a Choice, still where the model computed it.

    Attributes:
        experts_TK: see `Choice`.
        weights_TK: fp32.
        kept_TK: see `Choice`.
        entropy_T: fp32, nats; NaN where unknown.
        margin_T: fp32; see `Trace.margin_TL`.
        probs_BE: fp32, mean over each sequence's tokens.
        num_experts: E.
        top_k: see `Choice`.
    """

    experts_TK: Tensor
    weights_TK: Tensor
    kept_TK: Tensor | None
    entropy_T: Tensor
    margin_T: Tensor
    probs_BE: Tensor
    num_experts: int
    top_k: int


def choice_of(routing: Routing) -> Choice:
    """A Routing token by token; where their number varies, the heaviest expert comes first."""
    num_experts, top_k = routing.num_experts, routing.top_k
    if top_k:
        kept_R = routing.kept_R
        return Choice(
            routing.experts_TK(),
            routing.weights_R.view(-1, top_k),
            routing.probs_TE,
            num_experts,
            top_k,
            None if kept_R is None else kept_R.view(-1, top_k),
        )
    order_R = routing.weights_R.argsort(descending=True, stable=True)
    order_R = order_R[routing.tokens_R[order_R].argsort(stable=True)]
    tokens_R = routing.tokens_R[order_R]
    count_T = torch.bincount(tokens_R, minlength=routing.num_tokens)
    starts_T = count_T.cumsum(0) - count_T
    place_R = torch.arange(len(tokens_R), device=tokens_R.device) - starts_T[tokens_R]
    most = max(1, int(count_T.max())) if len(count_T) else 1
    experts_TK = tokens_R.new_full((routing.num_tokens, most), num_experts)
    weights_TK = routing.weights_R.new_zeros(routing.num_tokens, most)
    experts_TK[tokens_R, place_R] = routing.experts_R[order_R]
    weights_TK[tokens_R, place_R] = routing.weights_R[order_R]
    return Choice(experts_TK, weights_TK, routing.probs_TE, num_experts, 0)


def keep(choice: Choice, batch: Batch) -> Kept:
    """Reduce one layer's choice while the model is still at it; waits for no device."""
    experts_TK, num_experts = choice.experts_TK.detach(), choice.num_experts
    weights_TK = choice.weights_TK.detach().float()
    if choice.probs_TE is None:
        unknown_T = weights_TK.new_full((len(experts_TK),), math.nan)
        unknown_BE = weights_TK.new_full((len(batch.length_B), num_experts), math.nan)
        entropy_T = margin_T = unknown_T
        probs_BE = unknown_BE
    else:
        probs_TE = choice.probs_TE.detach().float()
        smallest = torch.finfo(probs_TE.dtype).tiny
        entropy_T = -(probs_TE * probs_TE.clamp_min(smallest).log()).sum(1)
        margin_T = _margin(probs_TE, experts_TK)
        probs_BE = _means(probs_TE, batch)
    return Kept(
        experts_TK, weights_TK, choice.kept_TK, entropy_T, margin_T, probs_BE,
        num_experts, choice.top_k,
    )  # fmt: skip


def trace_of(layers: Sequence[Kept], batch: Batch, subject: Subject, domains: tuple[str, ...],
             number: int) -> Trace:  # fmt: skip
    """The Trace of one forward pass: padding left out, everything brought over at once."""
    num_experts = subject.num_experts
    layers = [_moved(layer, layers[0].experts_TK.device) for layer in layers]
    width = max(layer.experts_TK.shape[1] for layer in layers)
    real_T = slice(None) if batch.valid_BS is None else batch.valid_BS.flatten().numpy()
    experts_TLK = _together([layer.experts_TK for layer in layers], width, num_experts)[real_T]
    kept_TLK = None
    if any(layer.kept_TK is not None for layer in layers):
        kept = [_kept(layer) for layer in layers]
        kept_TLK = _together(kept, width, True)[real_T]
    probs_NLE = np.full((len(batch.length_B), len(layers), num_experts), 0, dtype=np.float32)
    for place, layer in enumerate(layers):
        probs_NLE[:, place, : layer.num_experts] = layer.probs_BE.cpu().numpy()
    readings = batch.readings
    documents = tuple(dict.fromkeys(reading.document for reading in readings))
    generated = [np.arange(len(r.tokens_S)) >= r.prompt for r in readings]
    return Trace(
        subject=subject,
        domains=domains,
        documents=documents,
        domain_N=np.array([domains.index(reading.domain) for reading in readings]),
        document_N=np.array([documents.index(reading.document) for reading in readings]),
        batch_N=np.full(len(readings), number, dtype=np.int64),
        length_N=batch.length_B.numpy().copy(),
        tokens_T=torch.cat([reading.tokens_S for reading in readings]).int().numpy(),
        generated_T=np.concatenate(generated),
        experts_TLK=experts_TLK.astype(smallest_dtype(num_experts)),
        weights_TLK=_together([layer.weights_TK for layer in layers], width, 0)[real_T],
        kept_TLK=kept_TLK,
        entropy_TL=torch.stack([each.entropy_T for each in layers], 1).cpu().numpy()[real_T],
        margin_TL=torch.stack([each.margin_T for each in layers], 1).cpu().numpy()[real_T],
        probs_NLE=probs_NLE,
    )


def _moved(layer: Kept, device: torch.device) -> Kept:
    """The layers of one model may lie on several devices."""
    tensors: dict[str, Any] = {
        name: value.to(device)
        for name, value in layer._asdict().items()
        if isinstance(value, Tensor)
    }
    return layer._replace(**tensors)


def _margin(probs_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """Least likely chosen less most likely not chosen; NaN where all or none are chosen."""
    # An empty place looks at a column more, which is never the least.
    wide_TE = torch.nn.functional.pad(probs_TE, (0, 1), value=math.inf)
    least_T = wide_TE.gather(1, experts_TK).amin(1)
    most_T = wide_TE.scatter_(1, experts_TK, -math.inf)[:, :-1].amax(1)
    margin_T = least_T - most_T
    return margin_T.masked_fill_(margin_T.isinf(), math.nan)


def _means(probs_TE: Tensor, batch: Batch) -> Tensor:
    probs_BSE = probs_TE.view(*batch.tokens_BS.shape, -1)
    if batch.valid_BS is None:
        return probs_BSE.mean(1)
    valid_BS1 = batch.valid_BS.to(probs_TE.device, non_blocking=True)[..., None]
    length_B1 = batch.length_B.to(probs_TE.device, non_blocking=True)[:, None]
    return probs_BSE.masked_fill(~valid_BS1, 0).sum(1) / length_B1


def _kept(layer: Kept) -> Tensor:
    if layer.kept_TK is None:
        return torch.ones_like(layer.experts_TK, dtype=torch.bool)
    return layer.kept_TK


def _together(parts: list[Tensor], width: int, fill: float) -> NDArray[Any]:
    """[T, L, K] of L layers' [T, K], on the host."""
    wide = [
        part
        if part.shape[1] == width
        else torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill)
        for part in parts
    ]
    found: NDArray[Any] = torch.stack(wide, dim=1).cpu().numpy()
    return found
