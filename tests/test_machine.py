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


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_group_limits_what_is_free(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "memory" if version == 1 else tmp_path
    group = root / "outer/inner"
    group.mkdir(parents=True)
    most, now, files = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.max", "memory.current", "inactive_file")
    )

    def limit(folder: Path, bytes: int) -> None:
        (folder / most).write_text(f"{bytes}\n")
        (folder / now).write_text("500\n")
        (folder / "memory.stat").write_text(f"{files} 100\nanon 400\n")

    line = "4:memory:/outer/inner\n3:cpu:/other\n" if version == 1 else "0::/outer/inner\n"
    (tmp_path / "own").write_text(line)
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "resident_bytes", lambda: 1 << 20)
    unlimited = machine.free_bytes()
    if unlimited is None:
        pytest.skip("this system does not say what is free")
    limit(group, 10_400)
    assert machine.free_bytes() == (1 << 20) + 9_500  # 10,400 less 400 in use, less 5 %
    limit(root / "outer", 1_400)
    assert machine.free_bytes() == (1 << 20) + 950
    assert machine.memory_bytes() == 1_400


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
