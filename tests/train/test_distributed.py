import signal

import pytest
import torch

from moestro.checkpoints.tensor_files import read_tensors
from moestro.errors import ConfigError
from moestro.train.distributed import ALONE, Ranks, joined, pick_device, pick_dtype, ranks_from
from moestro.train.loop import Trainer
from moestro.train.metrics import METRICS_NAME, read_metrics

from ..ranks import run_two_ranks, start_ranks

RANK_OF_TWO = """
import sys, warnings
warnings.filterwarnings("error")
from contextlib import nullcontext
from pathlib import Path
import torch
from tests.train.spread import written_late
from moestro.train import state
from moestro.data.windows import Corpus
from moestro.train.distributed import joined
from moestro.train.loop import Trainer

root, corpus = Path(sys.argv[1]), Corpus(Path(sys.argv[2]))
with joined(torch.device("cpu")) as ranks:
    def train(name, resume=False):
        cfg = state.read_run_settings(root, f"{name}.json")
        trainer = Trainer(cfg, root / name, corpus, ranks=ranks)
        with written_late(trainer) if name == "background" else nullcontext():
            return trainer.train(resume)

    steps = train("plain").step
    assert train("background").checkpoint.name == "step-000003"
    whole = train("noisy").checkpoint
    if ranks.writes:
        (whole / "model.safetensors").rename(root / "whole.safetensors")
    ranks.wait()
    train("noisy", resume=True)
print(ranks.rank, steps)
"""


@pytest.fixture(scope="module")
def plain(tiny_settings):
    """Settings that give the same numbers however the batch is split."""
    return tiny_settings(
        {"router": {"selection_bias": True}},
        train={"steps": 3, "batch_size": 8, "save_every": 2},
        balance={"scope": "global", "switch": 0.1, "bias_rate": 0.01},
    )


@pytest.fixture(scope="module")
def two(tiny_settings, plain, tiny_corpus, tiny_data_folder, tmp_path_factory):
    """A folder with what two gloo processes trained: `plain`, and `noisy` with a resume."""
    root = tmp_path_factory.mktemp("two")
    noisy = tiny_settings(
        {"router": {"jitter": 0.1}, "experts": {"dropout": 0.2}},
        train={"steps": 3, "batch_size": 8, "accumulate": 2, "save_every": 2},
        balance={"scope": "global"},
        optim={"matrices": "muon"},
    )
    (root / "plain.json").write_text(plain.model_dump_json())
    runtime = plain.train.runtime.model_copy(update={"save": "background"})
    late = plain.train.model_copy(update={"runtime": runtime})
    (root / "background.json").write_text(
        plain.model_copy(update={"train": late}).model_dump_json()
    )
    (root / "noisy.json").write_text(noisy.model_dump_json())
    outputs = run_two_ranks(RANK_OF_TWO, root, tiny_data_folder)
    assert outputs == ["0 3\n", "1 3\n"]
    return root


def test_two_processes_leave_the_weights_of_one(two, plain, tiny_corpus, tmp_path):
    one = Trainer(plain, tmp_path / "one", tiny_corpus).train()
    # Adam divides by the gradient's size, so rounding shows most in weights; not in its moments.
    for name, atol in (("model.safetensors", 5e-6), ("optimizer.safetensors", 1e-7)):
        alone = read_tensors(one.checkpoint / name)
        both = read_tensors(two / "plain" / "checkpoints" / "step-000003" / name)
        assert alone.keys() == both.keys()
        for key, value in alone.items():
            torch.testing.assert_close(both[key], value, rtol=1e-6, atol=atol)


