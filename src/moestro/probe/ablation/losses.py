"""A model's loss on every token of some text, as it is and changed, over the same batches.

Letters beside those of docs/shapes.md: M domains, P documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import log
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from moestro.errors import DataError, MoestroError
from moestro.foreign.taps import Tap
from moestro.models.decoder import Decoder
from moestro.probe.ablation.targets import Target
from moestro.probe.ablation.verdicts import Predicted
from moestro.probe.measures.bootstrap import Ints
from moestro.probe.recording import foreign
from moestro.probe.recording.passages import (
    Batch,
    Encodes,
    Passage,
    Reading,
    in_batches,
    pad,
    prepare,
)
from moestro.probe.recording.record import (
    Looked,
    Progress,
    check_tokens,
    evaluating,
    look,
    mixtures,
)
from moestro.probe.recording.reroute import Edit, rerouted
from moestro.probe.recording.traces import fingerprint


class Run:
    """A model and its batches, to be run without and with changes; counts the passes."""

    def __init__(
        self,
        model: nn.Module,
        texts: Iterable[Passage | str],
        tokenizer: Encodes | None,
        batch_size: int,
        token_bytes: Callable[[int], int] | None,
        progress: Progress | None,
    ) -> None:
        self.model, self.found = model, mixtures(model)
        self.fingerprint = fingerprint(model)
        readings = predicting(texts, tokenizer)
        check_tokens(model, readings, 0)
        self.batches = in_batches(readings, batch_size)
        self.ordered = [reading for batch in self.batches for reading in batch]
        self.domains = tuple(dict.fromkeys(reading.domain for reading in readings))
        documents = tuple(dict.fromkeys(reading.document for reading in readings))
        self.number = {document: place for place, document in enumerate(documents)}
        self.token_bytes = token_bytes
        self.unit = "bits per byte" if token_bytes else "bits per token"
        self.layers, self.num_experts = _sizes(model, self.found)
        self.used_PE: dict[int, Ints] = {}
        self.progress, self.done, self.total, self.top_k = progress, 0, 0, 0

    def predicted(self, draws: int, seed: int) -> Predicted:
        """The tokens that have a loss: all but the first of each sequence."""
        domain_P = np.zeros(len(self.number), dtype=np.int64)
        for reading in self.ordered:
            domain_P[self.number[reading.document]] = self.domains.index(reading.domain)
        inputs = torch.cat([reading.tokens_S[:-1] for reading in self.ordered]).numpy()
        wanted = torch.cat([reading.tokens_S[1:] for reading in self.ordered]).numpy()
        names, target_T = np.unique(wanted, return_inverse=True)
        size_T = np.ones(len(wanted))
        if self.token_bytes is not None:
            size_T = np.array([float(self.token_bytes(int(name))) for name in names])[target_T]
        return Predicted(
            domain_P=domain_P,
            document_T=np.repeat(
                [self.number[reading.document] for reading in self.ordered],
                [len(reading.tokens_S) - 1 for reading in self.ordered],
            ),
            input_T=np.unique(inputs, return_inverse=True)[1],
            target_T=target_T,
            size_T=size_T,
            draws=draws,
            seed=seed,
        )

    def bytes_M(self, text: Predicted) -> Ints | None:
        """Bytes of each domain's predicted tokens, where they are known."""
        if self.token_bytes is None:
            return None
        domain_T = text.domain_P[text.document_T]
        total_M = np.bincount(domain_T, text.size_T, minlength=len(self.domains))
        return total_M.astype(np.int64)

    def place(self, layer: int) -> int:
        """Which of the mixtures is that of a layer.

        Raises:
            MoestroError: the layer has none.
        """
        if layer not in self.layers:
            known = ", ".join(map(str, self.layers))
            raise MoestroError(f"layer {layer} is not a mixture layer; choose one of {known}")
        return self.layers.index(layer)

    def check(self, target: Target) -> None:
        """Refuse an expert or a domain that does not exist.

        Raises:
            MoestroError: the layer or the expert.
            DataError: the domain.
        """
        experts = self.num_experts[self.place(target.layer)]
        for expert in (target.expert, target.expert if target.other is None else target.other):
            if not 0 <= expert < experts:
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

    def losses(self, edit: Edit | None, counted: Iterable[int] = ()) -> NDArray[np.float32]:
        """Loss of every predicted token, bits, fp32 [T], as the model is or changed.

        Args:
            edit: see `moestro.probe.rerouted`; None leaves the model as it is.
            counted: layers whose assignments are then counted by document, in `used_PE`.

        Raises:
            MoestroError: experts choose the tokens, or a loss is not finite.
        """
        parts: list[NDArray[np.float32]] = []
        with evaluating(self.model) as device:
            for readings in self.batches:
                batch = pad(readings)
                if edit is None:
                    looked = look(self.model, self.found, batch, device)
                    self._count(looked, batch, counted)
                    logits_BSV = looked.logits_BSV
                else:
                    with rerouted(self.model, edit):
                        logits_BSV = _logits(self.model, batch, device)
                parts += [_bits(*each) for each in zip(logits_BSV, readings, strict=True)]
                self.done += 1
                if self.progress is not None:
                    self.progress(self.done, self.total)
        losses_T = np.concatenate(parts)
        if not np.isfinite(losses_T).all():
            raise MoestroError(
                f"the model's loss is not finite on {(~np.isfinite(losses_T)).sum()} of "
                f"{len(losses_T)} tokens; check its weights and dtype"
            )
        return losses_T

    def _count(self, looked: Looked, batch: Batch, counted: Iterable[int]) -> None:
        """Add up who handled the tokens that have a loss, by document."""
        document_BS = torch.full_like(batch.tokens_BS, -1)
        for row_S, reading in zip(document_BS, batch.readings, strict=True):
            row_S[: len(reading.tokens_S) - 1] = self.number[reading.document]
        document_T = document_BS.flatten().numpy()
        for layer in set(counted):
            kept = looked.layers[self.layers.index(layer)]
            if not kept.top_k:
                raise MoestroError(
                    "experts choose the tokens in this model (expert choice), so taking one away "
                    "changes who is chosen elsewhere; give a model whose tokens choose"
                )
            self.top_k = max(self.top_k, kept.top_k)
            width = kept.num_experts + 1  # the last marks an empty place
            cell_TK = document_T[:, None] * width + kept.experts_TK.cpu().numpy()
            used = np.bincount(
                cell_TK[document_T >= 0].ravel(), minlength=len(self.number) * width
            ).reshape(-1, width)[:, :-1]
            self.used_PE[layer] = self.used_PE.get(layer, np.zeros_like(used)) + used


def _logits(model: Any, batch: Batch, device: torch.device) -> Tensor:
    tokens_BS = batch.tokens_BS.to(device)
    valid_BS = None if batch.valid_BS is None else batch.valid_BS.to(device)
    if isinstance(model, Decoder):
        logits_BSV: Tensor = model(tokens_BS, valid_BS=valid_BS).logits
        return logits_BSV
    return foreign.run(model, tokens_BS, valid_BS)


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


def _sizes(model: nn.Module, found: list[Tap]) -> tuple[tuple[int, ...], list[int]]:
    """Layer number and number of experts of each mixture.

    Raises:
        MoestroError: the model has no head.
    """
    if isinstance(model, Decoder):
        assert model.cfg.moe is not None
        return tuple(model.moe_layers), [model.cfg.moe.num_experts] * len(model.moe_layers)
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise MoestroError(
            f"{type(model).__name__} has no head that predicts tokens, so it has no loss; give the "
            "causal language model (…ForCausalLM)"
        )
    return tuple(tap.layer for tap in found), [tap.num_experts for tap in found]
