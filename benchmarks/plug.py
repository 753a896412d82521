"""transformers with `experts_implementation="moestro"` against its own, on the CPU in bfloat16.

A Mixtral with random weights, the 1.7B shape of decode.py. All implementations take turns on one
model and its plain weights. Then copies of it are packed whole, experts, projections and head, and
take turns with transformers' best: a row's rate and its ratio are of the same rounds.
"""

from __future__ import annotations

import copy
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
PACKED = ("int8", "int4")
OVER = "over its best"
OWN = ("eager", "grouped_mm", "batched_mm")


def decoding(model: Any, kind: str | None) -> Callable[[], None]:
    """Some tokens through the cache."""
    if kind is not None:
        model.set_experts_implementation(kind)
    first = model(torch.randint(0, model.config.vocab_size, (1, 32)), use_cache=True)
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
    prompt = torch.randint(0, model.config.vocab_size, (1, PROMPT))

    def run() -> None:
        if kind is not None:
            model.set_experts_implementation(kind)
        model(prompt, use_cache=True, logits_to_keep=1)

    return run


def main() -> None:
    parser = measure.arguments(__doc__ or "", repeats=5)
    parser.add_argument("--size", choices=decode.SIZES, default="1.7B")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = decode.theirs(decode.SIZES[args.size], torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moestro.hf.install()
    kinds = (*OWN, "moestro")
    # batched_mm gathers the weights of every token, which a prompt has no memory for.
    prompts = [kind for kind in kinds if kind != "batched_mm"]
    rows: list[dict[str, Any]] = []
    claims: dict[str, float] = {}
    best: dict[str, str] = {}
    for what, make, names, tokens in (
        ("decode", decoding, kinds, TOKENS),
        ("prefill", prefill, prompts, PROMPT),
    ):
        variants = {kind: make(model, kind) for kind in names}
        seconds = measure.interleave(variants, args.repeats, args.warmup)
        fastest = min((k for k in names if k in OWN), key=lambda k: statistics.median(seconds[k]))
        best[what] = fastest
        for kind, times in seconds.items():
            rate = tokens / statistics.median(times)
            over = measure.ratio(seconds[fastest], times)
            rows.append({"what": what, "experts": kind, "tokens/s": rate, OVER: over})
        claims[f"{what} over transformers' best ({fastest})"] = measure.ratio(
            seconds[fastest], seconds["moestro"]
        )
    for kind in PACKED:
        packed = copy.deepcopy(model)
        moestro.hf.quantize(packed, kind, linears=True)
        for what, make, tokens in (("decode", decoding, TOKENS), ("prefill", prefill, PROMPT)):
            variants = {best[what]: make(model, best[what]), kind: make(packed, None)}
            seconds = measure.interleave(variants, args.repeats, args.warmup)
            for name, times in seconds.items():
                named = f"moestro, all {kind}" if name == kind else name
                over = measure.ratio(seconds[best[what]], times)
                rate = tokens / statistics.median(times)
                rows.append({"what": what, "experts": named, "tokens/s": rate, OVER: over})
            claim = measure.ratio(seconds[best[what]], seconds[kind])
            claims[f"{what}, all packed to {kind}, over transformers' best"] = claim
        del packed
    measure.report(f"plug{args.name}", rows, claims)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
