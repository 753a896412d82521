"""What a trace may hold: dtypes, shapes and values of each field, checked with clear errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moestro.errors import DataError
from moestro.probe.recording.traces import Subject, Trace, smallest_dtype

# Whether something holds, and the problem where it does not.
Claim = tuple[bool | np.bool_, str]

# Rounding may bring a probability, or an entropy, so far beyond what is possible.
_SLACK = 1e-3


def dtypes(num_experts: int) -> dict[str, np.dtype[Any]]:
    """The dtype of each array of a trace, by its name; `kept_TLK` may be None."""
    long, single, flag = np.dtype(np.int64), np.dtype(np.float32), np.dtype(np.bool_)
    return {
        "domain_N": long,
        "document_N": long,
        "batch_N": long,
        "length_N": long,
        "tokens_T": np.dtype(np.int32),
        "generated_T": flag,
        "experts_TLK": smallest_dtype(num_experts),
        "weights_TLK": single,
        "kept_TLK": flag,
        "entropy_TL": single,
        "margin_TL": single,
        "probs_NLE": single,
    }


def check_subject(subject: Subject, where: str) -> None:
    """Refuse a model that cannot be.

    Raises:
        DataError: names `where` and the field.
    """
    _refuse(_subject(subject), where)


def check(trace: Trace, where: str) -> None:
    """Refuse a trace, of any origin, with a value that cannot be.

    Raises:
        DataError: begins with `where`, names the field, and says what is wrong.
    """
    for claims in (
        _subject(trace.subject), _names(trace), _shapes(trace), _sequences(trace), _tokens(trace),
    ):  # fmt: skip
        _refuse(claims, where)


def _refuse(claims: Iterator[Claim], where: str) -> None:
    """Raise on the first claim that does not hold; those after it may rely on it."""
    for holds, problem in claims:
        if not holds:
            raise DataError(f"{where}: {problem}; record the trace again")


def _subject(subject: Subject) -> Iterator[Claim]:
    name, mark, layers, num_experts, top_k = subject
    yield isinstance(name, str) and isinstance(mark, str), "name and mark must be text"
    whole = all(type(number) is int for number in (*layers, num_experts, top_k))
    yield whole, "layers, num_experts and top_k must be whole numbers"
    yield len(layers) > 0 and min(layers) >= 0, "moe_layers must be numbers from 0"
    yield 1 <= num_experts < 2**32, f"num_experts is {num_experts}, must be at least 1"
    limits = f"but must lie between 0 and num_experts, {num_experts}"
    yield 0 <= top_k <= num_experts, f"top_k is {top_k}, {limits}"


def _names(trace: Trace) -> Iterator[Claim]:
    for field, names in (("domains", trace.domains), ("documents", trace.documents)):
        yield all(isinstance(each, str) for each in names), f"{field} must be text"
        yield len(set(names)) == len(names), f"{field} has one name twice"


def _shapes(trace: Trace) -> Iterator[Claim]:
    subject, fields = trace.subject, dtypes(trace.subject.num_experts)
    for name in fields:
        values = getattr(trace, name)
        array = isinstance(values, np.ndarray) or (values is None and name == "kept_TLK")
        yield array, f"{name} is not an array"
    width = trace.experts_TLK.shape[-1] if trace.experts_TLK.ndim == 3 else 0
    sizes = {
        "N": trace.length_N.size, "T": trace.tokens_T.size, "L": len(subject.moe_layers),
        "K": min(subject.top_k or width, subject.num_experts), "E": subject.num_experts,
    }  # fmt: skip
    for name, dtype in fields.items():
        values = getattr(trace, name)
        if values is None:
            continue
        yield values.dtype == dtype, f"{name} holds {values.dtype}, must hold {dtype}"
        given, wanted = list(values.shape), [sizes[axis] for axis in name.rpartition("_")[2]]
        yield given == wanted, f"{name} has the shape {given}, but must have {wanted}"
        plain = dtype != np.bool_ or (values.view(np.uint8) <= 1).all()
        yield plain, f"{name} holds a byte that is neither true nor false"


def _sequences(trace: Trace) -> Iterator[Claim]:
    total = trace.tokens_T.size
    yield total > 0, "there is no token in it"
    for name, limit in (("domain_N", len(trace.domains)), ("document_N", len(trace.documents))):
        within = _within(getattr(trace, name), 0, limit - 1)
        yield within, f"{name} must lie between 0 and {limit - 1}"
    domain_P = np.full(len(trace.documents), -1)
    domain_P[trace.document_N] = trace.domain_N
    alone = (domain_P[trace.document_N] == trace.domain_N).all()
    yield alone, "document_N puts one document into two domains"
    length_N, batch_N = trace.length_N, trace.batch_N
    yield _within(length_N, 1, total), "length_N must be at least 1, and no more than T"
    length = sum(length_N.tolist())
    yield length == total, f"length_N sums to {length}, but there are {total} tokens"
    yield (batch_N >= 0).all(), "batch_N must be at least 0"
    yield (np.diff(batch_N) >= 0).all(), "batch_N must not fall"


def _tokens(trace: Trace) -> Iterator[Claim]:
    num_experts, experts_TLK = trace.subject.num_experts, trace.experts_TLK
    yield _within(trace.tokens_T, 0, 2**31), "tokens_T must be at least 0"
    limit = f"experts_TLK has an expert {experts_TLK.max(initial=0)}, but there are {num_experts}"
    yield _within(experts_TLK, 0, num_experts), limit
    for place in range(1, experts_TLK.shape[2]):
        here_TL1 = experts_TLK[:, :, place : place + 1]
        twice = (here_TL1 == experts_TLK[:, :, :place]) & (here_TL1 < num_experts)
        yield not twice.any(), "experts_TLK has one expert twice for a token"
    yield np.isfinite(trace.weights_TLK).all(), "weights_TLK must be finite numbers"
    idle = not trace.weights_TLK[experts_TLK == num_experts].any()
    yield idle, "weights_TLK must be 0 where experts_TLK has no expert"
    most = float(np.log(num_experts))
    for name, low, high in (
        ("entropy_TL", 0.0, most), ("margin_TL", -1.0, 1.0), ("probs_NLE", 0.0, 1.0),
    ):  # fmt: skip
        values = getattr(trace, name)
        fine = (values >= low - _SLACK) & (values <= high + _SLACK) | np.isnan(values)
        yield fine.all(), f"{name} must lie between {low:g} and {high:.4g}, or be NaN"


def _within(values: NDArray[Any], low: int, high: int) -> bool:
    """Whether all lie between the limits, both included."""
    return values.size == 0 or (int(values.min()) >= low and int(values.max()) <= high)
