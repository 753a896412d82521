"""What the system tells: memory, its peak, the processor, energy."""

import mmap
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moestro import machine
from moestro.machine import Energy


def test_the_processor_has_a_name():
    assert machine.cpu_name()


def test_the_peak_counts_from_where_it_was_forgotten():
    size = 64 << 20
    with mmap.mmap(-1, size) as block:  # given back even where training keeps what it freed
        block.write(b"1" * size)
        assert machine.peak_bytes() > size
        before = machine.peak_bytes()
    machine.forget_peak()
    if machine.peak_bytes() == before:
        pytest.skip("this system cannot forget a peak")
    assert machine.peak_bytes() < before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system tells no peak")
def test_a_programs_peak_is_its_own_whatever_its_parent_holds(tmp_path: Path) -> None:
    block = np.ones(400 << 20, dtype=np.uint8)
    held = []
    for size in (0, 150 << 20):
        program = f"import time; x = b'1' * {size}; time.sleep(0.3); print('done')"
        done, peak = machine.run_watched([sys.executable, "-c", program], str(tmp_path), 60)
        assert (done.returncode, done.stdout) == (0, "done\n")
        held.append(peak)
    assert held[0] < 100 << 20 < 150 << 20 < held[1] < len(block)


def test_a_program_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        machine.run_watched(
            [sys.executable, "-c", "import time; time.sleep(60)"], str(tmp_path), 0.5
        )
    assert time.monotonic() - start < 30


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
    monkeypatch.setattr(machine, "_held_bytes", lambda: 1 << 20)
    unlimited = machine.free_bytes()
    if unlimited is None:
        pytest.skip("this system does not say what is free")
    limit(group, 10_400)
    assert machine.free_bytes() == (1 << 20) + 9_500  # 10,400 less 400 in use, less 5 %
    limit(root / "outer", 1_400)
    assert machine.free_bytes() == (1 << 20) + 950
    assert machine.memory_bytes() == 1_400


def test_mapped_files_are_not_held_and_free_at_once() -> None:
    """The pages of libraries are among what a group can give back."""
    assert 0 < machine._held_bytes() <= machine.resident_bytes()
    fields = machine._fields(Path("/proc/self/status"))
    if "RssFile" in fields:
        others = machine.resident_bytes() - fields["RssFile"] * 1024
        assert machine._held_bytes() == pytest.approx(others, rel=0.1)


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where control groups are; the process is in /pod/own by what it is told, of version 2."""
    (tmp_path / "own").write_text("0::/pod/own\n")
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "_held_bytes", lambda: 1 << 20)
    if machine.free_bytes() is None:
        pytest.skip("this system does not say what is free")
    return tmp_path


def put(group: Path, **files: str) -> None:
    group.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (group / name.replace("_", ".", 1)).write_text(f"{text}\n")


def test_a_group_without_a_limit_limits_nothing(groups: Path) -> None:
    free = machine.memory_bytes()
    put(groups / "pod/own", memory_max="max", memory_high="max", memory_current="500")
    assert machine.memory_bytes() == free
    (groups / "own").write_text("5:memory:/pod/own\n")
    unlimited = "9223372036854771712"  # as version 1 says it
    own = groups / "memory/pod/own"
    put(own, memory_limit_in_bytes=unlimited, memory_usage_in_bytes="500")
    assert machine.memory_bytes() == free


def test_a_group_is_held_up_before_it_reaches_its_limit(groups: Path) -> None:
    put(groups / "pod/own", memory_max="9000", memory_high="5000", memory_current="1000")
    assert machine.memory_bytes() == 5000
    assert machine.free_bytes() == (1 << 20) + 3800
    put(groups / "pod/own", memory_max="max")
    assert machine.memory_bytes() == 5000


def test_a_container_sees_its_own_group_as_the_root(groups: Path) -> None:
    """Its path is that of the host, where nothing is mounted."""
    put(groups, memory_max="7000", memory_current="3000", memory_stat="inactive_file 1000")
    assert machine.free_bytes() == (1 << 20) + 4750


def test_a_group_that_says_half_of_it_is_passed_over(groups: Path) -> None:
    free = machine.memory_bytes()
    put(groups / "pod/own", memory_max="7000")
    assert machine.memory_bytes() == free
    put(groups / "pod/own", memory_current="no number")
    assert machine.memory_bytes() == free


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
