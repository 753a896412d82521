"""Several processes equal one; what is wrong in them is named, and what hangs ends in time."""

import json

import pytest

from ..ranks import run_ranks

CODE = """
import gc, json, sys, torch.distributed as dist
from datetime import timedelta
from moestro.check import check
from tests.check import made
dist.init_process_group("gloo", timeout=timedelta(seconds=4))
names = ["data-parallel", "sharded", "expert-parallel", "expert-parallel-idle", "parallel-balance",
         "idle-rank"]
found = {}
for name in sys.argv[1:]:
    report = check(getattr(made, name), only=names if name == "ours" else names[2:3])
    found[name] = {each.check: each.finding.outcome for each in report.found}
report = check(made.early, only=["idle-rank"]).found[0].finding
found["early"] = report.outcome
if dist.get_rank() == 0:
    print(json.dumps(found))
gc.collect()
"""
DEFECTS = ["gradients_times_ranks", "router_cut_off", "experts_of_another_rank"]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_equal_one_process_and_defects_are_named(ranks):
    found = json.loads(run_ranks(ranks, CODE, "ours", *DEFECTS)[0])
    assert set(found["ours"].values()) == {"ok"}, found["ours"]
    for name in DEFECTS:
        assert found[name] == {"expert-parallel": "wrong"}, name
    assert found["early"] == "wrong"  # a rank waits in vain, and no longer than the time limit
