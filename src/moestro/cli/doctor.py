"""`moestro doctor`: this machine, what it can run, and which defaults follow."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.util import find_spec
from typing import Any

import typer

from moestro.cli.options import AsJson
from moestro.machine import cpu_name, memory_bytes

EXTRAS = {
    "gguf": ("writing GGUF, and reading its rarer kinds", "pip install 'moestro[gguf]'"),
    "transformers": ("reading and writing Hugging Face models", "pip install 'moestro[hf]'"),
    "uvicorn": ("serving over HTTP", "pip install 'moestro[serve]'"),
    "tensorboard": ("training curves in TensorBoard", "pip install 'moestro[tensorboard]'"),
}
# Those that decide which dtypes are fast.
CPU_FEATURES = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512_f", "avx2")
GIB = 2**30
# What each path of the native kernels is made of.
_NATIVE_NEEDS = {
    "amx": "AMX tiles for many rows, AVX-512 with VNNI for few",
    "avx512": "AVX-512 with VNNI",
    "avx2-vnni": "AVX2 with FMA and VNNI",
    "avx2": "AVX2 with FMA",
    "portable": "plain C++, without AVX2",
}


def doctor(
    as_json: AsJson = False,
) -> None:
    """Show what this machine can run, and why.

    Python, torch, the processor and its memory, the default dtype of training, the native
    kernels' path, the optional packages, and the kernel backends with
    the reason for each, by use: train (experts with gradients), infer (without), packed (packed
    weights), step (a token through a whole decoder). The environment variable MOESTRO_BACKEND
    forces one backend, MOESTRO_NATIVE_PATH a lower path of the native kernels.
    """
    facts = _facts()
    typer.echo(json.dumps(facts, indent=2) if as_json else _text(facts))


def _facts() -> dict[str, Any]:
    """Everything the verb prints; sizes in bytes."""
    import torch

    from moestro.errors import BackendError
    from moestro.kernels.backends import ENVIRONMENT, Work, choose, table

    problem = None
    try:
        choose("auto", Work("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16))
    except BackendError as error:
        problem = str(error)
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    features = {name: bool(known.get(name, False)) for name in CPU_FEATURES}
    cuda = _cuda()
    dtype, reason = _default_dtype(features, cuda)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": {
            "name": cpu_name(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "memory_bytes": memory_bytes(),
            "features": features,
        },
        "cuda": cuda,
        "dtype": {"default": dtype, "reason": reason},
        "native": _native(),
        "backends": [row._asdict() for row in table()],
        "forced_backend": os.environ.get(ENVIRONMENT) or None,
        "problem": problem,
        "extras": {
            name: {"found": find_spec(name) is not None, "for": purpose, "install": install}
            for name, (purpose, install) in EXTRAS.items()
        },
    }


def _default_dtype(features: dict[str, bool], cuda: dict[str, Any] | None) -> tuple[str, str]:
    """The dtype of training where `train.dtype` is auto, and why."""
    import torch

    from moestro.train.distributed import pick_dtype

    dtype = pick_dtype("auto", torch.device("cuda" if cuda else "cpu"))
    name = str(dtype).removeprefix("torch.")
    if cuda:
        return name, "CUDA devices compute bfloat16" if cuda["bfloat16"] else "CUDA, by emulation"
    if features["amx_bf16"]:
        return name, "the processor has AMX tiles, which multiply bfloat16"
    if features["avx512_bf16"]:
        return name, "the processor has AVX-512 instructions for bfloat16"
    return name, "the processor has neither AMX nor AVX-512 instructions for bfloat16"


def _native() -> dict[str, Any]:
    """The native CPU kernels: which path runs, why, on how many threads; or what is missing."""
    from moestro.errors import BackendError
    from moestro.kernels import native_library

    missing = native_library.available()
    try:
        loaded = None if missing else native_library.library()
    except BackendError as error:
        missing = str(error)
    if missing or loaded is None:
        return {"path": None, "best": None, "threads": None, "reason": missing}
    forced = os.environ.get(native_library.PATH_VARIABLE)
    best = native_library.PATHS[loaded.moestro_best_path()]
    reason = f"the best path that this processor runs: {_NATIVE_NEEDS[best]}"
    if forced:
        reason = f"forced by {native_library.PATH_VARIABLE}={forced}; the best here is {best}"
    return {
        "path": native_library.path(),
        "best": best,
        "threads": loaded.moestro_threads(),
        "reason": reason,
    }


def _cuda() -> dict[str, Any] | None:
    """The first CUDA device; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "devices": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
    }


def _text(facts: dict[str, Any]) -> str:
    """The facts as aligned lines."""
    cpu, cuda, dtype = facts["cpu"], facts["cuda"], facts["dtype"]
    memory = f"{cpu['memory_bytes'] / GIB:.1f} GiB" if cpu["memory_bytes"] else "unknown"
    features = ", ".join(name for name, on in cpu["features"].items() if on) or "none of note"
    device, forced = "none", facts["forced_backend"]
    how = f"forced by MOESTRO_BACKEND={forced}" if forced else "MOESTRO_BACKEND=NAME forces one"
    if cuda:
        device = (
            f"{cuda['name']} (capability {cuda['capability']}, "
            f"{cuda['memory_bytes'] / GIB:.1f} GiB), {cuda['devices']} in all"
        )
    lines = [
        f"python      {facts['python']} ({sys.platform})",
        f"torch       {facts['torch']}",
        f"processor   {cpu['name']}",
        f"cores       {cpu['cores']}, torch uses {cpu['torch_threads']} threads",
        f"memory      {memory}",
        f"features    {features}",
        f"CUDA        {device}",
        f"dtype       {dtype['default']}: {dtype['reason']}",
        f"native      {_native_text(facts['native'])}",
        "",
        f"kernel backends (→ is the one in use; {how})",
    ]
    for row in facts["backends"]:
        mark, state = "→" if row["chosen"] else " ", "yes" if row["ok"] else "no"
        lines.append(f"{mark} {row['use']:<6}  {row['name']:<9}  {state:<3}  {row['reason']}")
    if facts["problem"]:
        lines.append(f"  none can run: {facts['problem']}")
    lines += ["", "optional packages"]
    for name, extra in facts["extras"].items():
        state = "found" if extra["found"] else f"not found; {extra['install']}"
        lines.append(f"  {name:<12}  {extra['for']}: {state}")
    return "\n".join(lines)


def _native_text(native: dict[str, Any]) -> str:
    if native["path"] is None:
        return f"no native kernels: {native['reason']}"
    threads = f"{native['threads']} thread{'' if native['threads'] == 1 else 's'}"
    return f"{native['path']}, {threads}: {native['reason']} (MOESTRO_NATIVE_PATH=NAME forces one)"
