"""`moestro serve --memory` as its user runs it: what the process holds, from packing to answers."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest
import torch

from moestro.checkpoints.folders import atomic_folder
from moestro.checkpoints.writing import save_model
from moestro.config import ModelConfig
from moestro.kernels import native_cpu
from moestro.models.decoder import Decoder
from moestro.text import ByteTokenizer

from .test_command import address_in, command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(native_cpu.available() is not None, reason=str(native_cpu.available())),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system tells no peak"),
]
LIVE, CONTEXT, MIB = 4, 256, 1 << 20


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A checkpoint that is larger than what a budget leaves beside the process."""
    torch.manual_seed(0)
    moe = {"hidden_dim": 512, "num_experts": 16, "top_k": 2}
    heads = {"num_heads": 4, "num_kv_heads": 2, "context": CONTEXT}
    cfg = ModelConfig(vocab_size=257, dim=256, num_layers=5, attention=heads, moe=moe)
    with atomic_folder(tmp_path / "run/checkpoints/step-000001") as folder:
        save_model(Decoder(cfg).eval(), folder)
        ByteTokenizer().save(folder)
    return tmp_path / "run"


def peak(process: int) -> int:
    """Most bytes that a process has held."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def test_packing_and_answers_to_several_stay_within_the_amount(run: Path) -> None:
    words = [str(run), "--weights", "int8", "--max-live", str(LIVE), "--cache-memory", "8MiB"]
    small = [sys.executable, "-m", "moestro", "serve", *words, "--port", "0", "--memory", "1MiB"]
    told = " ".join(
        subprocess.run(small, capture_output=True, text=True, check=False).stderr.split()
    )
    found = re.search(r"process takes ([\d,]+) MiB.*give at least (\d+)MiB", told)
    assert found is not None, told
    process, memory = (int(each.replace(",", "")) * MIB for each in found.groups())
    memory += 12 * MIB  # more than one expert of each mixture, and by far not all
    weights = sum(each.stat().st_size for each in run.rglob("*.safetensors"))
    assert memory - process < weights
    with command(*words, "--memory", f"{memory}B") as (server, lines):
        assert peak(server.pid) <= 1.02 * memory  # packed by now
        url = f"{address_in(lines)}/v1/completions"

        def answer(letter: str) -> str:
            text = ""
            for _ in range(3):
                body = {"prompt": text + letter * 60, "max_tokens": 30, "temperature": 0}
                text = httpx.post(url, json=body, timeout=120).json()["choices"][0]["text"]
            return text

        with ThreadPoolExecutor(LIVE) as pool:
            texts = list(pool.map(answer, "abcd"))
        metrics = httpx.get(f"{address_in(lines)}/metrics").text
        assert peak(server.pid) <= 1.02 * memory
    assert all(texts)
    misses = re.search(r"^moestro:expert_misses\S* (\S+)", metrics, re.MULTILINE)
    assert misses is not None, [each for each in metrics.splitlines() if "expert" in each]
    assert float(misses[1]) > 100
