r"""Tokens per second of llama.cpp over given tokens, one at a time: what `memory.py` compares with.

Runs in an environment of its own that has the package xllamacpp, llama.cpp's server as a library.
A prompt that passes in batches of one token is decoding of a known text; the first half warms up.

    python3 -m venv peer && peer/bin/pip install xllamacpp
    .venv/bin/python benchmarks/memory.py --run runs/memory \
        --compare "llama.cpp, mapped=peer/bin/python benchmarks/llama_cpp.py --load MMAP" \
        --compare "llama.cpp, direct=peer/bin/python benchmarks/llama_cpp.py --load DIRECT_IO"
"""

import argparse
import json
from pathlib import Path

import xllamacpp


def main() -> None:
    """See the top."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--tokens", type=Path, required=True, help="JSON: a list of numbers")
    parser.add_argument("--load", default="MMAP", help="MMAP, DIRECT_IO or NONE")
    args = parser.parse_args()
    tokens = json.loads(args.tokens.read_text())
    half = len(tokens) // 2
    params = xllamacpp.CommonParams()
    params.model.path = args.model
    params.load_mode = getattr(xllamacpp.llama_load_mode, f"LLAMA_LOAD_MODE_{args.load}")
    params.n_ctx, params.n_parallel = half + 64, 1
    params.n_batch, params.n_ubatch = 2, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    params.fit_params = False  # the context is given
    params.verbosity = 0
    server = xllamacpp.Server(params)
    for part in (tokens[:half], tokens[half:]):
        asked = {"prompt": part, "max_tokens": 1, "temperature": 0.0, "cache_prompt": False}
        timings = server.handle_completions(asked)["timings"]
    assert timings["prompt_n"] == len(tokens) - half
    print(json.dumps({"tokens_per_s": timings["prompt_per_second"]}))


if __name__ == "__main__":
    main()
