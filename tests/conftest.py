"""For every test: one thread, fixed seeds, and poison in every tensor moestro leaves unset."""

import sys

import pytest
import torch
from hypothesis import settings

from moestro.config import MoEConfig

# Load on a shared machine must not fail a test, and no run may leave files in the checkout.
settings.register_profile("moestro", deadline=None, database=None, derandomize=True)
settings.load_profile("moestro")

torch.set_num_threads(1)

# torch lists what makes tensors when a default device is first used; the poisoned ones are none.
with torch.device("meta"):
    torch.empty(0)


def _poisoned(make):
    """The tensor maker `make`, filling what it makes for moestro with a value nobody wants."""

    def poisoned(*args, **kwargs):
        tensor = make(*args, **kwargs)
        if torch.compiler.is_compiling() or tensor.device.type == "meta":
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not caller.startswith("moestro"):
            return tensor
        with torch.no_grad():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype != torch.bool:
                tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return poisoned


@pytest.fixture(autouse=True)
def _poison_unset_memory(monkeypatch):
    """An output that is not written to cannot pass by luck."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny():
    """A function: changes → the settings of a layer of 4 experts, top 2, D 8, F 16."""

    def make(**changes) -> MoEConfig:
        return MoEConfig(**{"dim": 8, "hidden_dim": 16, "num_experts": 4, "top_k": 2, **changes})

    return make
