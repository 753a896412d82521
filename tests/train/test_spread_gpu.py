"""Experts that are split, on CUDA by nccl: one device, and two where there are; by `make gpu`."""

import json

import pytest
import torch

from moestro.checkpoints.opening import open_checkpoint
from moestro.train.loop import Trainer
from moestro.train.metrics import METRICS_NAME, read_metrics

from ..ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GROUP_OF_ONE = """
import sys
import torch
import torch.distributed as dist
from moestro import MoE, MoEConfig
from moestro.kernels import backends
from moestro.kernels.backends import Work
from moestro.moe.parallel import ParallelExperts

device, dtype, compiled = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3] == "True"
if device == "cuda":
    torch.cuda.set_device(0)
    # Grouped products for bf16, which is what is to be tested.
    wanted = "torch" if dtype == torch.bfloat16 else "segments"
    assert backends.choose("auto", Work("cuda", dtype, (64, 128, 64))).name == wanted
dist.init_process_group("nccl" if device == "cuda" else "gloo")
shared, capacity = {"hidden_dim": 64, "gate": True}, {"factor": 0.75, "scope": "global"}
cfg = MoEConfig(dim=64, hidden_dim=128, num_experts=8, top_k=2, shared=shared, capacity=capacity)
torch.manual_seed(0)
whole, mine = MoE(cfg), MoE(cfg)
mine.load_state_dict(whole.state_dict())
mine.experts = ParallelExperts(mine.experts)
x_TD = torch.randn(256, 64).to(device)
found = []
for layer in (whole.to(device), mine.to(device)):
    if compiled and layer is mine:
        layer.compile()
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        y_TD, routing = layer(x_TD)
    assert routing.dropped() > 0
    y_TD.float().sin().sum().backward()
    found.append({"y": y_TD, **{name: p.grad for name, p in layer.named_parameters()}})
most = 1e-5 if dtype == torch.float32 else 2e-2
for name, value in found[0].items():
    gap = (found[1][name].float() - value.float()).norm() / value.float().norm()
    assert gap <= most, (name, float(gap))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_of_one_rank_are_those_of_the_layer(dtype, compiled):
    """Rows through nccl to oneself, grouped products, a capacity of all ranks, a compiled layer."""
    run_ranks(1, GROUP_OF_ONE, "cuda", dtype, compiled)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("parallel", [{"expert": 2}, {"shard": 2}, {"expert": 2, "shard": 2}])
@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_two_devices_give_the_numbers_of_one(
    parallel, dtype, most, tiny_settings, tiny_corpus, tiny_data_folder, tmp_path
):
    def settings(how):
        return tiny_settings(
            {"router": {"selection_bias": True}, "shared": {"hidden_dim": 8}},
            train={"steps": 6, "batch_size": 8, "dtype": dtype,
                   "runtime": {"device": "cuda", "compile": dtype == "bfloat16"}},
            balance={"scope": "global", "switch": 0.1, "bias_rate": 0.01},
            parallel=how,
        )  # fmt: skip

    one = Trainer(settings({}), tmp_path / "one", tiny_corpus).train()
    (tmp_path / "two.json").write_text(settings(parallel).model_dump_json())
    case = {"run": "two", "settings": "two", "bug": None, "resume": None, "step": None}
    (tmp_path / "cases.json").write_text(json.dumps([case]))
    run_ranks(2, "from tests.train.spread import main; main()", tmp_path, tiny_data_folder)
    for mine, alone in zip(
        read_metrics(tmp_path / "two" / METRICS_NAME),
        read_metrics(tmp_path / "one" / METRICS_NAME),
        strict=True,
    ):
        assert mine["loss"] == pytest.approx(alone["loss"], rel=most)
        assert mine["grad_norm"] == pytest.approx(alone["grad_norm"], rel=most)
    checkpoint = tmp_path / "two" / "checkpoints" / one.checkpoint.name
    wanted = open_checkpoint(one.checkpoint, verified=True).model.state_dict()
    for name, value in open_checkpoint(checkpoint, verified=True).model.state_dict().items():
        assert float((value - wanted[name]).abs().max()) <= most, name
