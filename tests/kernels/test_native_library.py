"""The native library: which path and which threads compute, and what is said without it."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from moestro.errors import BackendError
from moestro.kernels import native_cpu, native_library
from moestro.kernels.native_library import (
    LIBRARY,
    LIBRARY_VARIABLE,
    PATH_VARIABLE,
    PATHS,
    THREADS_VARIABLE,
)
from moestro.kernels.packing import Format

KINDS = ("float32", "bfloat16", "int8", "int4", "uint4")


@pytest.fixture
def loaded_anew():
    """The library is found anew in this test, and again after it."""
    native_library._load.cache_clear()
    yield
    native_library._load.cache_clear()


@pytest.fixture
def matrices(native):
    return [native_cpu.pack_matrix(torch.randn(300, 96), Format(kind)) for kind in KINDS]


def products(matrices: list, x_TI: torch.Tensor) -> torch.Tensor:
    return torch.stack([native_cpu.linear(matrix, x_TI) for matrix in matrices])


def in_a_process(code: str, **environment: str) -> str:
    """What the code prints in a process of its own; it must end by itself."""
    done = subprocess.run(
        [sys.executable, "-c", SHARED + code],
        env={**os.environ, **environment},
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Two threads of torch's own pool, then a product through them.
SHARED = """
import os
import torch
from moestro.kernels import native_cpu
from moestro.kernels.packing import Format

native = native_cpu.library()
assert native.moestro_threads() == 2
matrix = native_cpu.pack_matrix(torch.randn(300, 96), Format("int8"))
x_TI = torch.randn(40, 96)
y_TO = native_cpu.linear(matrix, x_TI)
"""


def test_the_best_path_runs_unless_another_is_named(native, monkeypatch):
    monkeypatch.delenv(PATH_VARIABLE, raising=False)
    best = PATHS[native.moestro_best_path()]
    native_cpu.library()
    assert native_cpu.path() == best
    monkeypatch.setenv(PATH_VARIABLE, "portable")
    assert native_cpu.path() == "portable"
    monkeypatch.delenv(PATH_VARIABLE)
    assert native_cpu.path() == best


def test_a_path_that_does_not_exist(native, monkeypatch):
    monkeypatch.setenv(PATH_VARIABLE, "sse9")
    with pytest.raises(BackendError, match=r"sse9.*portable, avx2, avx2-vnni, avx512, amx"):
        native_cpu.pack_matrix(torch.randn(4, 32), Format("int8"))


def test_a_path_that_the_machine_lacks(native, monkeypatch):
    """Whatever this machine is: one that can run AVX2 at most, in front of the same library."""

    class Older:
        def __getattr__(self, name):
            return getattr(native, name)

        def moestro_best_path(self):
            return PATHS.index("avx2")

        def moestro_use_path(self, wanted):
            return -3 if wanted > PATHS.index("avx2") else native.moestro_use_path(wanted)

    monkeypatch.setattr(native_library, "_load", Older)
    monkeypatch.setenv(PATH_VARIABLE, "portable")
    assert native_cpu.path() == "portable"
    monkeypatch.setenv(PATH_VARIABLE, "amx")
    with pytest.raises(BackendError, match=r"MOESTRO_NATIVE_PATH=amx.*avx2"):
        native_cpu.library()


def test_the_library_refuses_paths_above_the_best(native):
    before = native.moestro_path()
    assert native.moestro_use_path(native.moestro_best_path() + 1) < 0
    assert native.moestro_use_path(-2) < 0
    assert native.moestro_path() == before


def test_without_the_library_everything_says_so(loaded_anew, monkeypatch, tmp_path):
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(native_library, "LIBRARY", "not-built.so")
    assert "C++ compiler" in native_cpu.available()
    for call in (native_cpu.library, native_cpu.path):
        with pytest.raises(BackendError, match=r"not built.*pip install"):
            call()
    with pytest.raises(BackendError, match="not built"):
        native_cpu.pack_matrix(torch.randn(4, 32), Format("int8"))


def test_a_library_named_by_the_environment(loaded_anew, monkeypatch, tmp_path):
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / LIBRARY))
    assert f"{LIBRARY_VARIABLE}={tmp_path / LIBRARY} is not a file" in native_cpu.available()
    (tmp_path / LIBRARY).write_bytes(b"no library at all")
    native_library._load.cache_clear()
    assert "cannot be loaded" in native_cpu.available()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("own", [True, False], ids=["own", "torch's"])
def test_any_number_of_threads_gives_the_same_bits(native, matrices, threads, own):
    x_TI = torch.randn(300, 96)
    expected = products(matrices, x_TI)
    before = native.moestro_threads()
    try:
        assert native.moestro_use_threads(threads, None if own else native_library._team()) == 0
        assert native.moestro_threads() == threads
        for _ in range(3):
            assert torch.equal(products(matrices, x_TI), expected)
            packed = [native_cpu.pack_matrix(torch.ones(300, 96), m.format) for m in matrices]
            assert torch.equal(native_cpu.unpack_matrix(packed[0]), torch.ones(300, 96))
    finally:
        native.moestro_use_threads(before, native_library._team())


def test_numbers_of_threads_that_cannot_be(native):
    before = native.moestro_threads()
    for wrong in (0, -1, 5000):
        assert native.moestro_use_threads(wrong, None) < 0
    assert native.moestro_threads() == before


def test_threads_are_torchs_unless_the_environment_says(native, loaded_anew, monkeypatch):
    monkeypatch.delenv(THREADS_VARIABLE, raising=False)
    assert native_cpu.library().moestro_threads() == torch.get_num_threads()
    monkeypatch.setenv(THREADS_VARIABLE, "2")
    native_library._load.cache_clear()
    assert native_cpu.library().moestro_threads() == 2
    monkeypatch.setenv(THREADS_VARIABLE, "1")
    native_library._load.cache_clear()
    assert native_cpu.library().moestro_threads() == 1


@pytest.mark.parametrize("given", ["0", "-1", "two", "²", "1025", "99999999999999999999"])
def test_numbers_of_threads_that_are_none_are_refused(native, monkeypatch, given):
    monkeypatch.setenv(THREADS_VARIABLE, given)
    with pytest.raises(BackendError, match=f"{THREADS_VARIABLE} is 1 to 1024; given '{given}'"):
        native_cpu.library()
    monkeypatch.delenv(THREADS_VARIABLE)
    assert native_cpu.library().moestro_threads() == torch.get_num_threads()


def test_a_later_set_num_threads_is_followed(native):
    code = """
