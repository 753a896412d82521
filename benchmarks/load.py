"""Loading a sharded checkpoint: against the page cache's read rate, and its peak memory.

A synthetic Mixtral in bfloat16, four shards in a temporary folder, its pages cached. The plain
read fills one reused buffer of 16 MiB, file after file: no memory is handed out and nothing is
kept. "Into new memory" keeps the bytes and does nothing else, which is a loader's real limit.
Memory is the peak resident set of a process of its own minus what it held before it loaded.
"""

from __future__ import annotations

import argparse
import gc
import mmap
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import measure
import torch

from moestro import Decoder, ModelConfig
from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.tensor_files import open_folder
from moestro.checkpoints.writing import write_pretrained
from moestro.machine import peak_bytes, resident_bytes
from moestro.models.materialize import materialize, without_memory

SHARDS = 4
BUFFER_BYTES = 1 << 24
KEPT: list[memoryview] = []


def config(gigabytes: float) -> ModelConfig:
    """A Mixtral of about that size in bfloat16: as many layers as it takes."""
    dim, hidden, experts, vocab = 1024, 3584, 8, 8000
    layer = 2 * (experts * 3 * dim * hidden + 3 * dim * dim)
    layers = max(1, round((gigabytes * 1e9 - 4 * vocab * dim) / layer))
    return ModelConfig(
        vocab_size=vocab,
        dim=dim,
        num_layers=layers,
        attention={"num_heads": 16, "num_kv_heads": 8, "context": 4096},
        moe={"hidden_dim": hidden, "num_experts": experts, "top_k": 2},
        head={"tied": False},
    )


def make(folder: Path, gigabytes: float) -> None:
    """Write the checkpoint."""
    cfg = config(gigabytes)
    with without_memory():
        model = Decoder(cfg)
    materialize(model, torch.bfloat16, "cpu")
    noise = torch.randn(1 << 20).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            for part in parameter.view(-1).split(len(noise)):
                part.copy_(noise[: len(part)])
    tensors = list(model.parameters())
    total = sum(tensor.nbytes for tensor in tensors)
    largest = cfg.vocab_size * cfg.dim * 2
    write_pretrained(model, folder, family="mixtral", shard_bytes=total // SHARDS + largest)


def plain(folder: Path) -> None:
    """Read every file into one buffer."""
    buffer = bytearray(BUFFER_BYTES)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def fresh(folder: Path) -> None:
    """Read every file into new memory, a thread for each half: what keeping the bytes costs.

    Memory that the process did not have must be handed out and cleared by the system, and on a
    virtual machine often by the machine below it.
    """
    for path in sorted(folder.glob("*.safetensors")):
        memory = materialize_bytes(path.stat().st_size)
        middle = len(memory) // 2
        with ThreadPoolExecutor(2) as readers:
            readers.submit(fill, path, memory[:middle], 0)
            readers.submit(fill, path, memory[middle:], middle)
        KEPT.append(memory)
    KEPT.clear()


def materialize_bytes(count: int) -> memoryview:
    """New memory, in huge pages where the system has them."""
    memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def fill(path: Path, memory: memoryview, offset: int) -> None:
    """Read a file from `offset` on into `memory`."""
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while memory:
            memory = memory[file.readinto(memory[:BUFFER_BYTES]) :]


def ours(folder: Path) -> Any:
    """This project's loader."""
    return open_checkpoint(folder).model


def theirs(folder: Path) -> Any:
    """The loader of transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")


def loaders() -> dict[str, Callable[[Path], Any]]:
    """The loaders to compare; transformers' where it is installed."""
    found: dict[str, Callable[[Path], Any]] = {"moestro": ours}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformers  # noqa: F401
    except ImportError:
        return found
    return {**found, "transformers": theirs}


def child(name: str, small: Path, folder: Path) -> None:
    """Print the peak bytes of one loader; a small load first brings its code into memory."""
    load = loaders()[name]
    load(small)
    gc.collect()
    before = resident_bytes()
    # Writing 5 there sets the peak back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    model = load(folder)
    print(peak_bytes() - before)
    del model


def peak(name: str, small: Path, folder: Path) -> int:
    """Peak bytes of one loader in a process of its own."""
    command = [sys.executable, __file__, "--child", name, str(small), str(folder)]
    return int(subprocess.check_output(command, text=True).splitlines()[-1])


def compare(args: argparse.Namespace, folder: Path, small: Path) -> None:
    """Measure and report."""
    stored = open_folder(folder).values()
    size, largest = sum(one.bytes for one in stored), max(one.bytes for one in stored)
    compared = loaders()
    variants = {
        "plain read": lambda: plain(folder),
        "into new memory": lambda: fresh(folder),
        "moestro": lambda: ours(folder),
    }
    seconds = measure.interleave(variants, args.repeats, args.warmup)
    # Apart from the others: the memory that it lets go takes the machine below a while to return.
    others = {
        name: lambda load=load: load(folder) for name, load in compared.items() if load != ours
    }
    times = measure.interleave(
        {"again": lambda: plain(folder), **others}, args.repeats, args.warmup
    )
    again = times.pop("again")
    seconds |= times
    peaks = {name: peak(name, small, folder) for name in compared}
    rows = [
        {
            "loader": name,
            "seconds": statistics.median(times),
            "GB/s": size / statistics.median(times) / 1e9,
            "of plain read": measure.ratio(
                again if name in others else seconds["plain read"], times
            ),
            "peak MiB": peaks[name] / 2**20 if name in peaks else "",
            "of model + largest": peaks[name] / (size + largest) if name in peaks else "",
        }
        for name, times in seconds.items()
    ]
    claims = {
        "model MiB": size / 2**20,
        "largest tensor MiB": largest / 2**20,
        "shards": len(list(folder.glob("*.safetensors"))),
        "rate over plain read": measure.ratio(seconds["plain read"], seconds["moestro"]),
        "rate over reading into new memory": measure.ratio(
            seconds["into new memory"], seconds["moestro"]
        ),
        "peak over model + largest tensor": peaks["moestro"] / (size + largest),
    }
    measure.report(f"load{args.name}", rows, claims)


def main() -> None:
    parser = measure.arguments(__doc__ or "", repeats=7)
    parser.set_defaults(warmup=1)
    parser.add_argument("--gb", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, small, folder = args.child
        child(name, Path(small), Path(folder))
        return
    with tempfile.TemporaryDirectory() as name:
        small, folder = Path(name, "small"), Path(name, "model")
        make(small, 0.0)
        make(folder, args.gb)
        compare(args, folder, small)


if __name__ == "__main__":
    main()
