"""Ablation: take an expert away, or swap it with another, and see which domain needs it.

The same batches run with and without each change, and every token's loss is compared with itself.
Letters beside those of docs/shapes.md: M domains, P documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moestro.errors import MoestroError
from moestro.probe.ablation.effects import Ablations, Masked
from moestro.probe.ablation.losses import Run, predicting
from moestro.probe.ablation.targets import Target
from moestro.probe.ablation.verdicts import Measured, judge, measure_row
from moestro.probe.recording.passages import Encodes, Passage, in_batches
from moestro.probe.recording.record import Progress
from moestro.probe.recording.reroute import Edit
from moestro.probe.recording.traces import place_of

MODES = {
    "silence": "the expert's weight becomes 0 and the token's other experts keep theirs",
    "silence_renormalised": "its weight becomes 0 and the token's other experts are scaled so that "
    "the weights add up to what they did",
    "swap": "its tokens go to another expert of the layer, whose tokens go to it",
}


class Cost(NamedTuple):
    """What an ablation will take: the model reads all text once, and once more for each change.

    Attributes:
        tokens: of the text.
        batches: forward passes of one reading.
        changes: experts to be changed, controls included.
        passes: forward passes in all.
    """

    tokens: int
    batches: int
    changes: int
    passes: int


def cost(
    texts: Iterable[Passage | str],
    chosen: Sequence[Target],
    *,
    tokenizer: Encodes | None = None,
    mode: str = "silence",
    batch_size: int = 16,
) -> Cost:
    """The forward passes that `ablate` will need, without a model; arguments as there."""
    readings = predicting(texts, tokenizer)
    batches, changes = len(in_batches(readings, batch_size)), len(_changes(chosen, mode))
    tokens = sum(len(reading.tokens_S) for reading in readings)
    return Cost(tokens, batches, changes, batches * (1 + changes))


def ablate(
    model: nn.Module,
    texts: Iterable[Passage | str],
    chosen: Sequence[Target],
    *,
    tokenizer: Encodes | None = None,
    mode: str = "silence",
    token_bytes: Callable[[int], int] | None = None,
    batch_size: int = 16,
    draws: int = 1999,
    seed: int = 0,
    progress: Progress | None = None,
) -> Ablations:
    """Change experts one at a time and measure the loss of each domain without and with it.

    An expert that looks special to a domain must matter to it: its row says whether the loss rises
    more there than elsewhere, beyond the noise of documents and beyond what the same tokens suffer
    elsewhere. See `Ablation`.

    Args:
        model: a `Decoder`, or a causal language model of transformers, whose tokens choose.
        texts: held-out text, best not that which `chosen` were chosen on; passages of one token
            predict nothing and are left out.
        chosen: from `targets` or `every`; in mode "swap" only targets that have an `other`.
        tokenizer: turns strings into ids.
        mode: one of `MODES`.
        token_bytes: bytes of text that a token id stands for; losses are bits per byte then.
        batch_size: sequences of a forward pass.
        draws: random draws behind intervals and p-values; at least 20 for each row.
        seed: of the draws.
        progress: called after each forward pass with (passes done, passes in all).

    Raises:
        MoestroError: the model has no mixture or its experts choose the tokens, there is no expert
            to change, one does not exist, or the mode does not.
        DataError: there is no text of two tokens, none of a chosen domain, a token outside the
            vocabulary, or a model on the meta device.
    """
    changes = _changes(chosen, mode)
    run = Run(model, texts, tokenizer, batch_size, token_bytes, draws, seed, progress)
    for of_change in changes:
        for target in of_change:
            run.check(target)
    run.total = len(run.batches) * (1 + len(changes))
    before_T = run.losses(counted=[of_change[0].layer for of_change in changes])
    measured = [row for of_change in changes for row in _measure(run, of_change, mode, before_T)]
    baseline_M, interval_M2 = run.by_domain(before_T)
    return Ablations(
        **run.facts(),
        mode=mode,
        bytes_M=run.bytes_M(),
        baseline_M=baseline_M,
        baseline_interval_M2=interval_M2,
        rows=judge(sorted(measured, key=lambda each: each.row.control), run.text),
        draws=draws,
    )


def _measure(
    run: Run, of_change: list[Target], mode: str, before_T: NDArray[np.float32]
) -> Iterator[Measured]:
    """One change, and what it does for each target that it is made for."""
    layer, expert, _, other, _ = of_change[0]
    if other is None:
        change = partial(_silence, expert, mode == "silence_renormalised")
    else:
        change = partial(_swap, expert, other)
    rise_T = (run.losses(_in({run.layers.index(layer)}, change)) - before_T).astype(np.float64)
    used_PE = run.used_PE[layer]
    touched_P = used_PE[:, [expert] if other is None else [expert, other]].sum(axis=1)
    for target in of_change:
        domain = run.domains.index(target.domain)
        touched_PX = touched_P, used_PE.sum(axis=1)
        found = measure_row(run.text, target, domain, len(run.domains), rise_T, touched_PX)
        yield found._replace(row=found.row._replace(other=other))


def mask_top(
    model: nn.Module,
    texts: Iterable[Passage | str],
    *,
    layer: int | None = None,
    renormalise: bool = False,
    tokenizer: Encodes | None = None,
    token_bytes: Callable[[int], int] | None = None,
    batch_size: int = 16,
    draws: int = 1999,
    seed: int = 0,
    progress: Progress | None = None,
) -> Masked:
    """The loss when each token loses its 1, 2, … K heaviest experts: is one enough of them all?

    After the masking test of DeepSeekMoE (Dai et al. 2024, §4.5), where a steep rise says that the
    experts do not stand in for each other. There the router then chooses K of the remaining
    experts; here, since the same test must work on every model, nothing replaces the
    masked ones.

    Arguments are those of `ablate`, with `layer` to mask in one layer only, by its layer number,
    and `renormalise` to scale the remaining weights of a token to add up to what all did.

    Raises:
        MoestroError: as `ablate`; or there is no such mixture layer.
        DataError: as `ablate`.
    """
    run = Run(model, texts, tokenizer, batch_size, token_bytes, draws, seed, progress)
    layers = run.layers if layer is None else (layer,)
    places = {place_of(each, run.layers) for each in layers}
    run.total = 2 * len(run.batches)  # K is known once the model has run.
    before_T = run.losses(counted=layers).astype(np.float64)
    run.total = (1 + run.top_k) * len(run.batches)
    losses = [before_T]
    for top in range(1, run.top_k + 1):
        losses.append(run.losses(_in(places, partial(_mask, top, renormalise))).astype(np.float64))
    found = [(*run.by_domain(loss_T), *run.by_domain(loss_T - before_T)) for loss_T in losses]
    loss_XM, loss_interval_XM2, change_XM, change_interval_XM2 = map(
        np.stack, zip(*found, strict=True)
    )
    return Masked(
        **run.facts(),
        mode="mask_top_renormalised" if renormalise else "mask_top",
        layers=layers,
        top_k=run.top_k,
        masked_X=np.arange(run.top_k + 1),
        loss_XM=loss_XM,
        loss_interval_XM2=loss_interval_XM2,
        change_XM=change_XM,
        change_interval_XM2=change_interval_XM2,
    )


def _changes(chosen: Sequence[Target], mode: str) -> list[list[Target]]:
    """The changes to be made, each with the targets that it is made for.

    Raises:
        MoestroError: there is none, or no such mode.
    """
    if mode not in MODES:
        raise MoestroError(f"mode is {mode!r}; choose one of {', '.join(MODES)}")
    changes: dict[tuple[int, int, int | None], dict[Target, None]] = {}
    for target in chosen:
        if mode != "swap":
            target = target._replace(other=None)
        elif target.control or target.other in (None, target.expert):
            continue
        changes.setdefault((target.layer, target.expert, target.other), {})[target] = None
    if not changes:
        raise MoestroError(
            "there is no expert to change; choose some with `targets`, or name them"
            + (" (a swap needs the `other` expert too)" if mode == "swap" else "")
        )
    return [list(of_change) for of_change in changes.values()]


def _in(places: set[int], change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Edit:
    """A change of some mixtures only, as `rerouted` takes it."""
    return lambda place, experts_TK, weights_TK: (
        change(experts_TK, weights_TK) if place in places else (experts_TK, weights_TK)
    )


def _swap(one: int, other: int, experts_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    swapped_TK = experts_TK.masked_fill(experts_TK == other, one)
    return swapped_TK.masked_fill(experts_TK == one, other), weights_TK


def _silence(
    expert: int, renormalise: bool, experts_TK: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    return experts_TK, _without(weights_TK, experts_TK == expert, renormalise)


def _mask(
    top: int, renormalise: bool, experts_TK: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Without the `top` heaviest experts of each token."""
    heaviest_TK = weights_TK.topk(min(top, weights_TK.shape[1]), dim=1).indices
    hit_TK = torch.zeros_like(weights_TK, dtype=torch.bool).scatter(1, heaviest_TK, True)
    return experts_TK, _without(weights_TK, hit_TK, renormalise)


def _without(weights_TK: Tensor, hit_TK: Tensor, renormalise: bool) -> Tensor:
    """Weight 0 where hit; the others as they are, or scaled to the same sum as before."""
    left_TK = weights_TK.masked_fill(hit_TK, 0)
    if not renormalise:
        return left_TK
    before_T1, after_T1 = weights_TK.sum(1, keepdim=True), left_TK.sum(1, keepdim=True)
    # A token without experts left gets nothing from this layer.
    scale_T1 = torch.where(after_T1 > 0, before_T1 / after_T1.clamp_min(1e-20), 1.0)
    changed_T1 = hit_TK.any(1, keepdim=True)
    return torch.where(changed_T1, left_TK * scale_T1, weights_TK)