for threads in (1, 3, 2):
    torch.set_num_threads(threads)
    assert torch.equal(native_cpu.linear(matrix, x_TI), y_TO)
    print(native.moestro_threads(), end=" ")
"""
    assert in_a_process(code, **{THREADS_VARIABLE: "", "OMP_NUM_THREADS": "2"}) == "1 3 2 "


def test_python_threads_may_call_at_once(native, matrices):
    inputs = [torch.randn(rows, 96) for rows in (1, 20, 64, 7)]
    expected = [products(matrices, x_TI) for x_TI in inputs]
    wrong = []

    def call(number: int) -> None:
        for _ in range(30):
            if not torch.equal(products(matrices, inputs[number]), expected[number]):
                wrong.append(number)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(len(inputs))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("team", ["None", "native_library._team()"], ids=["own", "torch's"])
def test_a_forked_child_computes(native, team):
    """Data loaders fork after the threads have started; in the child only the caller is left."""
    code = f"""
from moestro.kernels import native_library
native.moestro_use_threads(2, {team})
assert torch.equal(native_cpu.linear(matrix, x_TI), y_TO)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    same = torch.equal(native_cpu.linear(matrix, x_TI), y_TO)
    alone = native.moestro_threads() == 1
    native.moestro_use_threads(2, {team})
    more = torch.equal(native_cpu.linear(matrix, x_TI), y_TO)
    os._exit(0 if same and alone and more else 1)
print(os.waitpid(child, 0)[1], torch.equal(native_cpu.linear(matrix, x_TI), y_TO))
"""
    assert in_a_process(code, **{THREADS_VARIABLE: "2"}).split() == ["0", "True"]


def test_a_runtime_that_gives_fewer_threads(native):
    """OpenMP may hand out fewer than asked for; nobody waits for those that never come."""
    assert in_a_process("print(y_TO.shape)", OMP_THREAD_LIMIT="1", **{THREADS_VARIABLE: "2"})
