"""Each field of a trace refuses what cannot be, and says which field, where and why."""

import numpy as np
import pytest

from moestro.errors import DataError
from moestro.probe.recording.tracecheck import check, check_subject, dtypes
from moestro.probe.recording.traces import Subject

from .traces import make_trace


def put(value, at=0):
    """A change: this value at one place of the flattened array."""

    def change(values):
        changed = values.copy()
        changed.flat[at] = value
        return changed

    return change


BAD = {
    "domains": [
        (lambda names: (names[0], names[0]), "one name twice"),
        (lambda names: (*names[:-1], 1), "must be text"),
        (lambda names: names[:-1], "domain_N must lie between 0 and 0"),
    ],
    "documents": [
        (lambda names: names[:-1], "document_N must lie between 0 and 4"),
        (lambda names: (*names[:-1], names[0]), "one name twice"),
    ],
    "domain_N": [(put(-1), "between"), (put(2), "between"), (put(1), "into two domains")],
    "document_N": [(put(-1), "between"), (put(6), "between"), (put(5), "into two domains")],
    "batch_N": [(put(-1), "at least 0"), (put(9), "must not fall")],
    "length_N": [
        (put(0), "at least 1"),
        (put(-1), "at least 1"),
        (put(8), "sums to 97, but there are 96 tokens"),
        (put(2**62), "no more than T"),
        (lambda values: values[:-1], r"has the shape \[12\], but must have \[11\]"),
    ],
    "tokens_T": [(put(-1), "at least 0"), (lambda values: values[:-1], "has the shape")],
    "generated_T": [(lambda values: values[1:], "has the shape")],
    "experts_TLK": [
        (put(5), "has an expert 5, but there are 4"),
        (lambda values: values[:, :, [0, 0]], "one expert twice"),
        (lambda values: values[:, :, :1], "has the shape"),
        (lambda values: values[:, :1], "has the shape"),
        (lambda values: values[:, 0], "has the shape"),
    ],
    "weights_TLK": [
        (put(np.nan), "finite"),
        (put(np.inf, 5), "finite"),
        (lambda values: values[:, :, :1], "has the shape"),
    ],
    "kept_TLK": [(lambda values: values[:, :1], "has the shape")],
    "entropy_TL": [
        (put(-0.1), "between 0 and 1.386"),
        (put(1.4), "between 0 and 1.386"),
        (put(np.inf), "between 0 and 1.386"),
    ],
    "margin_TL": [(put(1.1), "between -1 and 1"), (put(-1.1), "between -1 and 1")],
    "probs_NLE": [
        (put(1.1), "between 0 and 1"),
        (put(-0.1), "between 0 and 1"),
        (lambda values: values[:, :, :3], "has the shape"),
    ],
}
CASES = [(field, change, message) for field, cases in BAD.items() for change, message in cases]


@pytest.mark.parametrize(
    ("field", "change", "message"), CASES, ids=[f"{each[0]}: {each[2]}" for each in CASES]
)
def test_bad_values_are_refused(field, change, message):
    trace = make_trace(dropped=0.1)
    bad = trace._replace(**{field: change(getattr(trace, field))})
    with pytest.raises(DataError, match=rf"^here\.npz: .*{message}.*record the trace again"):
        check(bad, "here.npz")


@pytest.mark.parametrize("field", dtypes(4))
def test_wrong_dtypes_are_refused(field):
    trace = make_trace(dropped=0.1)
    values = getattr(trace, field)
    other = np.float64 if values.dtype != np.float64 else np.int32
    with pytest.raises(DataError, match=f"{field} holds float64, must hold {values.dtype}"):
        check(trace._replace(**{field: values.astype(other)}), "here.npz")
    for nothing in (None, values.tolist()):
        if field != "kept_TLK" or nothing is not None:
            with pytest.raises(DataError, match=f"{field} is not an array"):
                check(trace._replace(**{field: nothing}), "here.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 1}, "must be text"),
        ({"fingerprint": None}, "must be text"),
        ({"moe_layers": ()}, "moe_layers must be numbers from 0"),
        ({"moe_layers": (0, -1)}, "moe_layers must be numbers from 0"),
        ({"moe_layers": (0, 1.0)}, "must be whole numbers"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_experts": 2**32}, "num_experts is 4294967296"),
        ({"num_experts": True}, "must be whole numbers"),
        ({"top_k": -1}, "top_k is -1, but must lie between 0 and num_experts, 4"),
        ({"top_k": 5}, "top_k is 5, but must lie between 0 and num_experts, 4"),
    ],
)
def test_models_that_cannot_be_are_refused(changes, message):
    subject = Subject("tiny", "0", (0, 1), 4, 2)
    check_subject(subject, "here.npz")
    with pytest.raises(DataError, match=rf"^here\.npz: .*{message}"):
        check_subject(subject._replace(**changes), "here.npz")


def test_empty_places():
    trace = make_trace(empty=0.5)
    check(trace, "here.npz")
    empty_TLK = trace.experts_TLK == 4
    weights_TLK = np.where(empty_TLK, np.float32(0.1), trace.weights_TLK)
    with pytest.raises(DataError, match="weights_TLK must be 0 where experts_TLK has no expert"):
        check(trace._replace(weights_TLK=weights_TLK), "here.npz")


def test_an_empty_trace_is_refused():
    trace = make_trace()
    with pytest.raises(DataError, match="there is no token in it"):
        check(trace.choose(np.zeros(12, dtype=np.bool_)), "here.npz")
