"""One mixture layer forward and backward on a CUDA device, by each kernel backend and by size.

bfloat16 weights; milliseconds, tokens per second and TFLOP/s. `make gpu` runs it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import measure
import torch

from moestro.config import MoEConfig
from moestro.moe.layer import MoE

SIZES = (
    {"tokens": 16384, "dim": 1024, "hidden_dim": 1024, "num_experts": 32, "top_k": 4},
    {"tokens": 16384, "dim": 2048, "hidden_dim": 1024, "num_experts": 64, "top_k": 8},
    {"tokens": 8192, "dim": 4096, "hidden_dim": 14336, "num_experts": 8, "top_k": 2},
)
BACKENDS = ("torch", "segments")


def layer_step(size: dict[str, int], backend: str) -> Callable[[], None]:
    torch.manual_seed(0)
    values = {name: value for name, value in size.items() if name != "tokens"}
    with torch.device("cuda"):
        layer = MoE(MoEConfig(**values), backend).to(torch.bfloat16)
        x = torch.randn(size["tokens"], size["dim"], dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn_like(x)

    def step() -> None:
        y, _ = layer(x)
        y.backward(grad)
        layer.zero_grad()
        x.grad = None

    return step


def main() -> None:
    args = measure.arguments(__doc__ or "", repeats=20).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: this benchmark needs one")
    rows = []
    for size in SIZES:
        steps = {backend: layer_step(size, backend) for backend in BACKENDS}
        seconds = measure.interleave(steps, args.repeats, args.warmup)
        flops = 3 * 2 * size["tokens"] * size["top_k"] * 3 * size["dim"] * size["hidden_dim"]
        for backend, times in seconds.items():
            median = statistics.median(times)
            rows.append(
                {
                    **size,
                    "backend": backend,
                    "ms": 1e3 * median,
                    "tokens_per_s": size["tokens"] / median,
                    "TFLOP/s": flops / median / 1e12,
                }
            )
        del steps
        torch.cuda.empty_cache()
    measure.report(f"gpu_layer{args.name}", rows, {})


if __name__ == "__main__":
    main()
