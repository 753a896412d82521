"""Record what the routers of a model decide on text: own models and those of transformers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from moestro.errors import DataError, MoestroError
from moestro.foreign.taps import Tap, taps
from moestro.models.decoder import Decoder
from moestro.models.encdec import EncDec
from moestro.probe.recording import foreign
from moestro.probe.recording.choices import Kept, choice_of, keep, trace_of
from moestro.probe.recording.continuation import continued
from moestro.probe.recording.passages import (
    Batch,
    Encodes,
    Passage,
    Reading,
    in_batches,
    pad,
    prepare,
)
from moestro.probe.recording.traces import Subject, Trace, fingerprint, join

Progress = Callable[[int, int], None]


def record(
    model: nn.Module,
    texts: Iterable[Passage | str],
    *,
    tokenizer: Encodes | None = None,
    name: str = "",
    batch_size: int = 16,
    generate: int = 0,
    distributed: bool = False,
    progress: Progress | None = None,
) -> Trace:
    """Run the model over texts and keep which experts each token went to, with what weights.

    The experts are those that the model used, never chosen anew from its logits. Padding never
    counts. The model runs in evaluation mode without gradients and gets its modes back.

    Memory grows with the trace: L · K small integers and floats a token. For text that this is too
    much for, `record_batches` gives it batch by batch.

    Args:
        model: a `Decoder`, or a causal language model of transformers.
        texts: what it reads. Strings need a `tokenizer`; their domain is "text".
        tokenizer: turns strings into ids; where it knows which tokens end a text (`ends`), an own
            model's generation stops there.
        name: what to call the model; default: its own name, or its class.
        batch_size: sequences of a forward pass. Batches mix the domains evenly.
        generate: most tokens that the model writes after each text, each the most likely one. They
            are marked in `generated_T`. What is recorded is one pass over text and continuation
            together, so that a replay needs no cache.
        distributed: share the batches among the ranks of torch.distributed; each returns the
            trace of all, the same as one process would.
        progress: called after each batch with (tokens read, tokens in all).

    Raises:
        MoestroError: the model has no mixture, or one that cannot be looked into; a string comes
            without a tokenizer.
        DataError: there is no text, an empty one, a token outside the vocabulary, a text longer
            than the model's context, or a model on the meta device.
    """
    return join(
        list(
            record_batches(
                model,
                texts,
                tokenizer=tokenizer,
                name=name,
                batch_size=batch_size,
                generate=generate,
                distributed=distributed,
                progress=progress,
            )
        )
    )


def record_batches(
    model: nn.Module,
    texts: Iterable[Passage | str],
    *,
    tokenizer: Encodes | None = None,
    name: str = "",
    batch_size: int = 16,
    generate: int = 0,
    distributed: bool = False,
    progress: Progress | None = None,
) -> Iterator[Trace]:
    """As `record`, one Trace for each forward pass, so that no more than that is ever held."""
    found = mixtures(model)
    print_of = fingerprint(model)
    readings = prepare(texts, tokenizer)
    check_tokens(model, readings, generate)
    batches = in_batches(readings, batch_size)
    domains = tuple(dict.fromkeys(reading.domain for reading in readings))
    rank, world = _place(distributed)
    total, done = sum(len(reading.tokens_S) for reading in readings), 0
    ends: Collection[int] = getattr(tokenizer, "ends", ())

    def read(number: int) -> Trace:
        with evaluating(model) as device:
            batch = pad(continued(model, batches[number], generate, ends, device))
            layers = look(model, found, batch, device).layers
        subject = _subject(model, found, name, print_of, layers)
        return trace_of(layers, batch, subject, domains, number)

    for first in range(0, len(batches), world):
        # A rank without a batch of its own reads one again: sharded models need all ranks.
        mine = min(first + rank, len(batches) - 1)
        traces: list[Trace | None] = [read(mine)]
        if world > 1:
            own, traces = traces[0], [None] * world
            dist.all_gather_object(traces, own if first + rank < len(batches) else None)
        for trace in traces:
            if trace is None:
                continue
            done += int((~trace.generated_T).sum())
            if progress is not None:
                progress(done, total)
            yield trace


class Looked(NamedTuple):
    """What one forward pass gave: logits [B, S, V], and each mixture's choices."""

    logits_BSV: torch.Tensor
    layers: list[Kept]


