import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.errors import BackendError
from moestro.kernels import backends, native_cpu, native_training
from moestro.kernels.backends import Work

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _no_forced_backend(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)


@pytest.mark.parametrize(
    ("dtype", "widths"),
    [(torch.float64, (256, 512)), (FP32, (256, 512)), (torch.float16, (256,)), (BF16, (256, 500))],
)
def test_cpu_gets_segments(dtype, widths):
    assert backends.choose("auto", Work("cpu", dtype, widths)).name == "segments"


def test_cpu_with_tiles_gets_native():
    """Without them, segments; see also tests/kernels/test_native_training.py."""
    reason = native_training.reason_against("cpu", BF16, (256, 512))
    expected = "native" if reason is None else "segments"
    assert backends.choose("auto", Work("cpu", BF16, (256, 512))).name == expected


@pytest.mark.parametrize("name", ["segments", "reference"])
def test_forced_by_name(name):
    assert backends.choose(name, Work("cpu", FP32)).name == name


def test_forced_by_environment(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT, "reference")
    assert backends.choose("auto", Work("cpu", FP32)).name == "reference"
    # What the code names wins over the environment.
    assert backends.choose("segments", Work("cpu", FP32)).name == "segments"


def test_unknown_name_lists_the_known(monkeypatch):
    with pytest.raises(BackendError, match=r"'sgements'.*auto.*segments.*reference"):
        backends.choose("sgements", Work("cpu", FP32))
    monkeypatch.setenv(backends.ENVIRONMENT, "nonsense")
    with pytest.raises(BackendError, match="nonsense"):
        backends.choose("auto", Work("cpu", FP32))


def test_a_named_backend_that_cannot_run_raises_with_its_reason(monkeypatch):
    torchs = next(row for row in backends.TABLE if row.name == "torch")
    verdict = torchs.supports(Work("cpu", BF16, (8,)))
    assert not verdict.ok
    with pytest.raises(BackendError) as caught:
        backends.choose("torch", Work("cpu", BF16, (8,)))
    assert verdict.reason in str(caught.value)
    monkeypatch.setenv(backends.ENVIRONMENT, "torch")
    with pytest.raises(BackendError, match=backends.ENVIRONMENT):
        backends.choose("auto", Work("cpu", BF16, (8,)))


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
    assert backends.choose("auto", Work("cuda", dtype, widths)).name == name


def test_unaligned_widths_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(BackendError, match=r"multiples of 8.*\[500\]"):
        backends.choose("torch", Work("cuda", BF16, (256, 500)))


def test_table_names_every_row_with_a_reason(monkeypatch):
    rows = backends.table("cpu", FP32)
    assert [(row.use, row.name) for row in rows] == [
        (use, row.name) for use in backends.USES for row in backends.TABLE if use in row.uses
    ]
    assert all(row.reason for row in rows)
    native = native_cpu.available() is None
    chosen = {row.use: row.name for row in rows if row.chosen}
    assert chosen == {"train": "segments", "infer": "native" if native else "segments"} | (
        {"packed": "native", "step": "native"} if native else {}
    )
    assert all(row.ok for row in rows if row.chosen)
    monkeypatch.setenv(backends.ENVIRONMENT, "reference")
    chosen = [(row.use, row.name) for row in backends.table("cpu") if row.chosen]
    assert chosen == [("train", "reference"), ("infer", "reference")]
    monkeypatch.setenv(backends.ENVIRONMENT, "nonsense")
    assert not any(row.chosen for row in backends.table("cpu"))


UP_EHD = torch.zeros(2, 8, 4)
INFER = Work("cpu", FP32, use="infer", weights=(UP_EHD, torch.zeros(2, 4, 4)))
NOT_WHOLE = {
    "another device": (INFER._replace(device="cuda"), "for the CPU, not cuda"),
    "another dtype": (INFER._replace(dtype=BF16), "tokens are torch.bfloat16.*without autocast"),
    "of 64 bits": (Work("cpu", torch.float64, use="infer"), "float32 and bfloat16, not.*float64"),
    "something of its own": (INFER._replace(lacks="a gate of its own"), "a gate of its own"),
    "strided": (INFER._replace(weights=(UP_EHD.transpose(1, 2),)), "strided"),
    "of odd width": (
        Work("cpu", BF16, use="infer", weights=(UP_EHD.to(BF16)[..., :3].contiguous(),)),
        r"even width; given \[2, 8, 3\]",
    ),
    "a cast cache": (INFER._replace(use="step", weights=(UP_EHD.half(),)), "given torch.float16"),
}


@pytest.mark.skipif(native_cpu.available() is not None, reason="no native library")
@pytest.mark.parametrize("case", NOT_WHOLE)
def test_what_is_not_one_native_call_says_why(case, monkeypatch):
    assert backends.why_not_whole("auto", INFER) is None
    assert backends.choose("native", INFER).mixture is native_cpu.plain_mixture
    work, reason = NOT_WHOLE[case]
    assert re.search(reason, backends.why_not_whole("auto", work))
    if work.use == "infer" and work.device == "cpu":
        assert backends.choose("auto", work).name != "native" or work.dtype == BF16
    monkeypatch.setenv(backends.ENVIRONMENT, "segments")
    assert "segments was asked for" in backends.why_not_whole("auto", INFER)
    assert backends.choose("auto", INFER).name == "segments"
    assert backends.why_not_whole("native", INFER) is None


def test_packed_weights_have_one_kernel(monkeypatch):
    work = Work("cpu", FP32, use="packed")
    with pytest.raises(BackendError, match=r"'segments'.*packed weights run by native alone"):
        backends.choose("segments", work)
    monkeypatch.setattr(native_cpu, "available", lambda: "it was not built")
    for name in ("auto", "native"):
        with pytest.raises(BackendError, match="it was not built"):
            backends.choose(name, work)


COUNTS = st.lists(st.integers(0, 3000), min_size=1, max_size=12)


@pytest.mark.parametrize("backend", backends.TABLE, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", [torch.float64, FP32, BF16])
@given(counts=COUNTS)
def test_padded_counts_hold_every_row_at_a_small_cost(backend, dtype, counts):
    padded = backend.padded_counts(torch.tensor(counts), dtype).tolist()
    assert len(padded) == len(counts)
    for rows, count in zip(padded, counts, strict=True):
        assert rows >= count
        assert count or not rows, "rows for an expert that nobody chose"
    # An eighth of an octave, and a rounding to 16 rows per expert.
    assert sum(padded) <= 2**0.125 * sum(counts) + 16 * len(counts)
    if dtype != BF16:
        assert padded == counts


def test_few_rows_are_never_padded():
    """Generating one token must not pay for eight experts' padding."""
    counts = [0, 1, 0, 0, 1, 0, 0, 0]
    for backend in backends.TABLE:
        assert backend.padded_counts(torch.tensor(counts), BF16).tolist() == counts


def test_padding_leaves_few_distinct_sizes():
    """What it is for: 40 steps of routing noise around 1024 rows of each of 8 experts."""
    counts_NE = 1024 + (100 * torch.randn(40, 8)).long()
    segments = backends.choose("segments", Work("cpu", BF16))
    padded = [segments.padded_counts(counts_E, BF16).tolist() for counts_E in counts_NE]
    sizes = {rows for counts in padded for rows in counts}
    assert len(sizes) <= 16
    assert len(counts_NE.unique()) > 100
