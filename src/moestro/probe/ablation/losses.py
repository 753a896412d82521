"""A model's loss on every token of some text, as it is and changed, over the same batches.

Letters beside those of docs/shapes.md: M domains, P documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from math import log
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from moestro.errors import DataError, MoestroError
from moestro.probe.ablation.targets import Target
from moestro.probe.ablation.verdicts import Predicted, by_domain
from moestro.probe.measures.bootstrap import Floats, Ints
from moestro.probe.recording.choices import LayerRecord
from moestro.probe.recording.passages import (
    Batch,
    Encodes,
    Passage,
    Reading,
    in_batches,
    pad,
    prepare,
)
from moestro.probe.recording.reader import reader_of
from moestro.probe.recording.record import Progress
from moestro.probe.recording.reroute import Edit, rerouted
from moestro.probe.recording.traces import fingerprint, place_of


class Run:
    """A model and its batches, to be run without and with changes.

    Attributes:
        layers: layer number of each mixture.
        domains: the M labels.
        text: the tokens that have a loss: all but the first of each sequence.
        used_PE: assignments of each document to each expert, of the layers counted so far.
        top_k: K of these.
        done: forward passes so far.
        total: forward passes in all, for the display of progress.
    """

    def __init__(
        self,
        model: nn.Module,
        texts: Iterable[Passage | str],
        tokenizer: Encodes | None,
        batch_size: int,
        token_bytes: Callable[[int], int] | None,
        draws: int,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self._reader, self._fingerprint = reader_of(model), fingerprint(model)
        readings = predicting(texts, tokenizer)
        self._reader.check(readings)
        if not self._reader.has_head:
            raise MoestroError(
                f"{type(model).__name__} has no head that predicts tokens, so it has no loss; give "
                "the causal language model (…ForCausalLM)"
            )
        self.batches = in_batches(readings, batch_size)
        self.domains = tuple(dict.fromkeys(reading.domain for reading in readings))
        documents = dict.fromkeys(reading.document for reading in readings)
        self._number = {document: number for number, document in enumerate(documents)}
        self._token_bytes, self._progress = token_bytes, progress
        self.text = self._predicted(draws, seed)
        self.layers = tuple(mixture.layer for mixture in self._reader.mixtures)
        self.used_PE: dict[int, Ints] = {}
        self.done = self.total = self.top_k = 0

    def _predicted(self, draws: int, seed: int) -> Predicted:
        readings = [reading for batch in self.batches for reading in batch]
        domain_P = np.zeros(len(self._number), dtype=np.int64)
        for reading in readings:
            domain_P[self._number[reading.document]] = self.domains.index(reading.domain)
        inputs = torch.cat([reading.tokens_S[:-1] for reading in readings]).numpy()
        wanted = torch.cat([reading.tokens_S[1:] for reading in readings]).numpy()
        names, target_T = np.unique(wanted, return_inverse=True)
        size_T = np.ones(len(wanted))
        if self._token_bytes is not None:
            size_T = np.array([float(self._token_bytes(int(name))) for name in names])[target_T]
        return Predicted(
            domain_P=domain_P,
            document_T=np.repeat(
                [self._number[reading.document] for reading in readings],
                [len(reading.tokens_S) - 1 for reading in readings],
            ),
            input_T=np.unique(inputs, return_inverse=True)[1],
            target_T=target_T,
            size_T=size_T,
            draws=draws,
            seed=seed,
        )

    def facts(self) -> dict[str, Any]:
        """What every result says of the model, its text and the work."""
        text, number = self.text, len(self.domains)
        return {
            "fingerprint": self._fingerprint,
            "unit": "bits per byte" if self._token_bytes else "bits per token",
            "domains": self.domains,
            "tokens_M": np.bincount(text.domain_P[text.document_T], minlength=number),
            "documents_M": np.bincount(text.domain_P, minlength=number),
            "passes": self.done,
        }

    def bytes_M(self) -> Ints | None:
        """Bytes of each domain's predicted tokens, where they are known."""
        if self._token_bytes is None:
            return None
        domain_T = self.text.domain_P[self.text.document_T]
        total_M = np.bincount(domain_T, self.text.size_T, minlength=len(self.domains))
        return total_M.astype(np.int64)

    def by_domain(self, change_T: NDArray[Any]) -> tuple[Floats, Floats]:
        """A number of each token by domain, in the unit of losses, and its interval."""
        change_P = self.text.sums(change_T.astype(np.float64))
        return by_domain(self.text, change_P, len(self.domains))

    def check(self, target: Target) -> None:
        """Refuse an expert or a domain that does not exist.

        Raises:
            MoestroError: the layer or the expert.
            DataError: the domain.
        """
        experts = self._reader.mixtures[place_of(target.layer, self.layers)].num_experts
        for expert in (target.expert, target.other):
            if expert is not None and not 0 <= expert < experts:
                raise MoestroError(
                    f"expert {expert} of layer {target.layer} does not exist; choose one of 0 to "
                    f"{experts - 1}"
                )
        if target.domain not in self.domains:
            raise DataError(
                f"expert {target.expert} of layer {target.layer} is to be tested on the domain "
                f"{target.domain!r}, of which there is no held-out text; there is of "
                f"{', '.join(self.domains)}"
            )

    def losses(self, edit: Edit | None = None, counted: Iterable[int] = ()) -> NDArray[np.float32]:
        """Loss of every predicted token, bits, fp32 [T], as the model is or changed.

        Args:
            edit: see `moestro.probe.rerouted`; None leaves the model as it is.
            counted: layers whose assignments are then counted by document, in `used_PE`.

        Raises:
            MoestroError: experts choose the tokens, or a loss is not finite.
        """
        parts: list[NDArray[np.float32]] = []
        changed = nullcontext() if edit is None else rerouted(self._reader.model, edit)
        with self._reader.evaluating(), changed:
            for readings in self.batches:
                batch = pad(readings)
                if edit is None:
                    logits_BSV, layers = self._reader.record(batch)
                    self._count(layers, batch, counted)
                else:
                    logits_BSV = self._reader.logits(batch)
                parts += [_bits(*each) for each in zip(logits_BSV, readings, strict=True)]
                self.done += 1
                if self._progress is not None:
                    self._progress(self.done, self.total)
        losses_T = np.concatenate(parts)
        if not np.isfinite(losses_T).all():
            raise MoestroError(
                f"the model's loss is not finite on {(~np.isfinite(losses_T)).sum()} of "
                f"{len(losses_T)} tokens; check its weights and dtype"
            )
        return losses_T

    def _count(self, layers: list[LayerRecord], batch: Batch, counted: Iterable[int]) -> None:
        """Add up who handled the tokens that have a loss, by document."""
        document_BS = torch.full_like(batch.tokens_BS, -1)
        for row_S, reading in zip(document_BS, batch.readings, strict=True):
            row_S[: len(reading.tokens_S) - 1] = self._number[reading.document]
        document_T = document_BS.flatten().numpy()
        for layer in set(counted):
            choice = layers[self.layers.index(layer)].choice
            if not choice.top_k:
                raise MoestroError(
                    "experts choose the tokens in this model (expert choice), so taking one away "
                    "changes who is chosen elsewhere; give a model whose tokens choose"
                )
            self.top_k = max(self.top_k, choice.top_k)
            width = choice.num_experts + 1  # the last marks an empty place
            cell_TK = document_T[:, None] * width + choice.experts_TK.cpu().numpy()
            used = np.bincount(
                cell_TK[document_T >= 0].ravel(), minlength=len(self._number) * width
            ).reshape(-1, width)[:, :-1]
            self.used_PE[layer] = self.used_PE.get(layer, np.zeros_like(used)) + used


def _bits(logits_SV: Tensor, reading: Reading) -> NDArray[np.float32]:
    """Loss of each token after the first, bits; one sequence at a time bounds the memory."""
    last = len(reading.tokens_S) - 1
    target_S = reading.tokens_S[1:].to(logits_SV.device)
    nats_S = F.cross_entropy(logits_SV[:last].float(), target_S, reduction="none")
    bits_S: NDArray[np.float32] = (nats_S / log(2)).float().cpu().numpy()
    return bits_S


def predicting(texts: Iterable[Passage | str], tokenizer: Encodes | None) -> list[Reading]:
    """The texts that predict anything.

    Raises:
        DataError: there is none.
    """
    readings = [each for each in prepare(texts, tokenizer) if len(each.tokens_S) > 1]
    if not readings:
        raise DataError("every text has a single token, which predicts nothing; give longer ones")
    return readings
