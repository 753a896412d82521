"""Fork beside a thread that asks what was read: the child finds nothing locked.

`pthread_mutex_unlock` is replaced in front of the C library: that thread unlocks late.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

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
LATE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>
static __thread int late;
typedef int (*unlocker)(pthread_mutex_t *);
int pthread_mutex_unlock(pthread_mutex_t *mutex) {
    static unlocker real;
    if (!real) real = (unlocker)dlsym(RTLD_NEXT, "pthread_mutex_unlock");
    if (late) usleep(20000);
    return real(mutex);
}
/* Calls a function of two pointers so many times. */
void call_late(int (*function)(void *, void *), void *first, void *second, int times) {
    late = 1;
    while (times--) function(first, second);
    late = 0;
}
"""
CHILD = """
import ctypes, os, signal, sys, threading
from pathlib import Path
from moestro.checkpoints import streamed
from moestro.kernels.native_library import library

late = ctypes.CDLL(sys.argv[2])
residency = streamed.residency_of(streamed.load(Path(sys.argv[1]), [1, 1]))
room = ctypes.create_string_buffer(256)
asked = (library().moestro_residency_counts, residency.handle, room, ctypes.c_int(20))
other = threading.Thread(target=late.call_late, args=asked)
other.start()
ended = []
for _ in range(4):
    child = os.fork()
    if not child:
        signal.alarm(5)
        os._exit(residency.reads().hits)
    ended.append(os.waitpid(child, 0)[1])
other.join()
print(ended, residency.reads().hits)
"""


def test_a_child_does_not_wait_for_a_thread_that_it_does_not_have(tmp_path: Path) -> None:
    torch.manual_seed(0)
    moe = {"hidden_dim": 32, "num_experts": 4, "top_k": 2}
    model = Decoder(ModelConfig(vocab_size=64, dim=32, num_layers=2, moe=moe)).eval()
    pack(model, WEIGHTS["int8"])
    packed_files.save(model, tmp_path / "packed", WEIGHTS["int8"], {})
    (tmp_path / "late.c").write_text(LATE)
    shim = tmp_path / "late.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, tmp_path / "late.c", "-ldl"], check=True)
    made = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path / "packed", shim],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        stdout=subprocess.PIPE, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert made.stdout.strip() == "[0, 0, 0, 0] 0"
