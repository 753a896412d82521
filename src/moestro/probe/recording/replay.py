"""Force a recorded routing on a model: the same logits to the last bit, or how far it differs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from moestro.errors import DataError
from moestro.probe.recording.passages import Batch, Reading, pad
from moestro.probe.recording.reader import Reader, reader_of
from moestro.probe.recording.reroute import Edit, rerouted
from moestro.probe.recording.traces import Ints, Trace, fingerprint


class Replayed(NamedTuple):
    """One batch of a trace, run again.

    Attributes:
        sequences: int64, numbers of its sequences in the trace.
        logits: for each sequence, fp [S, V] in the model's dtype.
    """

    sequences: Ints
    logits: list[Tensor]


def replay(model: nn.Module, trace: Trace, *, any_model: bool = False) -> Iterator[Replayed]:
    """Run the trace's texts again, in the batches it was recorded in, with its routing.

    The model that it was recorded from gives the same logits to the last bit, where the machine,
    the threads and the kernels are the same and weights have at most fp32's precision. Padding
    keeps the model's own choice. Assignments dropped over capacity are dropped again.

    Args:
        model: what to run.
        trace: what to force on it.
        any_model: allow a different model, with the same number of mixtures and experts.

    Raises:
        DataError: the trace is of a different model, shape or vocabulary.
        MoestroError: the model has no mixture, or one that cannot be recorded.
    """
    reader = _reader(model, trace, any_model)
    for part in _parts(trace):
        yield Replayed(part.sequences, part.run(reader, part.forcing(reader.in_order)))


def agreement(model: nn.Module, trace: Trace, *, any_model: bool = False) -> NDArray[np.float64]:
    """For each mixture, the share of tokens for which a model chooses the recorded experts itself.

    The recorded routing is forced meanwhile, so that each mixture sees what it saw in the trace
    and differences do not add up from layer to layer. The order of a token's experts and their
    weights do not matter.

    Raises:
        DataError, MoestroError: see `replay`.
    """
    reader = _reader(model, trace, any_model)
    same_L = np.zeros(len(trace.subject.moe_layers))
    for part in _parts(trace):
        part.run(reader, part.counting(part.forcing(reader.in_order), same_L))
    return same_L / len(trace.tokens_T)


class _TraceBatch(NamedTuple):
    """One batch of a trace.

    Attributes:
        trace: of its sequences alone.
        sequences: their numbers in the whole trace.
        batch: their tokens, padded as they were.
        real_T: int64, the rows of the padded batch that are tokens.
    """

    trace: Trace
    sequences: Ints
    batch: Batch
    real_T: Tensor

    def run(self, reader: Reader, edit: Edit) -> list[Tensor]:
        """Logits of each sequence with the routing that `edit` gives."""
        with reader.evaluating(), rerouted(reader.model, edit):
            logits_BSV = reader.logits(self.batch)
        lengths = self.batch.length_B.tolist()
        return [logits_SV[:length] for logits_SV, length in zip(logits_BSV, lengths, strict=True)]

    def forcing(self, in_order: bool) -> Edit:
        """Give every mixture its recorded choice: in the recorded order, or the model's own.

        A sum depends on its order, and that of a token's experts is not always recorded.
        """

        def edit(place: int, experts_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
            forced_TK, forced_weights_TK = self._forced(place, experts_TK, weights_TK, drop=True)
            if in_order or forced_TK.shape != experts_TK.shape:
                return forced_TK, forced_weights_TK
            equal_TKK = experts_TK[:, :, None] == forced_TK[:, None, :]
            same_T1 = (equal_TKK.sum(-1) == 1).all(-1, keepdim=True)
            from_TK = equal_TKK.int().argmax(-1)
            return (
                torch.where(same_T1, experts_TK, forced_TK),
                torch.where(same_T1, forced_weights_TK.gather(1, from_TK), forced_weights_TK),
            )

        return edit

    def counting(self, force: Edit, same_L: NDArray[np.float64]) -> Edit:
        """As `force`; adds up tokens whose own experts are the recorded ones."""

        def edit(place: int, experts_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
            recorded_TK, _ = self._forced(place, experts_TK, weights_TK, drop=False)
            width = max(experts_TK.shape[1], recorded_TK.shape[1])
            own_TK, recorded_TK = (
                _widened(each, width, self.trace.subject.num_experts).sort(1).values
                for each in (experts_TK, recorded_TK)
            )
            same_T = (own_TK == recorded_TK).all(1)
            same_L[place] += int(same_T[self.real_T.to(same_T.device)].sum())
            return force(place, experts_TK, weights_TK)

        return edit

    def _forced(
        self, place: int, experts_TK: Tensor, weights_TK: Tensor, drop: bool
    ) -> tuple[Tensor, Tensor]:
        """The recorded choice of one mixture for all rows, padding with the model's own."""
        one, empty = self.trace, self.trace.subject.num_experts
        recorded_TK = torch.from_numpy(one.experts_TLK[:, place].astype(np.int64))
        # Other batches and layers may have more experts a token: cut what is empty throughout.
        width = max(1, int((recorded_TK < empty).any(0).sum()))
        if drop and one.kept_TLK is not None:
            recorded_TK[torch.from_numpy(~one.kept_TLK[:, place])] = empty
        real_T = self.real_T.to(experts_TK.device)
        new_TK = _widened(experts_TK, width, empty)[:, :width].clone()
        new_weights_TK = _widened(weights_TK, width, 0)[:, :width].clone()
        new_TK[real_T] = recorded_TK[:, :width].to(new_TK)
        recorded_weights_TK = torch.from_numpy(one.weights_TLK[:, place, :width])
        new_weights_TK[real_T] = recorded_weights_TK.to(new_weights_TK)
        return new_TK, new_weights_TK


