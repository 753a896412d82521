"""Everything that is said about one model, as values ready for JSON."""

from __future__ import annotations

from typing import Any, NamedTuple

from moestro.config import CacheKind, ParallelConfig
from moestro.models.count import Embeddings
from moestro.plan.activations import activation_bytes
from moestro.plan.bounds import Bound, bound
from moestro.plan.devices import Device
from moestro.plan.fit import Fit, fit
from moestro.plan.memory import (
    Training,
    cache_bytes,
    dtypes,
    number_bytes,
    state_bytes,
    weights,
)
from moestro.plan.parallel import SPREAD, Rank, Step, rank, spread
from moestro.plan.subject import RUMOUR, PlannedModel, dense_models
from moestro.plan.work import decode, prefill

USUAL_CONTEXT = 4096


class Question(NamedTuple):
    """What to plan for."""

    context: int | None = None  # None: 4096, or the model's context where that is less
    batch: int = 1  # sequences per batch, on each device
    dtype: str = "bf16"  # of the weights in use, one of `DTYPES`; training keeps fp32 weights
    cache: CacheKind = "as-is"  # how keys and values are kept
    embeddings: Embeddings = "all"  # which the parameters count; see `Count.parameters`
    device: Device | None = None  # to bound the speed on; None leaves speed out
    usd_per_hour: float | None = None  # price of that device
    memory_bytes: int | None = None  # to fit into; None takes the device's, if there is one
    ranks: int = 1  # that train together
    parallel: str = "data"  # how, one of `parallel.KINDS` or "spread"
    spread: ParallelConfig = ParallelConfig()  # how, where it is "spread"
    step: Step = Step()  # how its steps go


class Report(NamedTuple):
    """One model's cost; None where its settings are not known or nothing was asked."""

    name: str
    rumour: str | None  # "RUMOUR" where nothing about it was ever confirmed
    source: str
    note: str
    context: int  # tokens of each sequence, at most what the model can see
    total: int  # parameters under the convention asked for
    active: int
    forward_flops: float  # per token, the mean over a sequence
    train_flops: float  # forward and backward
    weights_bytes: dict[str, int]  # by dtype
    cache_bytes: int | None  # of all sequences together
    training: Training  # a step on one device
    rank: Rank | None  # one rank of several; None for one alone
    prefill: Bound | None  # on reading prompts
    decode: Bound | None  # on writing
    fit: Fit | None
    dense: tuple[Report, ...]  # of equal cost and of equal size; empty for a dense model

    @property
    def title(self) -> str:
        """The name, with a mark on a rumour."""
        return f"{self.name} ({self.rumour})" if self.rumour else self.name


def report(subject: PlannedModel, question: Question, with_dense: bool = True) -> Report:
    """Answer a question about one model.

    Args:
        subject: the model.
        question: what to plan for.
        with_dense: answer it for the dense models of equal cost and equal size as well.

    Raises:
        ConfigError: the ranks do not suit the model.
    """
    cfg, counted = subject.cfg, subject.count
    context = context_of(subject, question.context)
    batch, dtype = question.batch, question.dtype
    sizes = (context, batch, dtype)
    total, active = counted.parameters(question.embeddings)
    training, shared = training_step(subject, *sizes), None
    if question.ranks > 1:
        tokens, number = context * batch, number_bytes(dtype)
        if question.parallel != SPREAD:
            kind, ranks = question.parallel, question.ranks
            shared = rank(cfg, counted, training, kind, ranks, tokens, number)
        elif cfg is not None:
            how = question.spread
            if cfg.moe is None:  # a dense model, compared with the mixture
                how = how.model_copy(update={"expert": 1})
            layout = how.layout(question.ranks, cfg.moe.num_experts if cfg.moe else None)
            shared = spread(cfg, counted, training, layout, tokens, number, question.step)
    reading = writing = fitting = None
    if question.device is not None and cfg is not None:
        works = (prefill(cfg, *sizes), decode(cfg, *sizes, question.cache))
        reading, writing = (bound(one, question.device, question.usd_per_hour) for one in works)
    memory = question.memory_bytes or (question.device and question.device.memory_bytes)
    if memory:
        fitting = fit(cfg, counted, training, context, batch, dtype, memory, question.cache)
    dense = dense_models(subject) if with_dense else []
    return Report(
        name=subject.name,
        rumour=RUMOUR if subject.rumour else None,
        source=subject.source,
        note=_note(subject, question, context, ranks_left_out=question.ranks > 1 and not shared),
        context=context,
        total=total,
        active=active,
        forward_flops=counted.forward_flops(context),
        train_flops=counted.train_flops(context),
        weights_bytes={name: weights(counted, name, cfg).total for name in dtypes(counted, dtype)},
        cache_bytes=None if cfg is None else cache_bytes(cfg, *sizes, question.cache),
        training=training,
        rank=shared,
        prefill=reading,
        decode=writing,
        fit=fitting,
        dense=tuple(report(model, question, with_dense=False) for model in dense),
    )


def _note(subject: PlannedModel, question: Question, context: int, ranks_left_out: bool) -> str:
    """The model's own note, and what differs from the question."""
    notes = [subject.note] if subject.note else []
    if question.context is not None and context < question.context:
        notes.append(f"Planned for {context:,} tokens, the most that it looks back on.")
    if ranks_left_out:
        why = "With counts alone" if subject.cfg is None else "Without experts to split"
        notes.append(f"{why}, what its ranks hold and send is left out.")
    return " ".join(notes)


def context_of(subject: PlannedModel, asked: int | None) -> int:
    """Tokens of a sequence: what was asked for, and no more than a decoder looks back on."""
    if subject.cfg is None:
        return asked or USUAL_CONTEXT
    longest = subject.cfg.attention.context
    if asked is not None and subject.cfg.has_encoder:
        return asked
    return min(asked or USUAL_CONTEXT, longest)


def training_step(subject: PlannedModel, context: int, batch: int, dtype: str) -> Training:
    """Bytes of a training step on one device; see docs/planning.md."""

    def kept(checkpointed: bool) -> int | None:
        if subject.cfg is None:
            return None
        return activation_bytes(subject.cfg, context, batch, number_bytes(dtype), checkpointed)

    return Training(
        **state_bytes(subject.count.total), activations=kept(False), checkpointed=kept(True)
    )


def as_json(question: Question, reports: list[Report]) -> dict[str, Any]:
    """The question and the answers as one JSON object; sizes in bytes."""
    return {"question": _plain(question), "models": [_plain(answer) for answer in reports]}


def _plain(value: Any) -> Any:
    """Named tuples as objects, all the way down."""
    if isinstance(value, ParallelConfig):
        return value.model_dump(mode="json")
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
