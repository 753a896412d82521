"""What is written past the page cache is what is written through it."""

import errno
import fcntl
import os
from pathlib import Path

import pytest
import torch

from moestro.checkpoints import direct_files
from moestro.checkpoints.direct_files import DirectFile
from moestro.kernels.native_packing import aligned
from moestro.kernels.packing import PAGE

LARGE = direct_files._LEAST_BYTES
# Sizes, whether the memory begins on a page, and places.
PARTS = [
    (LARGE, True, 0),
    (LARGE + PAGE + 5, True, 80 * PAGE),
    (LARGE + 1, False, 160 * PAGE),
    (LARGE, True, 240 * PAGE + 1),
    (7, True, 400 * PAGE),
    (0, True, 400 * PAGE),
]


@pytest.fixture
def descriptors(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each write, whether it went past the page cache; pieces of it are small."""
    real, seen = os.pwrite, list[bool]()

    def noted(descriptor: int, memory: memoryview, place: int) -> int:
        seen.append(bool(_flags(descriptor) & os.O_DIRECT))
        return real(descriptor, memory, place)

    monkeypatch.setattr(os, "pwrite", noted)
    monkeypatch.setattr(direct_files, "_PIECE_BYTES", 16 * PAGE)
    return seen


def _flags(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_GETFL)


def written(path: Path) -> None:
    """Random parts at their places, compared with what a file of bytes would hold."""
    wanted = bytearray(401 * PAGE)
    with path.open("wb") as file:
        file.truncate(len(wanted))
        direct = DirectFile(file)
        for size, on_page, place in PARTS:
            memory = aligned(size + 2)
            part = memory[:size] if on_page else memory[1 : size + 1]
            part.random_(0, 256)
            direct.put(part, place)
            wanted[place : place + size] = part.numpy().tobytes()
        direct.close()
        direct.close()
    assert path.read_bytes() == wanted


def takes_direct(folder: Path) -> bool:
    try:
        os.close(os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_whole_pages_of_large_tensors_go_past_the_cache(
    tmp_path: Path, descriptors: list[bool]
) -> None:
    written(tmp_path / "file")
    if not takes_direct(tmp_path):
        assert not any(descriptors)
        return
    # 64 pages in 4 pieces; 65 in 5, and the rest; three through the cache, of which two are large.
    assert descriptors == [True] * 4 + [True] * 5 + [False] + [False] * (5 + 4 + 1)


def test_a_file_system_may_refuse_the_flag(
    tmp_path: Path, descriptors: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refusing(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)
    written(tmp_path / "file")
    assert not any(descriptors)


def test_a_file_system_may_refuse_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the flag, writes one piece and refuses the next: all is written again."""
    real, direct = os.pwrite, list[int]()

    def refusing(descriptor: int, memory: memoryview, place: int) -> int:
        if _flags(descriptor) & os.O_DIRECT:
            direct.append(place)
            if len(direct) > 1:
                raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, memory, place)

    monkeypatch.setattr(os, "pwrite", refusing)
    monkeypatch.setattr(direct_files, "_PIECE_BYTES", 16 * PAGE)
    written(tmp_path / "file")
    assert len(direct) == (2 if takes_direct(tmp_path) else 0), "and is not tried again"


def test_another_error_is_the_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with (tmp_path / "file").open("wb") as file:
        direct = DirectFile(file)
        with pytest.raises(OSError, match="No space left"):
            direct.put(torch.ones(LARGE, dtype=torch.uint8), 0)
        direct.close()
