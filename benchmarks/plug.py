"""transformers with `experts_implementation="moestro"` against its own, on the CPU in bfloat16.

A Mixtral with random weights, the 1.7B shape of decode.py. All implementations take turns on one
model and its plain weights; then experts are packed to int8 and to int4, and the plug runs again
beside nothing else, since packing replaces the weights.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import Any

import decode
import measure
import torch

import moestro.hf
from moestro.bench.peers import cache_of

PROMPT, TOKENS = 512, 12
OWN = ("eager", "grouped_mm", "batched_mm")
SIZE = decode.SIZES["1.7B"]


def decoding(model: Any, kind: str | None) -> Callable[[], None]:
    """Some tokens through the cache."""
    if kind is not None:
        model.set_experts_implementation(kind)
    first = model(torch.randint(0, SIZE["vocab"], (1, 32)), use_cache=True)
    tokens, cache = first.logits[:, -1:].argmax(-1), cache_of(first)

    def run() -> None:
        nonlocal tokens
        if kind is not None:
            model.set_experts_implementation(kind)
        for _ in range(TOKENS):
            output = model(tokens, use_cache=True, **cache)
            tokens = output.logits[:, -1:].argmax(-1)

    return run


def prefill(model: Any, kind: str | None) -> Callable[[], None]:
    """A prompt, whose last logits alone are asked for, as in generation."""
    prompt = torch.randint(0, SIZE["vocab"], (1, PROMPT))

    def run() -> None:
        if kind is not None:
            model.set_experts_implementation(kind)
        model(prompt, use_cache=True, logits_to_keep=1)

    return run


def main() -> None:
    args = measure.arguments(__doc__ or "", repeats=5).parse_args()
    torch.manual_seed(0)
    model = decode.theirs(SIZE, torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moestro.hf.install()
    kinds = (*OWN, "moestro")
    # batched_mm gathers the weights of every token, which a prompt has no memory for.
    prompts = [kind for kind in kinds if kind != "batched_mm"]
    rows: list[dict[str, Any]] = []
    claims: dict[str, float] = {}
    for what, make, names, tokens in (
        ("decode", decoding, kinds, TOKENS),
        ("prefill", prefill, prompts, PROMPT),
    ):
        variants = {kind: make(model, kind) for kind in names}
        seconds = measure.interleave(variants, args.repeats, args.warmup)
        best = min((k for k in names if k in OWN), key=lambda k: statistics.median(seconds[k]))
        for kind, times in seconds.items():
            rate = tokens / statistics.median(times)
            over = measure.ratio(seconds[best], times)
            rows.append({"what": what, "experts": kind, "tokens/s": rate, "over its best": over})
        claims[f"{what} over transformers' best ({best})"] = measure.ratio(
            seconds[best], seconds["moestro"]
        )
    moestro.hf.quantize(model, "int8", group=64)
    for what, make, tokens in (("decode", decoding, TOKENS), ("prefill", prefill, PROMPT)):
        seconds = measure.interleave({"int8": make(model, None)}, args.repeats, args.warmup)
        rate = tokens / statistics.median(seconds["int8"])
        rows.append({"what": what, "experts": "moestro int8", "tokens/s": rate})
    measure.report(f"plug{args.name}", rows, claims)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
