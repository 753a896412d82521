"""Ablation: take an expert away, or swap it with another, and see which domain needs it.

The same batches run with and without each change, and every token's loss is compared with itself.
Letters beside those of docs/shapes.md: M domains, P documents, N sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moestro.errors import MoestroError
from moestro.probe.ablation.effects import Ablation, Ablations, Masked
from moestro.probe.ablation.losses import Run, predicting
from moestro.probe.ablation.targets import Target, every, targets
from moestro.probe.ablation.verdicts import Measured, Predicted, by_domain, judge, measure_row
from moestro.probe.measures.bootstrap import Floats
from moestro.probe.recording.passages import Encodes, Passage, in_batches
from moestro.probe.recording.record import Progress
from moestro.probe.recording.reroute import Edit

__all__ = [
    "MODES", "Ablation", "Ablations", "Cost", "Masked", "Target", "ablate", "cost", "every",
    "mask_top", "targets",
]  # fmt: skip

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
    batches = len(in_batches(readings, batch_size))
    changes = len({_key(target) for target in _wanted(chosen, mode)})
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
    wanted = _wanted(chosen, mode)
    run = Run(model, texts, tokenizer, batch_size, token_bytes, progress)
    return _changed(run, run.predicted(draws, seed), wanted, mode, draws)


def _changed(
    run: Run, text: Predicted, wanted: Sequence[Target], mode: str, draws: int
) -> Ablations:
    """All changes, each against the model as it is."""
    domains = run.domains
    for target in wanted:
        run.check(target)
    changes = dict.fromkeys(_key(target) for target in wanted)
    run.total = len(run.batches) * (1 + len(changes))
    before_T = run.losses(None, [target.layer for target in wanted])
    measured = [
        each for change in changes for each in _measure(run, text, change, wanted, mode, before_T)
    ]
    ordered = sorted(measured, key=lambda each: each.row.control)
    baseline_M, interval_M2 = by_domain(text, text.sums(before_T.astype(np.float64)), len(domains))
    return Ablations(
        fingerprint=run.fingerprint,
        mode=mode,
        unit=run.unit,
        domains=domains,
        tokens_M=np.bincount(text.domain_P[text.document_T], minlength=len(domains)),
        documents_M=np.bincount(text.domain_P, minlength=len(domains)),
        bytes_M=run.bytes_M(text),
        baseline_M=baseline_M,
        baseline_interval_M2=interval_M2,
        rows=judge(ordered, text),
        passes=run.done,
        draws=draws,
    )


def _measure(
    run: Run,
    text: Predicted,
    change: tuple[int, int, int | None],
    wanted: Sequence[Target],
    mode: str,
    before_T: NDArray[np.float32],
) -> Iterator[Measured]:
    """One change, and what it does for each target that it is made for."""
    layer, expert, other = change
    edit = _edit(mode, run.layers.index(layer), expert, other)
    rise_T = (run.losses(edit) - before_T).astype(np.float64)
    used_PE = run.used_PE[layer]
    touched_P = used_PE[:, [n for n in (expert, other) if n is not None]].sum(axis=1)
    for target in wanted:
        if _key(target) == change:
            found = measure_row(
                text, target, run.domains.index(target.domain), len(run.domains), rise_T,
                (touched_P, used_PE.sum(axis=1)),
            )  # fmt: skip
            partner = target.other if mode == "swap" else None
            yield found._replace(row=found.row._replace(other=partner))


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
    experts; here, since the same test must work on every model, nobody takes the place of those
    masked.

    Args:
        model: as in `ablate`.
        texts: held-out text.
        layer: mask in this layer only, by its layer number; None: in all.
        renormalise: scale the remaining weights of a token to add up to what all did.
        tokenizer: as there, like all that follow.
        token_bytes: gives losses in bits per byte.
        batch_size: sequences of a forward pass.
        draws: behind the intervals.
        seed: of the draws.
        progress: called with (passes done, passes in all).

    Raises:
        MoestroError: as `ablate`; or there is no such mixture layer.
        DataError: as `ablate`.
    """
    run = Run(model, texts, tokenizer, batch_size, token_bytes, progress)
    return _mask_all(run, run.predicted(draws, seed), layer, renormalise)


