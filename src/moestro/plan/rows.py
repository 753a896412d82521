"""Reports side by side as rows of text, for a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from moestro.plan.bounds import Bound
from moestro.plan.memory import DTYPES
from moestro.plan.parallel import SPREAD, Rank
from moestro.plan.report import Question, Report
from moestro.plan.sizes import bytes_text, flops_text, number_text, parameters_text

UNKNOWN = "–"

CONVENTIONS = {
    "all": "",
    "output": ", no input embedding",
    "none": ", non-embedding",
}


class Line(NamedTuple):
    """A label and one cell for each model; without cells it is the title of a section."""

    label: str
    cells: tuple[str, ...] = ()


def rows(reports: Sequence[Report], question: Question) -> list[Line]:
    """Everything that was asked, in sections."""

    def row(label: str, say: Callable[[Report], str]) -> Line:
        return Line(label, tuple(map(say, reports)))

    convention = CONVENTIONS[question.embeddings]
    found = [
        Line(f"parameters{convention}"),
        row("in all", lambda r: parameters_text(r.total)),
        row("active per token", lambda r: parameters_text(r.active)),
        Line("arithmetic per token"),
        row("forward", lambda r: flops_text(r.forward_flops)),
        row("in training", lambda r: flops_text(r.train_flops)),
        Line("weights in memory"),
    ]
    for name in DTYPES:
        if any(name in r.weights_bytes for r in reports):
            found.append(row(name.replace("-", " "), _weights(name)))
    found += [
        Line(f"sequences per batch: {question.batch:,}"),
        row("tokens in each", lambda r: f"{r.context:,}"),
        row("key/value cache", lambda r: _bytes(r.cache_bytes)),
    ]
    if any(r.fit is not None for r in reports):
        found.append(row(f"fits in {question.dtype}", _fits(question.dtype)))
    found += [
        Line("training on one device"),
        row("weights, fp32", lambda r: bytes_text(r.training.weights)),
        row("gradients", lambda r: bytes_text(r.training.gradients)),
        row("optimizer", lambda r: bytes_text(r.training.optimizer)),
        row("activations", lambda r: _bytes(r.training.activations)),
        row("… checkpointed", lambda r: _bytes(r.training.checkpointed)),
        row("a checkpoint", lambda r: bytes_text(r.training.saved)),
    ]
    if question.ranks > 1:
        found += _parallel(reports, question)
    if question.device is not None:
        found += _speed(reports, question)
    return found


def _weights(dtype: str) -> Callable[[Report], str]:
    return lambda report: _bytes(report.weights_bytes.get(dtype))


def _fits(dtype: str) -> Callable[[Report], str]:
    """Whether weights and cache fit; a dense model has no experts to keep narrower than bf16."""

    def say(report: Report) -> str:
        if report.fit is None:
            return UNKNOWN
        rows = {row.dtype: row.fits for row in report.fit.rows}
        return "yes" if rows.get(dtype, rows["bf16"]) else "no"

    return say


def _bytes(amount: int | None) -> str:
    return UNKNOWN if amount is None else bytes_text(amount)


def _parallel(reports: Sequence[Report], question: Question) -> list[Line]:
    """What each rank holds and sends."""
    names = {"data": "data parallel", "fsdp": "fully sharded", "expert": "expert parallel"}
    how = question.spread
    names[SPREAD] = (
        f"experts {how.expert} ways, sharded over {'all' if how.shard == 'auto' else how.shard}"
    )

    def row(label: str, say: Callable[[Rank], str]) -> Line:
        cells = (UNKNOWN if r.rank is None else say(r.rank) for r in reports)
        return Line(label, tuple(cells))

    found = [
        Line(f"1 of {question.ranks} ranks, {names[question.parallel]}"),
        row("weights", lambda r: bytes_text(r.weights)),
        row("gradients", lambda r: bytes_text(r.gradients)),
        row("optimizer", lambda r: bytes_text(r.optimizer)),
        row("activations", lambda r: _bytes(r.activations)),
    ]
    if question.parallel in ("fsdp", SPREAD):
        found.append(row("a gathered layer", lambda r: _bytes(r.gathered)))
    found.append(row("its part of a checkpoint", lambda r: bytes_text(r.saved)))
    found.append(row("sent in a step", lambda r: bytes_text(r.sent)))
    if question.parallel in ("expert", SPREAD):
        found.append(row("… all-to-all", lambda r: bytes_text(r.all_to_all)))
        found.append(row("… for each layer", lambda r: bytes_text(r.all_to_all_per_layer)))
    return found


def _speed(reports: Sequence[Report], question: Question) -> list[Line]:
    """Bounds on tokens per second, and their price."""
    assert question.device is not None

    def row(label: str, of: str, say: Callable[[Bound], str]) -> Line:
        bounds = [getattr(r, of) for r in reports]
        return Line(label, tuple(UNKNOWN if b is None else say(b) for b in bounds))

    found = [Line(f"at most, in {question.dtype}")]
    for name in ("prefill", "decode"):
        found.append(row(f"{name}, tokens/s", name, lambda b: number_text(b.tokens_per_s)))
        found.append(row("… limited by", name, lambda b: b.limit))
        if question.usd_per_hour is not None:
            found.append(row("… per million", name, _price))
    return found


def _price(bound: Bound) -> str:
    return UNKNOWN if bound.usd_per_million is None else f"${number_text(bound.usd_per_million)}"
