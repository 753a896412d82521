"""Several processes equal one; what is wrong in them is named, and what hangs ends in time."""

import json

import pytest

from ..ranks import run_ranks

CODE = """
import sys
import moestro.cli.check as command
from moestro.cli.main import main
command.HANGS_S = 8
targets = [f"tests.check.made:{name}" for name in sys.argv[1:]]
names = ["data-parallel", "no-sync", "sharded", "expert-parallel", "expert-parallel-idle",
         "parallel-balance", "idle-rank"]
only = [word for name in names for word in ("--only", name)]
print("code", main(["check", *targets, *only, "--json"]))
"""
DEFECTS = ["gradients_times_ranks", "router_cut_off", "experts_of_another_rank"]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_equal_one_process_and_defects_are_named(ranks):
    first, *others = run_ranks(ranks, CODE, "ours", *DEFECTS, "early")
    assert all(each == "code 0\n" for each in others)  # the first reports for all
    reports = json.loads(first.removesuffix("code 1\n"))
    clean, *wrong, early = ({c["check"]: c["outcome"] for c in r["checks"]} for r in reports)
    assert set(clean.values()) == {"ok"}, clean
    for name, found in zip(DEFECTS, wrong, strict=True):
        assert found["expert-parallel"] == "wrong", name
        assert found["data-parallel"] == found["sharded"] == "ok", name
    # A rank waits in vain, and no longer than the time limit.
    assert early == {**early, "data-parallel": "ok", "idle-rank": "wrong"}
