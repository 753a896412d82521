"""Peak memory of training steps: the mixture against its twin plus the extra experts' own state.

The model of train_step.py in bfloat16 autocast, each variant in a process of its own. The memory
is the peak resident set of the steps minus what the process held before it built the model. The
extra experts' weights, gradients and AdamW moments are 16 bytes for each parameter that the
mixture has and its twin has not.
"""

from __future__ import annotations

import subprocess
import sys

import measure
import torch
import train_step

from moestro.machine import peak_bytes, resident_bytes
from moestro.models.count import count
from moestro.models.twin import dense_twin
from moestro.train.memory import keep_freed_memory

STEPS = 6
BYTES_PER_PARAMETER = 4 + 4 + 8


def child(variant: str) -> None:
    """Print this variant's peak bytes."""
    keep_freed_memory()
    cfg = train_step.CONFIG if variant == "moe" else dense_twin(train_step.CONFIG)
    torch.mm(torch.randn(512, 512).bfloat16(), torch.randn(512, 512).bfloat16())
    before = resident_bytes()
    step = train_step.step_of(*train_step.ours(cfg), torch.bfloat16)
    for _ in range(STEPS):
        step()
    print(peak_bytes() - before)


def main() -> None:
    parser = measure.arguments(__doc__ or "", repeats=3)
    parser.add_argument("--child", choices=["moe", "dense"])
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    peaks: dict[str, list[int]] = {"moe": [], "dense": []}
    for _ in range(args.repeats):
        for variant, found in peaks.items():
            command = [sys.executable, __file__, "--child", variant]
            found.append(int(subprocess.check_output(command, text=True)))
    cfg = train_step.CONFIG
    extra = count(cfg).total - count(dense_twin(cfg)).total
    moe, dense = (sorted(peaks[variant])[args.repeats // 2] for variant in peaks)
    allowed = dense + BYTES_PER_PARAMETER * extra
    rows = [
        {"variant": "mixture", "peak MiB": moe / 2**20},
        {"variant": "dense twin", "peak MiB": dense / 2**20},
        {"variant": "twin + extra experts' state", "peak MiB": allowed / 2**20},
    ]
    measure.report(
        f"step_memory{args.name}", rows, {"mixture over twin + extra experts": moe / allowed}
    )


if __name__ == "__main__":
    main()
