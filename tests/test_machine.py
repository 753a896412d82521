"""What the system tells: memory, its peak, the processor, energy."""

from pathlib import Path

import numpy as np
import pytest

from moestro import machine
from moestro.machine import Energy


def test_the_processor_has_a_name():
    assert machine.cpu_name()


def test_the_peak_counts_from_where_it_was_forgotten():
    block = np.ones(64 << 20, dtype=np.uint8)
    assert machine.peak_bytes() > len(block)
    before = machine.peak_bytes()
    del block
    machine.forget_peak()
    if machine.peak_bytes() == before:
        pytest.skip("this system cannot forget a peak")
    assert machine.peak_bytes() < before
    assert machine.children_peak_bytes() >= 0


def test_energy_of_the_packages(tmp_path: Path) -> None:
    def zone(name: str, now: int, most: int = 1000) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "energy_uj").write_text(f"{now}\n")
        (folder / "max_energy_range_uj").write_text(f"{most}\n")
        return folder

    assert Energy(tmp_path / "none").joules() is None
    assert Energy(tmp_path / "none").since(None) is None
    zone("intel-rapl:0", 100)
    zone("intel-rapl:0:0", 50)  # the cores of that package
    zone("intel-rapl:1", 990)
    (tmp_path / "intel-rapl").mkdir()
    energy = Energy(tmp_path)
    before = energy.joules()
    assert before == [100, 990]
    zone("intel-rapl:0", 300)
    zone("intel-rapl:1", 9)
    assert energy.since(before) == pytest.approx((200 + 20) / 1e6)
