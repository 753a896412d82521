"""For the tests of the native kernels: the paths of this machine, and packed things to run."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moestro.kernels import native_cpu
from moestro.kernels.native_library import PATH_VARIABLE, PATHS
from moestro.kernels.packing import ExpertSlabs, Format, PackedMatrix


@pytest.fixture
def native():
    """The native library; without one the test is skipped, and .ci/run fails by itself."""
    reason = native_cpu.available()
    if reason is not None:
        pytest.skip(reason)
    return native_cpu.library()


@pytest.fixture
def on_every_path(native, monkeypatch):
    """A function: compute → its tensor, after every path of this machine gave the same bits."""

    def run(compute: Callable[[], Tensor]) -> Tensor:
        results = []
        kept = native.moestro_path()
        there = [p for n, p in enumerate(PATHS) if native.moestro_use_path(n) == 0]
        native.moestro_use_path(kept)
        for path in there:
            monkeypatch.setenv(PATH_VARIABLE, path)
            results.append(compute())
            assert native_cpu.path() == path
        monkeypatch.delenv(PATH_VARIABLE)
        for path, result in zip(there, results, strict=True):
            assert torch.equal(result, results[-1]), f"{path} differs from the best path"
        return results[-1]

    return run


@pytest.fixture
def matrix_of():
    """A function: weights, a kind → the matrix packed so, and the fp32 weights it stands for."""

    def make(w_OI: Tensor, kind: str) -> tuple[PackedMatrix, Tensor]:
        name, _, detail = kind.partition("/")
        if name == "plain":
            w_OI = w_OI.to(getattr(torch, detail))
            return native_cpu.plain_matrix(w_OI), w_OI.float()
        packed = native_cpu.pack_matrix(w_OI, Format(name, int(detail or 32)))
        return packed, native_cpu.unpack_matrix(packed)

    return make


@pytest.fixture
def experts_of():
    """A function: up, down, … → the experts packed, and the fp32 weights they stand for.

    A kind is KIND/GROUP, or KIND/GROUP/KIND OF DOWN.
    """

    def make(
        up_EHD: Tensor, down_EDF: Tensor, activation: str, kind: str, biases: bool = False
    ) -> tuple[ExpertSlabs, Tensor, Tensor]:
        name, detail, down = (*kind.split("/"), None, None)[:3]
        num_experts, dim, hidden = down_EDF.shape
        given = (torch.randn(up_EHD.shape[:2]), torch.randn(num_experts, dim)) if biases else ()
        if name == "plain":
            up_EHD, down_EDF = (each.to(getattr(torch, detail)) for each in (up_EHD, down_EDF))
            packed = native_cpu.plain_experts(up_EHD, down_EDF, activation, *given)
            return packed, up_EHD.float(), down_EDF.float()
        format = Format(name, int(detail or 32), down)
        size = native_cpu.slab_bytes(dim, hidden, activation, format)
        slabs = native_cpu.aligned(num_experts * size).view(num_experts, size)
        for up_HD, down_DF, slab in zip(up_EHD, down_EDF, slabs, strict=True):
            native_cpu.pack_expert(up_HD, down_DF, activation, format, slab)
        packed = ExpertSlabs(
            slabs.view(-1), num_experts, dim, hidden, activation, format, *(given or (None, None))
        )
        pairs = [native_cpu.unpack_expert(packed, expert) for expert in range(num_experts)]
        ups, downs = zip(*pairs, strict=True)
        return packed, torch.stack(ups), torch.stack(downs)

    return make
