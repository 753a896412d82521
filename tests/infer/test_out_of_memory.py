"""A native step that finds no memory: an error, and the next step as if it had not been."""

import subprocess
import sys

import pytest

from moestro.kernels import native_cpu

pytestmark = [
    pytest.mark.skipif(native_cpu.available() is not None, reason=str(native_cpu.available())),
    pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does"),
]

# In a process of its own, since the limit holds for all of it.
PROGRAM = """
import resource, sys, torch
from moestro.config import ModelConfig
from moestro.infer.native_decoder import NativeDecoder
from moestro.models.decoder import Decoder

torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[1]))
wide = {"hidden_dim": 65536}
feed_forward = {"dense": wide} if sys.argv[2] == "dense" else {
    "moe": {**wide, "num_experts": 2, "top_k": 1}
}
attention = {"num_heads": 1, "head_dim": 8, "context": 8192, "window": {"size": 4}}
model = Decoder(ModelConfig(dim=8, num_layers=1, attention=attention, **feed_forward)).eval()
native, long = NativeDecoder(model), [1, 2, 3] * 1200
want = native.step([[1, 2]], [model.new_cache()]).logits_NV
used = 4096 * int(open("/proc/self/statm").read().split()[0])
_, most = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20), most))
for _ in range(2):
    past = model.new_cache()
    try:
        native.step([long], [past])
        sys.exit("it fits")
    except MemoryError as error:
        assert past.position == 0
        print(error)
    assert torch.equal(native.step([[1, 2]], [model.new_cache()]).logits_NV, want)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
native.step([long], [past])
assert torch.equal(native.step([[1, 2]], [model.new_cache()]).logits_NV, want)
"""


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_a_step_without_memory_is_an_error(kind: str, threads: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(threads), kind],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "not enough memory for the native kernels' buffers\n" * 2
