"""What tuning gains and takes: all weights or adapters, of a dense model and a mixture of it.

The conversations are examples/library_chats.py's, and what is measured is the assistant's text
about modules of which nothing was learned: bits per byte before and after, and a sample. Each
tuning is a process of its own; its memory is the peak resident set of all of it. From its last
checkpoint come the bytes that are trained, and those of their optimizer state.

    .venv/bin/python benchmarks/tune.py --quick
    MOESTRO_SMOLLM2=SmolLM2-135M-Instruct.Q4_1.gguf .venv/bin/python benchmarks/tune.py

Without the variable the dense model is a tiny one, trained here first on built-in text. A run that
was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import measure
from measure import ROOT, moestro
from safetensors import safe_open

QUESTION = "What does wrap(text, width=70, **kwargs) of textwrap do?"
WAYS = {
    "all weights": ["--set", "optim.lr=2e-5"],
    "lora": ["--lora", "16"],
    "qlora int8": ["--lora", "16", "--qlora", "int8"],
}
TINY_WAYS = {
    "all weights": ["--set", "optim.lr=5e-4"],
    "lora": ["--lora", "8", "--set", "optim.lr=3e-3"],
    "qlora int8": ["--lora", "8", "--qlora", "int8", "--set", "optim.lr=3e-3"],
}


def dense_model(out: Path, quick: bool) -> tuple[str, str, bool]:
    """The model to begin from, its name, and whether it knows conversations."""
    given = os.environ.get("MOESTRO_SMOLLM2")
    if given:
        return str(Path(given).absolute()), "SmolLM2-135M", True
    sizes = ["model.dim=64", "model.num_layers=2", "model.dense.hidden_dim=128", "train.steps=40"]
    if not quick:
        sizes = ["train.steps=800"]
    sets = [word for each in ("model.moe=null", *sizes) for word in ("--set", each)]
    if not (out / "pretrained").exists():
        shutil.rmtree(out / "begun", ignore_errors=True)
        moestro("train", "--out", out / "begun", *sets)
        (out / "begun").rename(out / "pretrained")
    return str(out / "pretrained"), "tiny", False


def held_out(model: object, chats: Path, tokens: int) -> float:
    """Bits per byte of the assistant's text about modules that nothing was learned of."""
    words = ("--chats", chats / "held.jsonl", "--tokens", tokens, "--weights", "bf16", "--json")
    (row,) = json.loads(moestro("eval", model, *words).text)["rows"]
    return float(row["bits_per_byte"]["all"])


def sample(model: object, chat: bool) -> str:
    """What a model answers, greedily."""
    prompt = [QUESTION, "--chat"] if chat else [f"Question: {QUESTION}\nAnswer:"]
    return moestro("generate", model, *prompt, "--max-tokens", 64, "--temperature", 0).text.strip()


def stored(path: Path) -> int:
    """Bytes of the tensors in a file, or 0 without it."""
    if not path.exists():
        return 0
    with safe_open(str(path), "numpy") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


def tuned(name: str, base: str, way: str, options: list[str], args: argparse.Namespace,
          chats: Path, chat: bool) -> dict[str, Any]:  # fmt: skip
    """One tuning, as a row; one that was made before is read."""
    run = args.out / f"{name}, {way}".replace(" ", "-").replace(",", "")
    path = args.out / f"{run.name}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    shutil.rmtree(run, ignore_errors=True)
    words = [
        "--data", chats / "train.jsonl", "--out", run, "--steps", args.steps,
        "--set", f"data.seq_len={args.seq_len}", "--set", f"train.batch_size={args.batch}",
        "--set", "train.eval_every=1000000", "--set", "train.eval_tokens=4096",
        "--set", "train.save_every=1000000",
    ]  # fmt: skip
    done = moestro("tune", base, *words, *options)
    last = run / "checkpoints" / f"step-{args.steps:06d}"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = stored(last / "adapter.safetensors") or stored(last / "model.safetensors")
    row = {
        "model": name, "trained": way, "before": held_out(base, chats, args.tokens),
        "after": held_out(run, chats, args.tokens), "s / step": lines[-1]["seconds"] / args.steps,
        "trained MB": trained / 1e6, "optimizer MB": stored(last / "optimizer.safetensors") / 1e6,
        "peak MB": done.peak_bytes / 1e6, "sample": sample(run, chat),
    }  # fmt: skip
    print(f"{name}, {way}: {row['before']:.4f} → {row['after']:.4f}", flush=True)
    path.write_text(json.dumps(row))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, of a tiny model")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32_768, help="held out")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "tune")
    args = parser.parse_args()
    args.out = args.out.absolute()
    if args.quick:
        args.steps, args.batch, args.tokens = min(args.steps, 10), min(args.batch, 2), 4096
    lasting = ("quick", "steps", "batch", "seq_len", "tokens")  # alike in all runs
    measure.claim(args.out, {name: getattr(args, name) for name in lasting})
    dense, name, chat = dense_model(args.out, args.quick)
    chats = args.out / "chats"
    words = [sys.executable, ROOT / "examples" / "library_chats.py", chats]
    words += [*([] if chat else ["--plain"]), *(["--most", "150"] if args.quick else [])]
    shutil.rmtree(chats, ignore_errors=True)
    subprocess.run(words, check=True)
    if not (args.out / "mixture").exists():  # it appears whole or not at all
        moestro("upcycle", dense, args.out / "mixture", "--experts", 8, "--top-k", 2)
    print(f"before: {sample(dense, chat)}")
    rows = [
        tuned(model, base, way, (WAYS if chat else TINY_WAYS)[way], args, chats, chat)
        for model, base in ((name, dense), (f"{name} as 8 experts", str(args.out / "mixture")))
        for way in args.ways
    ]
    claims: dict[str, Any] = {"before": sample(dense, chat)}
    for row in rows:
        claims[f"{row['model']}, {row['trained']}"] = row.pop("sample")
    for model in dict.fromkeys(row["model"] for row in rows):
        peaks = {row["trained"]: row["peak MB"] for row in rows if row["model"] == model}
        for way in peaks.keys() - {"all weights"}:
            if "all weights" in peaks:
                claims[f"{model}: peak of {way} / all weights"] = peaks[way] / peaks["all weights"]
    measure.report("tune" + "-quick" * args.quick, rows, claims)
    if args.quick:
        shutil.rmtree(args.out)


if __name__ == "__main__":
    main()
