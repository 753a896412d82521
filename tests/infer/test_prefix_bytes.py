"""The memory of earlier texts, counted from outside: every tensor that a session leaves alive."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moestro.config import ModelConfig
from moestro.infer.engine import Session
from moestro.infer.prefixes import Prefixes
from moestro.infer.sampling import SamplingConfig
from moestro.kernels import native_cpu
from moestro.models.decoder import Decoder
from moestro.text import ByteTokenizer

pytestmark = pytest.mark.skipif(
    native_cpu.available() is not None, reason=str(native_cpu.available())
)

SETTINGS = SamplingConfig(max_tokens=3, temperature=0.0)
FULL: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "context": 1024}


def decoder(**attention: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(
        ModelConfig(
            dim=32, num_layers=2, moe={"hidden_dim": 16, "num_experts": 3, "top_k": 1},
            attention={**FULL, **attention},
        )
    ).eval()  # fmt: skip


def all_tensors() -> list[torch.Tensor]:
    """Those of this process; not those without memory, which compiling elsewhere may have left."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    tensors = [each for each in gc.get_objects() if type(each) in kinds]
    return [each for each in tensors if each.device.type == "cpu"]


def tensor_bytes() -> int:
    """Bytes of all storages that they hold, each counted once."""
    tensors = all_tensors()
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
    return sum(each.nbytes() for each in storages.values())


def finish(session: Session, prompt: str) -> int:
    number = session.add(prompt, SETTINGS)
    while session.live:
        session.step()
    return session.cached[number]


@pytest.fixture
def only_new() -> Iterator[None]:
    """What is there already is not counted: other tests may let go of theirs meanwhile."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("only_new")
@pytest.mark.parametrize("attention", [{}, {"window": {"size": 9, "full_every": 2}}])
def test_what_is_kept_is_what_is_counted_and_within_the_limit(attention: Any) -> None:
    model, most = decoder(**attention), 150_000
    session = Session(model, ByteTokenizer(), cache_bytes=most)
    finish(session, "z" * 500)  # tables that grow with the longest text, and remain
    session.prefixes = Prefixes(most)
    before, lengths = tensor_bytes(), [40, 300, 20, 180, 90, 400, 30, 250]
    held = []
    for number, length in enumerate(lengths):
        finish(session, chr(97 + number) * length)
        held.append(tensor_bytes() - before)
        assert held[-1] <= session.prefixes.nbytes <= most
        # Ids and the arrays' own heads are all that is counted and not held by tensors.
        assert held[-1] >= 0.8 * session.prefixes.nbytes
    assert max(held) > most / 2
    session.prefixes = None
    assert tensor_bytes() - before < 1000


def test_the_least_recently_used_goes_first() -> None:
    model = decoder()
    session = Session(model, ByteTokenizer(), cache_bytes=1 << 30)
    assert session.prefixes is not None
    finish(session, "a" * 100)
    one = session.prefixes.nbytes
    session = Session(model, ByteTokenizer(), cache_bytes=3 * one)
    for letter in "abc":
        assert finish(session, letter * 100) == 0
    assert finish(session, "a" * 100) == 99  # b is the oldest now
    assert finish(session, "d" * 100) == 0
    assert finish(session, "a" * 100) == 99
    assert finish(session, "c" * 100) == 99
    assert finish(session, "b" * 100) == 0