def look(model: nn.Module, found: list[Tap], batch: Batch, device: torch.device) -> Looked:
    """One forward pass over a batch, with what its mixtures decided; `found` from `mixtures`."""
    tokens_BS = batch.tokens_BS.to(device)
    valid_BS = None if batch.valid_BS is None else batch.valid_BS.to(device)
    if isinstance(model, Decoder):
        output = model(tokens_BS, valid_BS=valid_BS)
        return Looked(output.logits, [keep(choice_of(each), batch) for each in output.routings])
    return Looked(
        *foreign.look(model, found, tokens_BS, valid_BS, lambda choice: keep(choice, batch))
    )


def mixtures(model: nn.Module) -> list[Tap]:
    """Where to look into a model of transformers; nothing is needed for an own one.

    Raises:
        MoestroError: it has no mixtures, or some that cannot be looked into; says which.
    """
    if isinstance(model, EncDec):
        raise MoestroError(
            "this model is an encoder-decoder; traces are of decoders, which read one text from "
            "left to right. Give a decoder"
        )
    if not isinstance(model, Decoder):
        return taps(model)
    if not model.moe_layers:
        raise MoestroError(
            "this model has no mixture layer (a dense model), so there is no routing to look at; "
            "give a model whose settings have model.moe"
        )
    return []


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Run in eval mode without gradients; give the model's device; restore its modes after."""
    modes = [(module, module.training) for module in model.modules()]
    parameter = next(model.parameters(), None)
    model.eval()
    # Models of transformers keep tensors that they make on the way (rotary tables of a length);
    # made in inference mode, they would break later training.
    without = torch.inference_mode() if isinstance(model, Decoder) else torch.no_grad()
    try:
        with without:
            yield torch.device("cpu") if parameter is None else parameter.device
    finally:
        for module, training in modes:
            module.training = training


def _subject(
    model: nn.Module, found: list[Tap], name: str, print_of: str, layers: list[Kept]
) -> Subject:
    own = getattr(model, "name_or_path", "")
    varying = any(layer.top_k == 0 for layer in layers)
    numbers = tuple(tap.layer for tap in found)
    return Subject(
        name=name or (own if isinstance(own, str) and own else type(model).__name__),
        fingerprint=print_of,
        moe_layers=model.moe_layers if isinstance(model, Decoder) else numbers,
        num_experts=max(layer.num_experts for layer in layers),
        top_k=0 if varying else max(layer.top_k for layer in layers),
    )


def check_tokens(model: nn.Module, readings: list[Reading], generate: int = 0) -> None:
    """Refuse tokens that the model does not know, and texts longer than it can read.

    Raises:
        MoestroError: `generate` is below 0.
        DataError: names the text.
    """
    if generate < 0:
        raise MoestroError(f"generate is {generate}; give 0 or more tokens")
    size, context = vocabulary(model), None
    if not isinstance(model, Decoder):
        context = foreign.context(model)
    for place, reading in enumerate(readings):
        low, high = int(reading.tokens_S.min()), int(reading.tokens_S.max())
        if low < 0 or high >= size:
            raise DataError(
                f"text {place} ({reading.document}) has token {low if low < 0 else high}; the "
                f"model's vocabulary is 0 to {size - 1}. Leave the text out, or use the tokenizer "
                "that the model was trained with"
            )
        length = len(reading.tokens_S) + generate
        if context is not None and length > context:
            raise DataError(
                f"text {place} ({reading.document}) has {length} tokens with what is to be "
                f"generated; the model's context is {context}. Cut it (moestro.probe.cut)"
            )


def vocabulary(model: nn.Module) -> int:
    """The number of token ids that a model knows."""
    return model.cfg.vocab_size if isinstance(model, Decoder) else foreign.vocabulary(model)


def _place(distributed: bool) -> tuple[int, int]:
    """This process's number and how many share the work."""
    if not distributed:
        return 0, 1
    if not (dist.is_available() and dist.is_initialized()):
        raise MoestroError(
            "distributed=True needs torch.distributed to be set up; start with torchrun and call "
            "init_process_group, or leave it off"
        )
    return dist.get_rank(), dist.get_world_size()