def _mask_all(run: Run, text: Predicted, layer: int | None, renormalise: bool) -> Masked:
    """The model as it is, then with 1 to K choices masked."""
    number = len(run.domains)
    masked = run.layers if layer is None else (layer,)
    places = {run.place(each) for each in masked}
    # K is known once the model has run.
    run.total = 2 * len(run.batches)
    before_T = run.losses(None, masked)
    run.total = (1 + run.top_k) * len(run.batches)
    losses, changes = _masked(run, text, before_T, places, renormalise)
    return Masked(
        fingerprint=run.fingerprint,
        mode="mask_top_renormalised" if renormalise else "mask_top",
        layers=masked,
        unit=run.unit,
        domains=run.domains,
        tokens_M=np.bincount(text.domain_P[text.document_T], minlength=number),
        documents_M=np.bincount(text.domain_P, minlength=number),
        top_k=run.top_k,
        masked_X=np.arange(run.top_k + 1),
        loss_XM=np.stack([loss for loss, _ in losses]),
        loss_interval_XM2=np.stack([each for _, each in losses]),
        change_XM=np.stack([change for change, _ in changes]),
        change_interval_XM2=np.stack([each for _, each in changes]),
        passes=run.done,
    )


def _masked(
    run: Run,
    text: Predicted,
    before_T: NDArray[np.float32],
    places: set[int],
    renormalise: bool,
) -> tuple[list[tuple[Floats, Floats]], list[tuple[Floats, Floats]]]:
    """Loss and rise of each domain with their intervals, with 0 to K choices masked."""
    number = len(run.domains)
    losses = [by_domain(text, text.sums(before_T.astype(np.float64)), number)]
    changes = [by_domain(text, np.zeros(len(text.domain_P)), number)]
    for top in range(1, run.top_k + 1):
        after_T = run.losses(_mask_edit(places, top, renormalise)).astype(np.float64)
        losses.append(by_domain(text, text.sums(after_T), number))
        changes.append(by_domain(text, text.sums(after_T - before_T), number))
    return losses, changes


def _wanted(chosen: Sequence[Target], mode: str) -> list[Target]:
    """The targets that a mode can do something about.

    Raises:
        MoestroError: there is none, or no such mode.
    """
    if mode not in MODES:
        raise MoestroError(f"mode is {mode!r}; choose one of {', '.join(MODES)}")
    wanted = list(dict.fromkeys(chosen))
    if mode == "swap":
        wanted = [each for each in wanted if not each.control and each.other is not None]
        wanted = [each for each in wanted if each.other != each.expert]
    else:
        wanted = list(dict.fromkeys(each._replace(other=None) for each in wanted))
    if not wanted:
        raise MoestroError(
            "there is no expert to change; choose some with `targets`, or name them"
            + (" (a swap needs the `other` expert too)" if mode == "swap" else "")
        )
    return wanted


def _key(target: Target) -> tuple[int, int, int | None]:
    """What decides the model's losses; several rows may share them."""
    return target.layer, target.expert, target.other


def _edit(mode: str, place: int, expert: int, other: int | None) -> Edit:
    """The change as `rerouted` takes it."""

    def edit(index: int, experts_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        if index != place:
            return experts_TK, weights_TK
        hit_TK = experts_TK == expert
        if mode == "swap":
            assert other is not None
            swapped_TK = experts_TK.masked_fill(experts_TK == other, expert)
            return swapped_TK.masked_fill(hit_TK, other), weights_TK
        return experts_TK, _silenced(weights_TK, hit_TK, mode == "silence_renormalised")

    return edit


def _mask_edit(places: set[int], top: int, renormalise: bool) -> Edit:
    """Mask the `top` heaviest experts of each token in some layers."""

    def edit(index: int, experts_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        if index not in places:
            return experts_TK, weights_TK
        heaviest_TK = weights_TK.topk(min(top, weights_TK.shape[1]), dim=1).indices
        hit_TK = torch.zeros_like(weights_TK, dtype=torch.bool).scatter(1, heaviest_TK, True)
        return experts_TK, _silenced(weights_TK, hit_TK, renormalise)

    return edit


def _silenced(weights_TK: Tensor, hit_TK: Tensor, renormalise: bool) -> Tensor:
    """Weight 0 where hit; the others as they are, or scaled to the same sum as before."""
    left_TK = weights_TK.masked_fill(hit_TK, 0)
    if not renormalise:
        return left_TK
    before_T1, after_T1 = weights_TK.sum(1, keepdim=True), left_TK.sum(1, keepdim=True)
    # A token with nobody left gets nothing from this layer.
    scale_T1 = torch.where(after_T1 > 0, before_T1 / after_T1.clamp_min(1e-20), 1.0)
    changed_T1 = hit_TK.any(1, keepdim=True)
    return torch.where(changed_T1, left_TK * scale_T1, weights_TK)
