"""Perplexity of a text over a GGUF file: packed as it is stored, in fp32, and through llama.cpp.

All read the same tokens in the same windows, each from an empty cache; every token of a window but
its first is predicted from those before it. The packed model is measured as it decodes (fp32
between its matrices, keys and values in bf16), and by its own forward, in bf16. Errors are standard
errors of the mean difference over windows. Where differences of losses drown in these, the mean
KL divergence from fp32 still tells how far each is from the numbers that the file stands for.
llama.cpp is any build's shared library:

    python benchmarks/perplexity.py FILE.gguf TEXT --compare llama.cpp=/path/to/libllama.so

Its defaults hold: keys and values in fp16, rows rounded to 8 bits as its kinds of blocks ask for.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import measure
import numpy as np
import torch
from torch import Tensor

from moestro.checkpoints.opening import open_checkpoint
from moestro.infer.native_decoder import AsDecoded
from moestro.text import load_tokenizer

Logits = Callable[[Tensor], Tensor]  # [S] → [S, V]


class Batch(ctypes.Structure):
    """`llama_batch` of llama.h."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32), ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p), ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )  # fmt: skip


class Settings(ctypes.Structure):
    """Parameters of llama.h, of which only the first four are known here.

    The rest stays as the library's defaults have it. Longer than any version's: x86-64 and aarch64
    pass a large structure in memory, of which a function reads its own part.
    """

    _fields_ = (("first", ctypes.c_uint32 * 4), ("others", ctypes.c_uint8 * 1008))


def llama_cpp(library: Path, file: Path, window: int, vocab: int) -> Logits:
    """llama.cpp's logits."""
    lib: Any = ctypes.CDLL(str(library))
    for name, result in (
        ("llama_model_default_params", Settings), ("llama_context_default_params", Settings),
        ("llama_model_load_from_file", ctypes.c_void_p), ("llama_init_from_model", ctypes.c_void_p),
        ("llama_get_memory", ctypes.c_void_p), ("llama_batch_init", Batch),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float)),
    ):  # fmt: skip
        getattr(lib, name).restype = result
    lib.llama_log_set(_SILENT, None)
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    model = lib.llama_model_load_from_file(str(file).encode(), params)
    settings = lib.llama_context_default_params()
    settings.first[:] = (window, window, window, 1)  # n_ctx, n_batch, n_ubatch, n_seq_max
    context = lib.llama_init_from_model(ctypes.c_void_p(model), settings)
    if not model or not context:
        raise SystemExit(f"{library} cannot open {file}")
    context = ctypes.c_void_p(context)
    lib.llama_set_n_threads(context, torch.get_num_threads(), torch.get_num_threads())
    batch = lib.llama_batch_init(window, 0, 1)

    def logits(tokens_S: Tensor) -> Tensor:
        lib.llama_memory_clear(ctypes.c_void_p(lib.llama_get_memory(context)), True)
        batch.n_tokens = len(tokens_S)
        for place, token in enumerate(tokens_S.tolist()):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, 1
        if lib.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")
        rows = (lib.llama_get_logits_ith(context, place) for place in range(len(tokens_S)))
        return torch.from_numpy(np.stack([np.ctypeslib.as_array(r, (vocab,)) for r in rows]))

    return logits


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
    lambda level, text, data: None
)


def opened(file: Path, **how: Any) -> tuple[Any, Path]:
    """This project's model, and the folder with its tokenizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = open_checkpoint(file, **how)
    return found.model.eval(), found.folder


def logits_of(model: Any) -> Logits:
    """Its logits."""
    return lambda tokens_S: model(tokens_S[None]).logits[0].float()


class Found(NamedTuple):
    """Of each window: summed negative log-likelihood and KL divergence; and seconds of CPU."""

    loss_W: Tensor
    divergence_W: Tensor
    seconds: float


def measured(variants: dict[str, Logits], windows_WS: Tensor) -> dict[str, Found]:
    """All variants on each window; divergences are from the first."""
    losses: dict[str, list[Tensor]] = {name: [] for name in variants}
    divergences: dict[str, list[Tensor]] = {name: [] for name in variants}
    seconds = dict.fromkeys(variants, 0.0)
    for tokens_S in windows_WS:
        first_SV: Tensor | None = None
        for name, logits in variants.items():
            start = time.process_time()
            found_SV = logits(tokens_S)[:-1].log_softmax(-1)
            seconds[name] += time.process_time() - start
            first_SV = found_SV if first_SV is None else first_SV
            wanted_S = torch.nn.functional.nll_loss(found_SV, tokens_S[1:], reduction="none")
            losses[name].append(wanted_S.double().sum())
            apart_S = (first_SV.exp() * (first_SV - found_SV)).sum(-1)
            divergences[name].append(apart_S.double().sum())
    return {
        name: Found(torch.stack(losses[name]), torch.stack(divergences[name]), seconds[name])
        for name in variants
    }


def over(loss_W: Tensor, other_W: Tensor, count: int) -> tuple[float, float]:
    """By how many per cent a perplexity is above another, and the standard error of that."""
    difference_W = (loss_W - other_W) * len(loss_W) / count
    error = difference_W.std() / len(loss_W) ** 0.5
    return 100 * math.expm1(difference_W.mean()), 100 * error.item()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--compare", action="append", default=[], metavar="NAME=LIBRARY")
    parser.add_argument("--name", default="", help="suffix of the result file")
    args = parser.parse_args()
    model, folder = opened(args.file)
    ids = load_tokenizer(folder).encode_prompt(args.text.read_text())
    windows_WS = torch.tensor(ids[: args.windows * args.window]).view(-1, args.window)
    vocab = model.cfg.vocab_size
    count = windows_WS[:, 1:].numel()
    first, decoded, forward = "fp32", "packed, as it decodes", "packed, its own forward in bf16"
    variants = {
        first: logits_of(opened(args.file, dtype="fp32")[0]),
        decoded: logits_of(AsDecoded(model)),
        forward: logits_of(model),
    }
    for each in args.compare:
        name, _, library = each.partition("=")
        variants[name] = llama_cpp(Path(library), args.file, args.window, vocab)
    found = measured(variants, windows_WS)
    rows = []
    for name, each in found.items():
        above, error = over(each.loss_W, found[first].loss_W, count)
        rows.append(
            {
                "variant": name,
                "perplexity": math.exp(each.loss_W.sum() / count),
                "over fp32, %": above,
                "±": error,
                "divergence from fp32, 1e-4": 1e4 * each.divergence_W.sum().item() / count,
                "tokens": count,
                "CPU seconds": each.seconds,
            }
        )
    claims: dict[str, Any] = {"file": args.file.name, "windows": list(windows_WS.shape)}
    for name in list(found)[3:]:
        for mine in (decoded, forward):
            ratio, error = over(found[mine].loss_W, found[name].loss_W, count)
            claims[f"{mine}, over {name}, % (aim: within 0.1)"] = f"{ratio:.3f} ± {error:.3f}"
    measure.report(f"perplexity{args.name}", rows, claims)


if __name__ == "__main__":
    main()
