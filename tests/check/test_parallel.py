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
         "expert-parallel-norm", "parallel-balance", "idle-rank"]
only = [word for name in names for word in ("--only", name)]
print("code", main(["check", *targets, *only, "--json"]))
"""
DEFECTS = ["gradients_times_ranks", "router_cut_off", "experts_of_another_rank"]


def found_by(ranks, *names):
    """Outcomes of each target by check, and the code that the command ended with."""
    first, *others = run_ranks(ranks, CODE, *names)
    assert all(each == "code 0\n" for each in others)  # the first reports for all
    reports = json.loads(first[: first.rindex("code")])
    outcomes = [{c["check"]: c["outcome"] for c in report["checks"]} for report in reports]
    return outcomes, first.split()[-1]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_equal_one_process_and_defects_are_named(ranks):
    last = ["early", "ours"]
    (clean, norm, *wrong), code = found_by(ranks, "ours", "norm_of_own_experts", *DEFECTS, *last)
    assert code == "1"
    assert set(clean.values()) == {"ok"}, clean
    assert norm == {**clean, "expert-parallel-norm": "wrong"}
    for name, found in zip(DEFECTS, wrong, strict=False):
        assert found["expert-parallel"] == "wrong", name
        assert found["data-parallel"] == found["sharded"] == "ok", name
    early, after = wrong[-2:]  # a rank waits in vain, and no longer than the time limit
    assert early == {**early, "data-parallel": "ok", "idle-rank": "wrong"}
    assert set(after.values()) == {"unchecked"}
