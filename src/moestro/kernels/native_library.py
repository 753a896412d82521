"""Finds and loads the native library; chooses its path and its threads.

A wheel without the library is complete, only slower.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import moestro.kernels
from moestro.errors import BackendError, ShapeError

LIBRARY = "libmoestro.so"
LIBRARY_VARIABLE = "MOESTRO_NATIVE_LIBRARY"
PATH_VARIABLE = "MOESTRO_NATIVE_PATH"
THREADS_VARIABLE = "MOESTRO_NATIVE_THREADS"
PATHS = ("portable", "avx2", "avx2-vnni", "avx512", "amx")
MOST_THREADS = 1024
ABI = 12
_EMEMORY, _EPATH, _EREAD = -2, -3, -4
_DOCUMENTED = "what the docstrings say"
I32, I64, PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class CMatrix(ctypes.Structure):
    """`moestro_matrix`."""

    _fields_ = (("data", PTR), ("n", I64), ("k", I64), ("kind", I32), ("group", I32))


class CSteps(ctypes.Structure):
    """`moestro_steps`."""

    _fields_ = (("expert", I64), ("output", I64), ("input", I64))


class CExperts(ctypes.Structure):
    """`moestro_experts`."""

    _fields_ = (
        ("data", PTR), ("up", PTR), ("down", PTR), ("slab_bytes", I64), ("experts", I64),
        ("dim", I64), ("hidden", I64), ("kind", I32), ("group", I32), ("activation", I32),
        ("down_kind", I32), ("mixture", I32), ("up_bias", PTR), ("down_bias", PTR),
        ("residency", PTR),
        ("up_steps", CSteps), ("down_steps", CSteps),
    )  # fmt: skip


class CGroups(ctypes.Structure):
    """`moestro_groups`."""

    _fields_ = (("ends", PTR), ("experts", PTR), ("count", I64), ("rows", I64))


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "moestro_abi": (I32, ()),
    "moestro_best_path": (I32, ()),
    "moestro_path": (I32, ()),
    "moestro_use_path": (I32, (I32,)),
    "moestro_threads": (I32, ()),
    "moestro_use_threads": (I32, (I32, PTR)),
    "moestro_pack": (I32, (I32, I32, I32, PTR, I64, I64, PTR, I64, PTR)),
    "moestro_read_rows": (I32, (I32, PTR, I64, I64, PTR)),
    "moestro_unpack": (I32, (I32, I32, PTR, I64, I64, I64, PTR)),
    "moestro_linear": (I32, (PTR, I32, PTR, I64, PTR, PTR)),
    "moestro_residency_open": (I32, (I32, PTR, I64, I32, PTR)),
    "moestro_residency_close": (I32, (PTR,)),
    "moestro_residency_counts": (I32, (PTR, PTR)),
    "moestro_mixture": (I32, (PTR, I32, PTR, I64, PTR, PTR, PTR, I64, PTR)),
    "moestro_step": (I32, (PTR, I64, *[PTR] * 7)),
    "moestro_trains": (I32, ()),
    "moestro_grouped": (I32, (PTR, I32, PTR, I64, I64, I32, PTR, PTR)),
    "moestro_grouped_grad": (I32, (PTR, I32, I64, I64, PTR, PTR, PTR)),
    "moestro_ffn": (I32, (PTR, I32, PTR, PTR, I64, I64, *[PTR] * 3)),
    "moestro_ffn_back": (I32, (PTR, I32, PTR, PTR, I64, I64, *[PTR] * 5)),
    "moestro_read": (ctypes.c_uint64, (PTR, I64)),
}


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    given = os.environ.get(LIBRARY_VARIABLE, "")
    places = [Path(folder) / LIBRARY for folder in moestro.kernels.__path__]
    found = next((place for place in ([Path(given)] if given else places) if place.is_file()), None)
    if found is None and given:
        return f"{LIBRARY_VARIABLE}={given} is not a file; unset it to use the installed library"
    if found is None:
        return (
            "the native library was not built; install a C++ compiler (g++) and run "
            "`pip install --force-reinstall --no-deps` for moestro again"
        )
    try:
        library = ctypes.CDLL(str(found))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return f"the native library cannot be loaded ({error}); install moestro again"
    if library.moestro_abi() != ABI:
        return f"the native library is of version {library.moestro_abi()}, not {ABI}; install again"
    return library


_threads_told: str | int = 0


def _follow_threads(loaded: ctypes.CDLL) -> None:
    """Compute in as many threads as torch does, also after `torch.set_num_threads`."""
    global _threads_told
    given = os.environ.get(THREADS_VARIABLE, "")
    wanted = given or min(torch.get_num_threads(), MOST_THREADS)
    if wanted == _threads_told:
        return
    known = str(wanted).isdecimal() and 1 <= int(wanted) <= MOST_THREADS
    if not known or loaded.moestro_use_threads(int(wanted), _team()):
        raise BackendError(f"{THREADS_VARIABLE} is 1 to {MOST_THREADS}; given {given!r}")
    _threads_told = wanted


@cache
def _team() -> int | None:
    """The address of torch's own GOMP_parallel: its threads compute, not twice as many."""
    for place in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        return ctypes.cast(ctypes.CDLL(str(place)).GOMP_parallel, PTR).value
    return None


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        BackendError: there is none; says why and what to do. Or MOESTRO_NATIVE_PATH names a path
            that does not exist or that this machine cannot run.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise BackendError(loaded)
    _follow_threads(loaded)
    forced, best = os.environ.get(PATH_VARIABLE, ""), loaded.moestro_best_path()
    if forced and forced not in PATHS:
        raise BackendError(f"{PATH_VARIABLE}={forced!r}; known: {', '.join(PATHS)}")
    wanted = PATHS.index(forced) if forced else best
    if wanted != loaded.moestro_path() and loaded.moestro_use_path(wanted):
        raise BackendError(
            f"{PATH_VARIABLE}={forced} was asked for, but this machine does not run it; its best "
            f"is {PATHS[best]}"
        )
    return loaded


def call(
    name: str,
    *arguments: Any,
    takes: str | Callable[[], str] = _DOCUMENTED,
    failure: Callable[[], Exception] | None = None,
) -> None:
    """Call `moestro_{name}`, which returns a code.

    Args:
        name: of the function.
        arguments: its own.
        takes: what it takes, for a person.
        failure: what is raised where a file could not be read.

    Raises:
        ShapeError: it refuses what it was given; says what it `takes`.
        MemoryError: there is not enough memory for its buffers.
        BackendError: the path changed to one without bf16 products, or there is no library.
    """
    code = getattr(library(), "moestro_" + name)(*arguments)
    if code == _EMEMORY:
        raise MemoryError("not enough memory for the native kernels' buffers")
    if code == _EPATH:
        raise BackendError("the native kernels' path changed to one without bf16 products")
    if code == _EREAD and failure is not None:
        raise failure()
    if code:
        takes = takes if isinstance(takes, str) else takes()
        raise ShapeError(f"the native kernels take {takes}")


def available() -> str | None:
    """None where the library can be used, else the reason."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def path() -> str:
    """The path in use, one of `PATHS`."""
    return PATHS[library().moestro_path()]
