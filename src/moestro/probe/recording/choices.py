"""What one mixture decided in one forward pass, and the few numbers of it that a trace keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from moestro.moe.routing import Routing
from moestro.probe.recording.passages import Batch
from moestro.probe.recording.traces import Subject, Trace, smallest_dtype


class TokenChoice(NamedTuple):
    """The experts of every token of a forward pass, padding included.

    Attributes:
        experts_TK: int64, first choice first; E marks an empty place.
        weights_TK: the weight of that expert's output; 0 in an empty place.
        probs_TE: the router's probabilities; None where they are not known.
        num_experts: E.
        top_k: K; 0 where tokens have varying numbers of experts.
        kept_TK: bool, False for an assignment dropped over capacity; None: all were kept.
    """

    experts_TK: Tensor
    weights_TK: Tensor
    probs_TE: Tensor | None
    num_experts: int
    top_k: int
    kept_TK: Tensor | None = None


class LayerRecord(NamedTuple):
    """What a trace keeps of a layer's choice, still where the model computed it.

    Attributes:
        choice: with weights in fp32, and without the probabilities.
        entropy_T: fp32, nats; NaN where unknown.
        margin_T: fp32; see `Trace.margin_TL`.
        probs_BE: fp32, mean over each sequence's tokens.
    """

    choice: TokenChoice
    entropy_T: Tensor
    margin_T: Tensor
    probs_BE: Tensor


def choice_of(routing: Routing) -> TokenChoice:
    """A Routing token by token; where their number varies, the heaviest expert comes first."""
    num_experts, top_k, kept_R = routing.num_experts, routing.top_k, routing.kept_R
    if top_k:
        kept_TK = None if kept_R is None else kept_R.view(-1, top_k)
        weights_TK = routing.weights_R.view(-1, top_k)
        return TokenChoice(
            routing.experts_TK(), weights_TK, routing.probs_TE, num_experts, top_k, kept_TK
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
    return TokenChoice(experts_TK, weights_TK, routing.probs_TE, num_experts, 0)


def layer_record(choice: TokenChoice, batch: Batch) -> LayerRecord:
    """Reduce one layer's choice while the model is still at it; waits for no device."""
    experts_TK, weights_TK = choice.experts_TK.detach(), choice.weights_TK.detach().float()
    entropy_T = margin_T = weights_TK.new_full((len(experts_TK),), math.nan)
    probs_BE = weights_TK.new_full((len(batch.length_B), choice.num_experts), math.nan)
    if choice.probs_TE is not None:
        probs_TE = choice.probs_TE.detach().float()
        smallest = torch.finfo(probs_TE.dtype).tiny
        entropy_T = -(probs_TE * probs_TE.clamp_min(smallest).log()).sum(1)
        margin_T, probs_BE = _margin(probs_TE, experts_TK), _means(probs_TE, batch)
    choice = choice._replace(experts_TK=experts_TK, weights_TK=weights_TK, probs_TE=None)
    return LayerRecord(choice, entropy_T, margin_T, probs_BE)


def trace_of(layers: Sequence[LayerRecord], batch: Batch, subject: Subject,
             domains: tuple[str, ...], number: int) -> Trace:  # fmt: skip
    """The Trace of one forward pass: padding left out, everything copied in one transfer."""
    num_experts, readings = subject.num_experts, batch.readings
    choices = [layer.choice for layer in layers]
    width = max(choice.experts_TK.shape[1] for choice in choices)
    real_T = slice(None) if batch.valid_BS is None else batch.valid_BS.flatten().numpy()
    kept_TLK = None
    if any(choice.kept_TK is not None for choice in choices):
        kept_TLK = _together([_kept(choice) for choice in choices], width, True)[real_T]
    experts_TLK = _together([choice.experts_TK for choice in choices], width, num_experts)[real_T]
    entropy_TL1 = _together([layer.entropy_T[:, None] for layer in layers], 1, 0)[real_T]
    margin_TL1 = _together([layer.margin_T[:, None] for layer in layers], 1, 0)[real_T]
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
        weights_TLK=_together([choice.weights_TK for choice in choices], width, 0)[real_T],
        kept_TLK=kept_TLK,
        entropy_TL=entropy_TL1[..., 0],
        margin_TL=margin_TL1[..., 0],
        probs_NLE=_together([layer.probs_BE for layer in layers], num_experts, 0),
    )


def _margin(probs_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """Least likely chosen less most likely not chosen; NaN where all or none are chosen."""
    # An empty place looks at a column more, which is never the least.
    wide_TE = pad(probs_TE, (0, 1), value=math.inf)
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


def _kept(choice: TokenChoice) -> Tensor:
    if choice.kept_TK is None:
        return torch.ones_like(choice.experts_TK, dtype=torch.bool)
    return choice.kept_TK


def _together(layers: list[Tensor], width: int, fill: float) -> NDArray[Any]:
    """[T, L, width] of L layers' [T, at most width], on the host; they may lie on many devices."""
    device = layers[0].device
    wide = [pad(each.to(device), (0, width - each.shape[1]), value=fill) for each in layers]
    found: NDArray[Any] = torch.stack(wide, dim=1).cpu().numpy()
    return found