def _parts(trace: Trace) -> Iterator[_TraceBatch]:
    """The batches of a trace, in order."""
    for number in np.unique(trace.batch_N):
        chosen_N = trace.batch_N == number
        one = trace.choose(chosen_N)
        tokens = torch.split(torch.from_numpy(one.tokens_T).long(), one.length_N.tolist())
        batch = pad(tuple(Reading(each, "", "", len(each)) for each in tokens))
        real_T = torch.arange(batch.tokens_BS.numel(), device="cpu")
        if batch.valid_BS is not None:
            real_T = real_T[batch.valid_BS.flatten()]
        yield _TraceBatch(one, np.flatnonzero(chosen_N), batch, real_T)


def _reader(model: nn.Module, trace: Trace, any_model: bool) -> Reader:
    """How to read the model, once it is known that the trace fits it."""
    reader, subject = reader_of(model), trace.subject
    shape = len(reader.mixtures), max(mixture.num_experts for mixture in reader.mixtures)
    recorded = len(subject.moe_layers), subject.num_experts
    if shape != recorded:
        raise DataError(
            f"this trace is of {subject.name}: {recorded[0]} mixtures of {recorded[1]} experts; "
            f"the model has {shape[0]} of {shape[1]}. Give the model that it was recorded from"
        )
    if not any_model and fingerprint(model) != subject.fingerprint:
        raise DataError(
            f"this trace is of {subject.name}, and this model's weights differ; give the "
            "checkpoint that it was recorded from, or any_model=True to force it on this one"
        )
    if len(trace.tokens_T) and int(trace.tokens_T.max()) >= reader.vocab_size:
        raise DataError(
            f"this trace has token {int(trace.tokens_T.max())}; the model's vocabulary is 0 to "
            f"{reader.vocab_size - 1}. Give a model with the tokenizer that it was recorded with"
        )
    return reader


def _widened(values_TK: Tensor, width: int, fill: float) -> Tensor:
    """At least so many columns."""
    return F.pad(values_TK, (0, max(0, width - values_TK.shape[1])), value=fill)
