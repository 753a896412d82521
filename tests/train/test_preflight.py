"""What a run asks of machine and processes is refused before anything of it is written."""

import sys

import pytest
import torch

from moestro.errors import BackendError, ConfigError
from moestro.kernels import native_cpu
from moestro.train.distributed import ALONE, Ranks
from moestro.train.loop import Trainer
from moestro.train.preflight import check_run

TWO = Ranks(0, 2)
BAD = [
    ({"train": {"batch_size": 5}}, TWO, "batch_size 5 does not split"),
    ({"parallel": {"shard": 2}}, ALONE, "parallel.shard = 2 does not fit 1 processes"),
    ({"parallel": {"expert": 3}}, TWO, "parallel.expert = 2"),
    ({"parallel": {"shard": 2}, "lora": {"rank": 2}}, TWO, "adapters are trained on whole models"),
    ({"parallel": {"expert": 2}, "lora": {"rank": 2}}, TWO, "adapters are trained on whole models"),
    ({"parallel": {"expert": 2}, "optim": {"matrices": "muon"}}, TWO, "Muon needs whole matrices"),
    ({"parallel": {"shard": 2}, "optim": {"matrices": "muon"}}, TWO, "Muon needs whole matrices"),
    ({"train": {"runtime": {"device": "cuda:99"}}}, ALONE, "needs CUDA device 99"),
    ({"train": {"runtime": {"device": "cpu", "backend": "none"}}}, ALONE, "unknown kernel backend"),
    ({"train": {"runtime": {"device": "cpu", "tensorboard": True}}}, ALONE, "not installed"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "ranks", "words"), BAD)
def test_it_is_refused_before_a_trainer_writes(
    changes, ranks, words, tiny_settings, tiny_corpus, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    cfg = tiny_settings(**changes)
    with pytest.raises((ConfigError, BackendError), match=words):
        check_run(cfg, ranks)
    with pytest.raises((ConfigError, BackendError), match=words):
        Trainer(cfg, tmp_path / "run", tiny_corpus, ranks=ranks)
    assert not (tmp_path / "run").exists()


def test_packed_weights_are_refused_where_auto_is_a_gpu(tiny_settings, monkeypatch):
    cfg = tiny_settings(lora={"weights": "int4"}, train={"runtime": {"device": "auto"}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"int4: .* auto is cuda here; .*device = cpu"):
        check_run(cfg)


def test_packed_weights_are_refused_without_their_kernels(tiny_settings, monkeypatch):
    other = {"device": "cpu", "backend": "segments"}
    with pytest.raises(BackendError, match="'segments' was asked for"):
        check_run(tiny_settings(lora={"weights": "int8"}, train={"runtime": other}))
    monkeypatch.setattr(native_cpu, "available", lambda: "it was left out")
    with pytest.raises(BackendError, match="it was left out"):
        check_run(tiny_settings(lora={"weights": "int8"}))


def test_what_can_be_is_placed(tiny_settings):
    placing = check_run(tiny_settings(parallel={"expert": 2}), TWO)
    assert (placing.device.type, placing.dtype) == ("cpu", torch.float32)
    assert (placing.layout.ranks, placing.layout.expert) == (2, 2)
