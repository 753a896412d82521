"""Where the packed form cannot be kept: said once, packed once if that was known before."""

import errno
import shutil
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moestro.checkpoints import packed_files, quantize
from moestro.checkpoints.direct_files import DirectFile
from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.quantize import WEIGHTS
from moestro.checkpoints.tensor_files import LeftOut
from moestro.checkpoints.writing import write_pretrained
from moestro.config import ModelConfig
from moestro.errors import CheckpointError
from moestro.kernels import native_cpu
from moestro.models.decoder import Decoder

pytestmark = pytest.mark.skipif(
    native_cpu.available() is not None, reason=str(native_cpu.available())
)
TOKENS_BS = torch.arange(12).view(2, 6)
INT8 = WEIGHTS["int8"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with a tensor that is left out."""
    cfg = ModelConfig(
        vocab_size=40,
        dim=32,
        num_layers=2,
        attention={"num_heads": 2, "context": 16},
        moe={
            "hidden_dim": 32,
            "num_experts": 4,
            "top_k": 2,
            "shared": {"hidden_dim": 32},
            "router": {"renormalize": True, "selection_bias": True},
        },
    )
    folder = tmp_path / "model"
    write_pretrained(Decoder(cfg), folder, family="ernie4_5_moe")
    weights = folder / "model.safetensors"
    extra = {"model.mtp_emb_norm.0.weight": torch.ones(32)}
    save_file({**load_file(weights), **extra}, weights, metadata={"format": "pt"})
    return folder


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_without_room_is_seen_before_anything_is_packed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 30, 1 << 30, 1 << 10))
    with pytest.warns() as warned:
        model = open_checkpoint(
            folder, weights="int8", progress=lambda done, _: calls.append(done)
        ).model
    assert calls == sorted(calls), "read once"
    assert [w.category for w in warned] == [LeftOut, UserWarning]
    assert "not kept" in str(warned[1].message)
    assert "0.0 MB are free" in str(warned[1].message)
    assert not list(folder.glob("*packed*"))
    with pytest.warns(LeftOut):
        wanted = open_checkpoint(folder, weights="int8", keep=False).model
    assert torch.equal(model(TOKENS_BS).logits, wanted(TOKENS_BS).logits)
    with pytest.warns(LeftOut), pytest.raises(CheckpointError, match=r"MB are free; give another"):
        packed_files.converted(folder, INT8)


def test_a_disk_that_fills_up_is_said_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, written = packed_files._write, []

    def full(file: DirectFile, tensor: Tensor, place: int) -> None:
        written.append(tensor.nbytes)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, tensor, place)

    monkeypatch.setattr(packed_files, "_write", full)
    with pytest.warns() as warned:
        model = open_checkpoint(folder, weights="int8").model
    assert [w.category for w in warned] == [LeftOut, UserWarning]
    assert str(warned[1].message).endswith("No space left on device")
    assert len(written) == 4
    assert not list(folder.glob("*packed*"))
    assert model(TOKENS_BS).logits.isfinite().all()


def test_an_error_of_something_else_is_not_the_files(folder: Path) -> None:
    def left(*_: int) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.warns(LeftOut) as warned, pytest.raises(BrokenPipeError):
        open_checkpoint(folder, weights="int8", progress=left)
    assert len(warned) == 1
    assert not list(folder.glob("*packed*"))


@pytest.mark.filterwarnings("ignore::moestro.checkpoints.tensor_files.LeftOut")
def test_within_a_budget_nothing_is_packed_while_a_module_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, pack, busy = packed_files._write, quantize.packed, threading.Event()
    overlaps: list[bool] = []

    def slow(file: DirectFile, tensor: Tensor, place: int) -> None:
        busy.set()
        time.sleep(0.005)
        write(file, tensor, place)
        busy.clear()

    def noted(*args: object) -> object:
        overlaps.append(busy.is_set())
        return pack(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(packed_files, "_write", slow)
    monkeypatch.setattr(quantize, "packed", noted)
    packed_files.converted(folder, INT8)
    assert len(overlaps) > 4
    assert not any(overlaps)


@pytest.mark.filterwarnings("ignore::moestro.checkpoints.tensor_files.LeftOut")
@pytest.mark.parametrize("after", [0, 3, 8])
def test_an_interruption_leaves_nothing(folder: Path, after: int) -> None:
    """Neither a part of the file, nor what was opened for it."""
    before, open_files = sorted(folder.iterdir()), len(list(Path("/proc/self/fd").glob("*")))
    calls: list[int] = []

    def interrupted(done: int, _: int) -> None:
        calls.append(done)
        if len(calls) > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_checkpoint(folder, weights="int8", progress=interrupted)
    assert len(calls) == after + 1
    assert sorted(folder.iterdir()) == before
    assert len(list(Path("/proc/self/fd").glob("*"))) <= open_files
