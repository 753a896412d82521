"""Decoding token by token on the CPU against transformers, both eager: tokens per second.

Two Mixtrals with random weights: a tiny one, where calls cost, and one of 1.7 billion parameters
(16 layers, D 1024, F 1024, 32 experts, K 4, 16 heads, 4 key/value heads), where reading weights
does. transformers runs with each of its own expert implementations; its best counts. Each variant
continues its own cache; they take turns. Weights are plain, as loaded.
"""

from __future__ import annotations

import gc
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import measure
import torch

from moestro import Decoder, ModelConfig
from moestro.bench.peers import cache_of
from moestro.infer.native_decoder import NativeDecoder
from moestro.models.count import count

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"layers": 4, "dim": 128, "hidden": 128, "experts": 8, "top_k": 2, "heads": 4,
             "groups": 2, "vocab": 1000},
    "1.7B": {"layers": 16, "dim": 1024, "hidden": 1024, "experts": 32, "top_k": 4, "heads": 16,
             "groups": 4, "vocab": 32000},
}  # fmt: skip
CONTEXT, PROMPT, TOKENS = 1024, 32, 16
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TARGETS = {"bfloat16": 2.0, "float32": 1.3}


def ours(size: dict[str, int], dtype: torch.dtype) -> Decoder:
    """This project's model."""
    cfg = ModelConfig(
        vocab_size=size["vocab"],
        dim=size["dim"],
        num_layers=size["layers"],
        attention={
            "num_heads": size["heads"],
            "num_kv_heads": size["groups"],
            "context": CONTEXT,
        },
        moe={
            "hidden_dim": size["hidden"],
            "num_experts": size["experts"],
            "top_k": size["top_k"],
        },
        head={"tied": False},
    )
    return Decoder(cfg).to(dtype).eval()


def theirs(size: dict[str, int], dtype: torch.dtype) -> Any:
    """The same shape in transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        config = transformers.MixtralConfig(
            vocab_size=size["vocab"],
            hidden_size=size["dim"],
            intermediate_size=size["hidden"],
            num_hidden_layers=size["layers"],
            num_attention_heads=size["heads"],
            num_key_value_heads=size["groups"],
            num_local_experts=size["experts"],
            num_experts_per_tok=size["top_k"],
            max_position_embeddings=CONTEXT,
            sliding_window=None,
        )
        torch.set_default_dtype(dtype)
        try:
            model = transformers.MixtralForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
        return model.eval()


def our_steps(model: Decoder, vocab: int) -> Callable[[], None]:
    """Decode some tokens, each the likeliest after the last."""
    cache = model.new_cache()
    tokens = model(torch.randint(0, vocab, (1, PROMPT)), cache=cache).logits[:, -1:].argmax(-1)

    def run() -> None:
        nonlocal tokens
        for _ in range(TOKENS):
            tokens = model(tokens, cache=cache).logits[:, -1:].argmax(-1)

    return run


def native_steps(model: Decoder, vocab: int) -> Callable[[], None]:
    """The same through the native step, which is what `moestro generate` does."""
    native, cache = NativeDecoder(model), model.new_cache()
    logits = model(torch.randint(0, vocab, (1, PROMPT)), cache=cache).logits[:, -1]
    token = int(logits.argmax())

    def run() -> None:
        nonlocal token
        for _ in range(TOKENS):
            token = int(native.step([[token]], [cache]).logits_NV.argmax())

    return run


def their_steps(model: Any, kind: str, vocab: int) -> Callable[[], None]:
    """The same with transformers' own cache and one of its expert implementations."""
    model.set_experts_implementation(kind)
    first = model(torch.randint(0, vocab, (1, PROMPT)), use_cache=True)
    tokens, cache = first.logits[:, -1:].argmax(-1), cache_of(first)

    def run() -> None:
        nonlocal tokens
        model.set_experts_implementation(kind)
        for _ in range(TOKENS):
            output = model(tokens, use_cache=True, **cache)
            tokens = output.logits[:, -1:].argmax(-1)

    return run


def main() -> None:
    parser = measure.arguments(__doc__ or "", repeats=9)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    args = parser.parse_args()
    rows, claims = [], {}
    for name, size in SIZES.items():
        for dtype_name, dtype in ((args.dtype, DTYPES[args.dtype]),):
            torch.manual_seed(0)
            model, other = ours(size, dtype), theirs(size, dtype)
            variants = {
                "moestro": native_steps(model, size["vocab"]),
                "moestro, torch alone": our_steps(model, size["vocab"]),
            }
            for kind in ("eager", "grouped_mm", "batched_mm"):
                variants[f"transformers {kind}"] = their_steps(other, kind, size["vocab"])
            with torch.inference_mode():
                seconds = measure.interleave(variants, args.repeats, args.warmup)
            active = count(model.cfg).matmul * dtype.itemsize
            for variant, times in seconds.items():
                rate = TOKENS / statistics.median(times)
                rows.append(
                    {
                        "model": name,
                        "dtype": dtype_name,
                        "variant": variant,
                        "tokens/s": rate,
                        "weights GB/s": rate * active / 1e9,
                        "over it": measure.ratio(times, seconds["moestro"]),
                    }
                )
            best = min(
                (each for each in seconds if each.startswith("transformers")),
                key=lambda each: statistics.median(seconds[each]),
            )
            claim = f"{name} {dtype_name} over transformers' best (aim {TARGETS[dtype_name]})"
            claims[claim] = measure.ratio(seconds[best], seconds["moestro"])
            del model, other, variants
            gc.collect()
    measure.report(f"decode_{args.dtype}{args.name}", rows, claims)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
