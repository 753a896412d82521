"""Decoding and prefill of one GGUF file, as it is stored, beside other programs: tokens per second.

    python benchmarks/gguf_speed.py FILE.gguf --compare "llama.cpp=/path/to/llama-bench -fa 1"

Programs take turns on the same file with the same number of threads (OMP_NUM_THREADS); each round
reads a prompt of random tokens and decodes after it. `--convert` also times the first start, which
packs the file and keeps what it packed: MB of the file per second, all else included, and the CPU
time that it takes, which other programs change less.
"""

from __future__ import annotations

import shlex
import statistics
import tempfile
import time
import warnings
from contextlib import ExitStack
from pathlib import Path

import measure
import torch

from moestro.bench.peers import llama_rounds
from moestro.bench.speed import rounds_of
from moestro.checkpoints.gguf.header import read_parts
from moestro.checkpoints.opening import open_checkpoint


def main() -> None:
    parser = measure.arguments(__doc__ or "", repeats=7)
    parser.add_argument("file", type=Path)
    parser.add_argument("--compare", action="append", default=[], metavar="NAME=PROGRAM OPTIONS")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--convert", action="store_true")
    args = parser.parse_args()
    size = sum(header.file.stat().st_size for header in read_parts(args.file))
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        file = args.file
        if args.convert:  # what is packed lies beside the file, so a new place has nothing yet
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=args.file.parent))
            file = Path(folder) / args.file.name
            file.hardlink_to(args.file)
        start, worked = time.perf_counter(), time.process_time()
        model = open_checkpoint(file).model
        opened, worked = time.perf_counter() - start, time.process_time() - worked
    variants = {"moestro": rounds_of(model, args.prompt, args.tokens)}
    for each in args.compare:
        name, _, program = each.partition("=")
        words = (shlex.split(program), args.file, args.prompt, args.tokens)
        variants[name] = llama_rounds(*words, torch.get_num_threads())
    made = {name: [] for name in variants}
    for turn in range(args.warmup + args.repeats):
        for name, run in variants.items():
            with torch.inference_mode():
                each_round = run()
            if turn >= args.warmup:
                made[name].append(each_round)
    rows = [
        {
            "program": name,
            "prefill tokens/s": args.prompt / statistics.median(each.prefill_s for each in rounds),
            "decode tokens/s": args.tokens / statistics.median(each.decode_s for each in rounds),
        }
        for name, rounds in made.items()
    ]
    claims = {
        f"{what} over {row['program']}": rows[0][f"{what} tokens/s"] / row[f"{what} tokens/s"]
        for row in rows[1:]
        for what in ("prefill", "decode")
    }
    claims |= {"file": args.file.name, "prompt": args.prompt, "tokens": args.tokens}
    if args.convert:
        claims["packed, MB of the file per second"] = size / 1e6 / opened
        claims["packed, s of CPU per GB of the file"] = worked / (size / 1e9)
    measure.report(f"gguf_speed{args.name}", rows, claims)


if __name__ == "__main__":
    main()