def test_two_processes_log_the_numbers_of_one(two, plain, tiny_corpus, tmp_path):
    Trainer(plain, tmp_path / "one", tiny_corpus).train()
    for left, right in zip(
        read_metrics(tmp_path / "one" / METRICS_NAME),
        read_metrics(two / "plain" / METRICS_NAME),
        strict=True,
    ):
        assert left["tokens"] == right["tokens"]
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-6)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-5)
        assert left["balance"] == pytest.approx(right["balance"], rel=1e-5)
        for a, b in zip(left["layers"], right["layers"], strict=True):
            assert (a["imbalance"], a["dead"]) == (b["imbalance"], b["dead"])
            assert a == pytest.approx(b, rel=1e-5)
        assert left.get("bits_per_byte", {}) == pytest.approx(
            right.get("bits_per_byte", {}), rel=1e-6
        )


def test_two_processes_resume_bitwise_with_noise_and_accumulation(two):
    whole = read_tensors(two / "whole.safetensors")
    again = read_tensors(two / "noisy" / "checkpoints" / "step-000003" / "model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], value) for name, value in again.items())


def test_the_first_writes_in_the_background_what_the_step_left(two):
    for step in ("step-000002", "step-000003"):
        late, whole = (two / run / "checkpoints" / step for run in ("background", "plain"))
        for name in ("model", "optimizer", "trainer"):
            found, wanted = ((run / f"{name}.safetensors").read_bytes() for run in (late, whole))
            assert found == wanted, (step, name)


def test_the_batch_must_split_over_the_ranks(tiny_settings, tiny_corpus, tmp_path):
    with pytest.raises(ConfigError, match="use a multiple of 3"):
        Trainer(tiny_settings(), tmp_path / "run", tiny_corpus, ranks=Ranks(0, 3))


def test_alone_nothing_is_exchanged():
    x = torch.arange(3.0)
    assert ALONE.sum_(x) is x
    ALONE.wait()
    assert ALONE.writes
    with joined(torch.device("cpu"), {}) as ranks:
        assert ranks == ALONE
    assert not torch.distributed.is_initialized()


def test_the_place_comes_from_torchruns_environment():
    assert ranks_from({}) == ALONE
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert ranks_from(environment) == Ranks(3, 4, 1)
    assert not ranks_from(environment).writes
    for bad in ({"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two", "RANK": "0"}):
        with pytest.raises(ConfigError, match="torchrun"):
            ranks_from(bad)


MEET = """
import os, signal, sys
import torch
from moestro.errors import TrainingError
from moestro.train.distributed import joined
try:
    with joined(torch.device("cpu"), timeout_s=int(sys.argv[1])) as ranks:
        print(ranks.gathered(ranks.rank), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
except TrainingError as error:
    print(error)
"""


def test_ranks_meet_again_in_a_store_that_knows_those_that_were_killed(tmp_path):
    """As under torchrun on several machines, where those that restart are told no common number."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    where = {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    for turn in range(2):
        ranks = start_ranks(2, MEET, tmp_path / str(turn), 20, **where)
        assert ranks.ended() == [-signal.SIGKILL] * 2
        assert ranks.printed(0) == ranks.printed(1) == "[0, 1]\n"


def test_a_rank_that_does_not_come_is_named(tmp_path):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    where = {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    store.set("hello 1", "of a rank that was killed")
    ranks = start_ranks(1, MEET, tmp_path, 1, **where, WORLD_SIZE=3)
    assert ranks.ended(30) == [0]
    assert "did not answer within 1 s" in ranks.printed(0)
    assert "ranks [1, 2]" in ranks.printed(0)


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert pick_device("auto").type == expected
    with pytest.raises(ConfigError, match="is not a device"):
        pick_device("toaster")
    with pytest.raises(ConfigError, match="not supported"):
        pick_device("meta")
    with pytest.raises(ConfigError, match="needs CUDA device 99"):
        pick_device("cuda:99")


def test_dtypes(monkeypatch):
    cpu = torch.device("cpu")
    assert pick_dtype("float32", cpu) == torch.float32
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    assert pick_dtype("auto", torch.device("cuda", 0)) == torch.bfloat16
    for amx, avx, dtype in ((1, 0, torch.bfloat16), (0, 1, torch.bfloat16), (0, 0, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: bool(amx))
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: bool(avx))
        assert pick_dtype("auto", cpu) == dtype
