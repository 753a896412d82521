"""One mixture layer forward and backward at equal FLOPs, from 8 to 256 experts.

4096 tokens, D 256, F 512, K 2. Beside each time stands the byte bound: what moving the weights of
all experts (read forward, read backward) and their gradients (written) must take at the copy
bandwidth measured in the same run. Three precisions: float32, bfloat16 weights, and bfloat16 by
autocast over float32 weights, which is how models are trained.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import measure
import torch

from moestro.config import MoEConfig
from moestro.moe.layer import MoE
from moestro.train.memory import keep_freed_memory

TOKENS, DIM, HIDDEN, TOP_K = 4096, 256, 512, 2
EXPERTS = (8, 16, 32, 64, 128, 256)
MODES = ("float32", "bfloat16", "autocast")


def layer_step(num_experts: int, mode: str) -> Callable[[], None]:
    """Forward and backward of a fresh layer, on eight batches in turn."""
    torch.manual_seed(0)
    layer = MoE(MoEConfig(dim=DIM, hidden_dim=HIDDEN, num_experts=num_experts, top_k=TOP_K))
    dtype = torch.float32 if mode == "float32" else torch.bfloat16
    if mode == "bfloat16":
        layer = layer.to(dtype)
    batches = [torch.randn(TOKENS, DIM, dtype=dtype).requires_grad_() for _ in range(8)]
    grad = torch.randn(TOKENS, DIM, dtype=dtype)
    calls = 0

    def step() -> None:
        nonlocal calls
        x = batches[calls % len(batches)]
        calls += 1
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
            y, _ = layer(x)
        y.backward(grad)
        layer.zero_grad()
        x.grad = None

    return step


def copy_bandwidth() -> float:
    """Bytes read plus written per second by a large copy."""
    source = torch.empty(64 * 2**20)
    target = torch.empty_like(source)
    seconds = measure.interleave({"copy": lambda: target.copy_(source)}, 5, 2)["copy"]
    return 2 * source.numel() * 4 / statistics.median(seconds)


def byte_bound(num_experts: int, mode: str, bandwidth: float) -> float:
    """Seconds that moving all experts' weights and gradients takes at least."""
    weights = num_experts * 3 * DIM * HIDDEN * (2 if mode == "bfloat16" else 4)
    return 3 * weights / bandwidth


def main() -> None:
    args = measure.arguments(__doc__ or "", repeats=15).parse_args()
    keep_freed_memory()
    bandwidth = copy_bandwidth()
    rows, claims = [], {"copy bandwidth GB/s": bandwidth / 1e9}
    for mode in MODES:
        steps = {str(n): layer_step(n, mode) for n in EXPERTS}
        seconds = measure.interleave(steps, args.repeats, max(args.warmup, 9))
        for n in EXPERTS:
            rows.append(
                {
                    "dtype": mode,
                    "experts": n,
                    "ms": 1e3 * statistics.median(seconds[str(n)]),
                    "over 8 experts": measure.ratio(seconds[str(n)], seconds["8"]),
                    "byte bound ms": 1e3 * byte_bound(n, mode, bandwidth),
                }
            )
        claims[f"{mode}: time at 64 experts over 8"] = measure.ratio(seconds["64"], seconds["8"])
    measure.report(f"layer_scaling{args.name}", rows, claims)


if __name__ == "__main__":
    main()
