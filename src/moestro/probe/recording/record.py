"""Record what the routers of a model decide on text: own models and those of transformers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from moestro.errors import MoestroError
from moestro.probe.recording.choices import LayerRecord, trace_of
from moestro.probe.recording.passages import Encodes, Passage, Reading, in_batches, pad, prepare
from moestro.probe.recording.reader import Reader, reader_of
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

    The experts are those that the model used, never recomputed from its logits. Padding never
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
        MoestroError: the model has no mixture, or one that cannot be recorded; a string comes
            without a tokenizer; `generate` or `batch_size` is too small.
        DataError: there is no text, an empty one, a token outside the vocabulary, a text longer
            than the model's context, or a model on the meta device.
    """
    parts = record_batches(
        model, texts, tokenizer=tokenizer, name=name, batch_size=batch_size, generate=generate,
        distributed=distributed, progress=progress,
    )  # fmt: skip
    return join(list(parts))


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
    reader, print_of = reader_of(model), fingerprint(model)
    readings = prepare(texts, tokenizer)
    if generate < 0:
        raise MoestroError(f"generate is {generate}; give 0 or more tokens")
    reader.check(readings, generate)
    batches = in_batches(readings, batch_size)
    domains = tuple(dict.fromkeys(reading.domain for reading in readings))
    rank, world = _place(distributed)
    total, done = sum(len(reading.tokens_S) for reading in readings), 0
    ends: Collection[int] = getattr(tokenizer, "ends", ())

    def read(number: int) -> Trace:
        with reader.evaluating():
            batch = pad(tuple(_continued(reader, each, generate, ends) for each in batches[number]))
            layers = reader.record(batch).layers
        return trace_of(layers, batch, _subject(reader, name, print_of, layers), domains, number)

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


def _continued(reader: Reader, reading: Reading, most: int, ends: Collection[int]) -> Reading:
    """A text with what the model writes after it: by itself, so that none depends on another."""
    if most == 0:
        return reading
    new_S = reader.write(reading.tokens_S[None], most, ends)
    return reading._replace(tokens_S=torch.cat([reading.tokens_S, new_S.cpu()]))


def _subject(reader: Reader, name: str, print_of: str, layers: list[LayerRecord]) -> Subject:
    own = getattr(reader.model, "name_or_path", "")
    top_ks = [layer.choice.top_k for layer in layers]
    return Subject(
        name=name or (own if isinstance(own, str) and own else type(reader.model).__name__),
        fingerprint=print_of,
        moe_layers=tuple(mixture.layer for mixture in reader.mixtures),
        num_experts=max(layer.choice.num_experts for layer in layers),
        top_k=max(top_ks) if all(top_ks) else 0,
    )


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
