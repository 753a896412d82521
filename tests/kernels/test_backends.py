import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.errors import BackendError
from moestro.kernels import backends, native_training

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _no_forced_backend(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)


@pytest.mark.parametrize(
    ("dtype", "widths"),
    [(torch.float64, (256, 512)), (FP32, (256, 512)), (torch.float16, (256,)), (BF16, (256, 500))],
)
def test_cpu_gets_segments(dtype, widths):
    assert backends.choose("auto", "cpu", dtype, widths).name == "segments"


def test_cpu_with_tiles_gets_native():
    """Without them, segments; see also tests/kernels/test_native_training.py."""
    reason = native_training.reason_against("cpu", BF16, (256, 512))
    expected = "native" if reason is None else "segments"
    assert backends.choose("auto", "cpu", BF16, (256, 512)).name == expected


@pytest.mark.parametrize("name", ["segments", "reference"])
def test_forced_by_name(name):
    assert backends.choose(name, "cpu", FP32).name == name


def test_forced_by_environment(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT, "reference")
    assert backends.choose("auto", "cpu", FP32).name == "reference"
    # What the code names wins over the environment.
    assert backends.choose("segments", "cpu", FP32).name == "segments"


def test_unknown_name_lists_the_known(monkeypatch):
    with pytest.raises(BackendError, match=r"'sgements'.*auto.*segments.*reference"):
        backends.choose("sgements", "cpu", FP32)
    monkeypatch.setenv(backends.ENVIRONMENT, "nonsense")
    with pytest.raises(BackendError, match="nonsense"):
        backends.choose("auto", "cpu", FP32)


def test_a_named_backend_that_cannot_run_raises_with_its_reason(monkeypatch):
    verdict = next(row for row in backends.TABLE if row.name == "torch").supports("cpu", BF16, (8,))
    assert not verdict.ok
    with pytest.raises(BackendError) as caught:
        backends.choose("torch", "cpu", BF16, (8,))
    assert verdict.reason in str(caught.value)
    monkeypatch.setenv(backends.ENVIRONMENT, "torch")
    with pytest.raises(BackendError, match=backends.ENVIRONMENT):
        backends.choose("auto", "cpu", BF16, (8,))


@pytest.mark.parametrize(
    ("capability", "dtype", "widths", "name"),
    [
        ((9, 0), BF16, (256, 512), "torch"),
        ((9, 0), FP32, (256, 512), "segments"),
        ((9, 0), BF16, (256, 500), "segments"),
        ((7, 5), BF16, (256, 512), "segments"),
    ],
)
def test_the_choice_on_cuda(monkeypatch, capability, dtype, widths, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert backends.choose("auto", "cuda", dtype, widths).name == name


def test_unaligned_widths_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(BackendError, match=r"multiples of 8.*\[500\]"):
        backends.choose("torch", "cuda", BF16, (256, 500))


def test_table_names_every_row_with_a_reason(monkeypatch):
    rows = backends.table("cpu", FP32)
    assert [row.name for row in rows] == [row.name for row in backends.TABLE]
    assert all(row.reason for row in rows)
    assert [row.name for row in rows if row.chosen] == ["segments"]
    assert all(row.ok for row in rows if row.chosen)
    monkeypatch.setenv(backends.ENVIRONMENT, "reference")
    assert [row.name for row in backends.table("cpu") if row.chosen] == ["reference"]
    monkeypatch.setenv(backends.ENVIRONMENT, "nonsense")
    assert not any(row.chosen for row in backends.table("cpu"))


COUNTS = st.lists(st.integers(0, 3000), min_size=1, max_size=12)


@pytest.mark.parametrize("backend", backends.TABLE, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", [torch.float64, FP32, BF16])
@given(counts=COUNTS)
def test_rooms_hold_every_row_at_a_small_cost(backend, dtype, counts):
    rooms = backend.rooms(torch.tensor(counts), dtype).tolist()
    assert len(rooms) == len(counts)
    for room, count in zip(rooms, counts, strict=True):
        assert room >= count
        assert count or not room, "rows for an expert that nobody chose"
    # An eighth of an octave, and a rounding to 16 rows per expert.
    assert sum(rooms) <= 2**0.125 * sum(counts) + 16 * len(counts)
    if dtype != BF16:
        assert rooms == counts


def test_few_rows_are_never_padded():
    """Generating one token must not pay for eight experts' padding."""
    counts = [0, 1, 0, 0, 1, 0, 0, 0]
    for backend in backends.TABLE:
        assert backend.rooms(torch.tensor(counts), BF16).tolist() == counts


def test_padding_leaves_few_distinct_sizes():
    """What it is for: 40 steps of routing noise around 1024 rows of each of 8 experts."""
    counts_NE = 1024 + (100 * torch.randn(40, 8)).long()
    segments = backends.choose("segments", "cpu", BF16)
    sizes = {room for counts_E in counts_NE for room in segments.rooms(counts_E, BF16).tolist()}
    assert len(sizes) <= 16
    assert len(counts_NE.unique()) > 100
