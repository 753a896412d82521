"""Measuring this machine: what comes out is a device, whatever its speed."""

import math

import pytest
import torch

from moestro import machine
from moestro.errors import MoestroError
from moestro.plan import measured
from moestro.plan.measured import measure


@pytest.fixture(autouse=True)
def _processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_measured_device():
    found = measure(seconds=0.005, array_bytes=2**16, side=32)
    assert found.source == "measured, 1 processor threads"
    for number in (found.bytes_per_s, found.flops_per_s):
        assert math.isfinite(number)
        assert number > 1e6
    assert 2**28 < found.memory_bytes < 2**60


def test_the_container_limits_the_memory(monkeypatch, tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/\n")
    monkeypatch.setattr(machine, "OWN_CGROUPS", own)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    whole = measure(seconds=0.001, array_bytes=64, side=2).memory_bytes
    (tmp_path / "memory.max").write_text("1000000\n")
    assert measure(seconds=0.001, array_bytes=64, side=2).memory_bytes == 1_000_000 < whole


def test_a_system_that_does_not_say_its_memory(monkeypatch):
    monkeypatch.setattr(machine.os, "sysconf", lambda name: int("unknown"))
    with pytest.raises(MoestroError, match="does not say how much memory"):
        measure(seconds=0.001, array_bytes=64, side=2)


def test_the_time_is_that_of_one_call(monkeypatch):
    """A call of two seconds on a clock that moves only with it."""
    now = [0.0]
    monkeypatch.setattr(measured.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += 2.0

    assert measured._best(call, seconds=3.0, cuda=False) == 2.0
    assert now[0] == 6.0
