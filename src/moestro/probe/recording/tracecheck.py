"""What a trace may hold: dtypes, shapes and values of each field, checked with clear errors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moestro.errors import DataError
from moestro.probe.recording.traces import Subject, Trace, smallest_dtype

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
    name, mark, layers, num_experts, top_k = subject
    _require(isinstance(name, str) and isinstance(mark, str), where, "name and mark must be text")
    whole = all(type(number) is int for number in (*layers, num_experts, top_k))
    _require(whole, where, "layers, num_experts and top_k must be whole numbers")
    _require(len(layers) > 0 and min(layers) >= 0, where, "moe_layers must be numbers from 0")
    _require(1 <= num_experts < 2**32, where, f"num_experts is {num_experts}, must be at least 1")
    _require(
        0 <= top_k <= num_experts,
        where,
        f"top_k is {top_k}, but must lie between 0 and num_experts, {num_experts}",
    )


def check(trace: Trace, where: str) -> None:
    """Refuse a trace with a value that cannot be.

    Args:
        trace: of any origin.
        where: what the message begins with: the file, and the place in it.

    Raises:
        DataError: names `where` and the field, and says what is wrong.
    """
    check_subject(trace.subject, where)
    for name in ("domains", "documents"):
        names = getattr(trace, name)
        _require(all(isinstance(each, str) for each in names), where, f"{name} must be text")
        _require(len(set(names)) == len(names), where, f"{name} has one name twice")
    _check_shapes(trace, where)
    _check_sequences(trace, where)
    _check_tokens(trace, where)


def _check_shapes(trace: Trace, where: str) -> None:
    subject = trace.subject
    for name in dtypes(subject.num_experts):
        values = getattr(trace, name)
        array = isinstance(values, np.ndarray) or (values is None and name == "kept_TLK")
        _require(array, where, f"{name} is no array")
    width = trace.experts_TLK.shape[-1] if trace.experts_TLK.ndim == 3 else 0
    if subject.top_k:
        width = subject.top_k
    width = min(width, subject.num_experts)
    sizes = {
        "N": trace.length_N.size, "T": trace.tokens_T.size, "L": len(subject.moe_layers),
        "K": width, "E": subject.num_experts,
    }  # fmt: skip
    for name, dtype in dtypes(subject.num_experts).items():
        values = getattr(trace, name)
        if values is None:
            continue
        _require(values.dtype == dtype, where, f"{name} holds {values.dtype}, must hold {dtype}")
        shape = tuple(sizes[letter] for letter in name.rpartition("_")[2])
        given = f"{name} has the shape {list(values.shape)}, but must have {list(shape)}"
        _require(values.shape == shape, where, given)
        if dtype == np.bool_:
            plain = (values.view(np.uint8) <= 1).all()
            _require(plain, where, f"{name} holds a byte that is neither true nor false")


def _check_sequences(trace: Trace, where: str) -> None:
    total = trace.tokens_T.size
    _require(total > 0, where, "there is no token in it")
    for name, limit in (("domain_N", len(trace.domains)), ("document_N", len(trace.documents))):
        values_N = getattr(trace, name)
        outside = f"{name} must lie between 0 and {limit - 1}"
        _require(_within(values_N, 0, limit - 1), where, outside)
    domain_P = np.full(len(trace.documents), -1)
    domain_P[trace.document_N] = trace.domain_N
    alone = bool((domain_P[trace.document_N] == trace.domain_N).all())
    _require(alone, where, "document_N puts one document into two domains")
    length_N, batch_N = trace.length_N, trace.batch_N
    _require(_within(length_N, 1, total), where, "length_N must be at least 1, and no more than T")
    sums = f"length_N sums to {sum(length_N.tolist())}, but there are {total} tokens"
    _require(int(sum(length_N.tolist())) == total, where, sums)
    _require(bool((batch_N >= 0).all()), where, "batch_N must be at least 0")
    _require(bool((np.diff(batch_N) >= 0).all()), where, "batch_N must not fall")


def _check_tokens(trace: Trace, where: str) -> None:
    num_experts, experts_TLK = trace.subject.num_experts, trace.experts_TLK
    _require(_within(trace.tokens_T, 0, 2**31), where, "tokens_T must be at least 0")
    limit = f"experts_TLK has an expert {experts_TLK.max(initial=0)}, but there are {num_experts}"
    _require(_within(experts_TLK, 0, num_experts), where, limit)
    for place in range(1, experts_TLK.shape[2]):
        here_TL1 = experts_TLK[:, :, place : place + 1]
        twice = (here_TL1 == experts_TLK[:, :, :place]) & (here_TL1 < num_experts)
        _require(not twice.any(), where, "experts_TLK has one expert twice for a token")
    finite = bool(np.isfinite(trace.weights_TLK).all())
    _require(finite, where, "weights_TLK must be finite numbers")
    idle = not trace.weights_TLK[experts_TLK == num_experts].any()
    _require(idle, where, "weights_TLK must be 0 where experts_TLK has no expert")
    most = float(np.log(num_experts))
    for name, low, high in (
        ("entropy_TL", 0.0, most), ("margin_TL", -1.0, 1.0), ("probs_NLE", 0.0, 1.0),
    ):  # fmt: skip
        values = getattr(trace, name)
        fine = bool(((values >= low - _SLACK) & (values <= high + _SLACK) | np.isnan(values)).all())
        _require(fine, where, f"{name} must lie between {low:g} and {high:.4g}, or be NaN")


def _within(values: NDArray[Any], low: int, high: int) -> bool:
    """Whether all lie between the limits, both included."""
    return values.size == 0 or (int(values.min()) >= low and int(values.max()) <= high)


def _require(fine: bool | np.bool_, where: str, problem: str) -> None:
    if not fine:
        raise DataError(f"{where}: {problem}; record the trace again")
