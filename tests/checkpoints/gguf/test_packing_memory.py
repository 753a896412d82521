"""Packing a file holds the packed model once, and a tensor or two on their way."""

import gc
from pathlib import Path

import pytest

from moestro import machine
from moestro.checkpoints.gguf.random_model import KINDS, write_random
from moestro.checkpoints.opening import open_checkpoint
from moestro.config import ModelConfig
from moestro.kernels import native_cpu
from moestro.text import train_bpe

pytestmark = pytest.mark.skipif(
    native_cpu.available() is not None or not Path("/proc/self/clear_refs").exists(),
    reason="needs native code, and a system that tells the peak of a process's memory",
)
MB = 10**6
LAYERS = 5


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of 5 layers with 27 MB of experts each, in Q8_0."""
    place = tmp_path_factory.mktemp("model") / "m.gguf"
    cfg = ModelConfig(
        vocab_size=256,
        dim=512,
        num_layers=LAYERS,
        attention={"num_heads": 4, "num_kv_heads": 2, "context": 128},
        moe={"hidden_dim": 512, "num_experts": 32, "top_k": 2},
        head={"tied": False},
    )
    write_random(cfg, KINDS["int8"], place)
    folder = place.with_name("m.gguf.moestro")
    folder.mkdir()
    train_bpe(["a"], 257).save(folder)
    open_checkpoint(place, keep=False)  # what is made once, and imports
    return place


@pytest.mark.parametrize("keep", [True, False])
def test_a_model_is_never_held_twice(file: Path, keep: bool) -> None:
    """Where it is kept, two modules at most are there, and all come back as pages of the file."""
    packed = file.stat().st_size  # int8 has 8.5 bits, as Q8_0
    gc.collect()
    machine.forget_peak()
    before = machine.peak_bytes()
    open_checkpoint(file, keep=keep)
    held, experts = machine.peak_bytes() - before, packed / LAYERS
    assert packed > 100 * MB
    assert held < (2.5 * experts if keep else packed + 0.5 * experts)
