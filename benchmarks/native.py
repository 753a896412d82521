"""The native experts alone: bandwidth of decoding, arithmetic of prefill, cost of more experts.

Random experts in several layers take turns, so that what is read comes from memory and not from a
cache. The read bandwidth and a 4096³ product of torch are measured in the same run, in turns.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable

import measure
import torch

from moestro.kernels import native_cpu
from moestro.kernels.packing import ExpertSlabs, Format

DIM = HIDDEN = 1024
ROWS_FP32 = 0  # MOESTRO_ROWS_F32 of native/moestro.h
NUM_EXPERTS, TOP_K, LAYERS, STEPS, PROMPT = 32, 4, 6, 48, 512
FORMATS = {
    "bf16": Format("bfloat16"),
    "int8, 64": Format("int8", 64),
    "int8, 32": Format("int8", 32),
    "int4, 64": Format("int4", 64),
    "int4, 32": Format("int4", 32),
}


def packed(format: Format, num_experts: int, layers: int) -> list[ExpertSlabs]:
    """Layers of random experts; packed once and copied, since values do not change the time."""
    up_HD, down_DF = torch.randn(2 * HIDDEN, DIM) * 0.03, torch.randn(DIM, HIDDEN) * 0.03
    slab = native_cpu.slab_bytes(DIM, HIDDEN, "swiglu", format)
    one = native_cpu.aligned(slab)
    native_cpu.pack_expert(up_HD, down_DF, "swiglu", format, one)
    made = []
    for _ in range(layers):
        data = native_cpu.aligned(slab * num_experts)
        data.view(num_experts, slab).copy_(one.expand(num_experts, slab))
        made.append(ExpertSlabs(data, num_experts, DIM, HIDDEN, "swiglu", format))
    return made


def decoding(
    format: Format, num_experts: int = NUM_EXPERTS, layers: int = LAYERS
) -> Callable[[], None]:
    """One token through a layer, again and again, its experts drawn anew each time.

    The C function is called as the native decoding step calls it: with its arguments at hand, not
    through the checks of `native_cpu.mixture`, which take some 15 µs of Python a call.
    """
    experts = packed(format, num_experts, layers)
    chosen = [torch.randperm(num_experts)[:TOP_K] for _ in range(256)]
    x_TD, y_TD = torch.randn(1, DIM), torch.empty(1, DIM)
    weights_A, tokens_A = torch.full((TOP_K,), 1 / TOP_K), torch.zeros(TOP_K, dtype=torch.int64)
    # Beside each struct its tensors, which it only points to.
    prepared = [(native_cpu.experts_of(each), each) for each in experts]
    mixture = native_cpu.library().moestro_mixture
    turn = 0

    def run() -> None:
        nonlocal turn
        for _ in range(STEPS):
            struct, _ = prepared[turn % len(prepared)]
            failed = mixture(
                ctypes.byref(struct), ROWS_FP32, x_TD.data_ptr(), 1, tokens_A.data_ptr(),
                chosen[turn % len(chosen)].data_ptr(), weights_A.data_ptr(), TOP_K, y_TD.data_ptr(),
            )  # fmt: skip
            assert not failed
            turn += 1

    return run


def prefill(format: Format) -> Callable[[], None]:
    """A prompt through some layers, routed at random."""
    experts = packed(format, NUM_EXPERTS, 3)
    x_TD = torch.randn(PROMPT, DIM)
    tokens_A = torch.arange(PROMPT).repeat_interleave(TOP_K)
    experts_A = torch.cat([torch.randperm(NUM_EXPERTS)[:TOP_K] for _ in range(PROMPT)])
    weights_A = torch.full((PROMPT * TOP_K,), 1 / TOP_K)

    def run() -> None:
        for which in experts:
            native_cpu.mixture(which, x_TD, tokens_A, experts_A, weights_A)

    return run


def main() -> None:
    args = measure.arguments(__doc__ or "", repeats=15).parse_args()
    torch.manual_seed(0)
    memory = torch.ones(1 << 29, dtype=torch.uint8)
    square = torch.randn(4096, 4096).bfloat16()
    decode = {f"decode {name}": decoding(format) for name, format in FORMATS.items()}
    seconds = measure.interleave(
        {"read": lambda: native_cpu.read(memory), **decode}, args.repeats, args.warmup
    )
    read = memory.numel() / statistics.median(seconds["read"])
    rows, claims = [], {"read GB/s": read / 1e9}
    for name, format in FORMATS.items():
        bytes_read = STEPS * TOP_K * native_cpu.slab_bytes(DIM, HIDDEN, "swiglu", format)
        share = measure.ratio(seconds["read"], seconds[f"decode {name}"])
        share *= bytes_read / memory.numel()
        rate = bytes_read / statistics.median(seconds[f"decode {name}"])
        rows.append({"measure": f"decode {name}", "rate": rate / 1e9, "unit": "GB/s", "of": share})
        claims[f"share of read bandwidth, {name}"] = share
    del decode

    variants: dict[str, Callable[[], object]] = {name: prefill(f) for name, f in FORMATS.items()}
    seconds = measure.interleave(
        {"torch": lambda: square @ square, **variants}, args.repeats, args.warmup
    )
    flops = 3 * PROMPT * TOP_K * 6 * DIM * HIDDEN
    for name in FORMATS:
        share = measure.ratio(seconds["torch"], seconds[name]) * flops / (2 * 4096**3)
        rate = flops / statistics.median(seconds[name])
        rows.append(
            {"measure": f"prefill {name}", "rate": rate / 1e12, "unit": "TFLOP/s", "of": share}
        )
        claims[f"prefill over torch's 4096³ product in bf16, {name}"] = share
    rate = 2 * 4096**3 / statistics.median(seconds["torch"])
    rows.append({"measure": "torch 4096³ bf16", "rate": rate / 1e12, "unit": "TFLOP/s", "of": 1.0})
    del variants

    counts = (8, 16, 32, 64, 128)
    by_count = {str(n): decoding(FORMATS["int8, 64"], n, max(1, 256 // n)) for n in counts}
    seconds = measure.interleave(by_count, args.repeats, args.warmup)
    for n in counts:
        share = measure.ratio(seconds["8"], seconds[str(n)])
        rows.append(
            {
                "measure": f"decode int8, {n} experts",
                "rate": 1 / share,
                "unit": "× 8 experts",
                "of": share,
            }
        )
    claims["decode with 128 experts over 8"] = measure.ratio(seconds["128"], seconds["8"])
    measure.report(f"native{args.name}", rows, claims)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
