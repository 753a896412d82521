"""A disk that fails or is slow, below a process of its own: errors with a name, never wrong text.

`pread` is replaced in front of the C library, so that what the native readers meet is a real EIO.
"""

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch

from moestro.checkpoints import packed_files
from moestro.checkpoints.quantize import WEIGHTS, pack
from moestro.config import ModelConfig
from moestro.kernels import native_cpu
from moestro.models.decoder import Decoder

pytestmark = [
    pytest.mark.skipif(native_cpu.available() is not None, reason=str(native_cpu.available())),
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is of Linux"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
]
# As the file DISK says: "fail" at every read, or so many MB/s in all; a half each time.
DISK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
typedef ssize_t (*reader)(int, void *, size_t, off64_t);
static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;
ssize_t pread64(int fd, void *to, size_t count, off64_t at) {
    static reader real;
    if (!real) real = (reader)dlsym(RTLD_NEXT, "pread64");
    char how[16] = "0";
    FILE *file = fopen(getenv("DISK"), "r");
    if (file) { if (!fgets(how, sizeof how, file)) how[0] = '0'; fclose(file); }
    if (!strncmp(how, "fail", 4)) { errno = EIO; return -1; }
    if (atoi(how) > 0) {
        if (count > 4096) count = count / 8192 * 4096;
        pthread_mutex_lock(&one);
        usleep(count / atoi(how));
        pthread_mutex_unlock(&one);
    }
    return real(fd, to, count, at);
}
ssize_t pread(int fd, void *to, size_t count, off_t at) { return pread64(fd, to, count, at); }
"""
CHILD = """
import hashlib, json, sys, time
from pathlib import Path
from moestro.checkpoints import packed_files, streamed
from moestro.errors import CheckpointError
from moestro.infer.native_decoder import NativeDecoder

path, disk = Path(sys.argv[1]), Path(sys.argv[2])
def write(model):
    decoder, past, digest = NativeDecoder(model), model.new_cache(1), hashlib.sha256()
    for token in range(6):
        digest.update(decoder.step([[token]], [past]).logits_NV.numpy().tobytes())
    return digest.hexdigest()
model = streamed.load(path, [1, 1])
found = {"mapped": write(packed_files.load(path)), "well": write(model)}
residency = streamed.residency_of(model)
before = residency.reads()
disk.write_text("fail")
try:
    write(model)
except CheckpointError as error:
    found["error"] = str(error)
disk.write_text("5")
failed, start = residency.reads(), time.perf_counter()
found["slow"] = write(model)
made = residency.reads().since(failed)
found |= {"took_s": time.perf_counter() - start, "waited_s": made.waited_s, "bytes": made.bytes}
disk.write_text("0")
found["again"] = write(model)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process saw of a disk that fails, then is slow, then well again."""
    folder = tmp_path_factory.mktemp("disk")
    torch.manual_seed(0)
    moe = {"hidden_dim": 64, "num_experts": 6, "top_k": 2}
    cfg = ModelConfig(vocab_size=64, dim=64, num_layers=2, moe=moe)
    model = Decoder(cfg).eval()
    pack(model, WEIGHTS["int8"])
    packed_files.save(model, folder / "packed", WEIGHTS["int8"], {})
    (folder / "disk.c").write_text(DISK)
    library, disk = folder / "disk.so", folder / "disk"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, folder / "disk.c", "-ldl"], check=True)
    disk.write_text("0")
    made = subprocess.run(
        [sys.executable, "-c", CHILD, folder / "packed", disk],
        env={**os.environ, "LD_PRELOAD": str(library), "DISK": str(disk)},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return {**json.loads(made.stdout), "file": str(folder / "packed")}


def test_a_failing_disk_is_an_error_that_names_the_file(found: dict[str, Any]) -> None:
    assert found["error"].startswith(f"cannot read {found['file']} at byte ")
    assert os.strerror(5) in found["error"]


def test_a_slow_disk_that_gives_less_than_was_asked_for_is_only_slow(found: dict[str, Any]) -> None:
    assert found["well"] == found["slow"] == found["mapped"]
    assert found["bytes"] > 100_000
    assert found["took_s"] >= found["bytes"] / 5e6
    assert found["waited_s"] > 0.5 * found["bytes"] / 5e6


def test_the_process_is_usable_afterwards(found: dict[str, Any]) -> None:
    assert found["again"] == found["mapped"]
