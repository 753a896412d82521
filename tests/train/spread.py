"""What one rank of `test_spread.py` runs: runs of several layouts, and runs with a bug put in.

The bugs are ones that other projects had, each one line here. A run that does not notice its bug
leaves weights, norms or losses that are not those of one process, which is what the tests look at.
"""

import errno
import json
import os
import shutil
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from moestro.data.windows import Corpus
from moestro.errors import MoestroError
from moestro.moe import dispatch, parallel
from moestro.train import distributed, health, loop, objective, sharded_state, state
from moestro.train import parallel as spreading
from moestro.train.loop import Trainer


class Bug(NamedTuple):
    """Where it is put in, and what it is a case of."""

    target: object
    name: str
    code: object
    like: str


def _backward_times_ep(ctx, grad_RD):
    way = ctx.way.back()
    return parallel._exchange(grad_RD, way) * dist.get_world_size(way.group), None


def _meet_unsorted(counts_E, dtype, group, meet=parallel.meet):
    way, local = meet(counts_E, dtype, group)
    return way, local._replace(experts_R=local.experts_R.sort().values)


def _exchange_in_bf16(rows_RD, way, exchange=parallel._exchange):
    return exchange(rows_RD.bfloat16(), way).to(rows_RD.dtype)


def _place(parameter, split, layout, rank, place=spreading._place):
    return place(parameter, split, layout, rank)


def _one_rank_saves(*given):
    found = _place(*given)
    return found._replace(saves=found.saves and (given[1] is None or given[3] == 0))


def _square_without_experts(gradients, places, square=spreading.square):
    return square({n: g for n, g in gradients.items() if ".experts." not in n}, places)


def _nan_on_one_rank(self, *given, forward=parallel.ParallelExperts.forward, **named):
    y_TD = forward(self, *given, **named)
    return y_TD * (1 if dist.get_rank() == 0 else torch.nan)


def _reset_alike(self, reset=parallel.ParallelExperts.reset_parameters):
    with patch.object(self, "first", 0):
        reset(self)


BUGS = {
    "gradients averaged": Bug(
        FSDPModule, "set_gradient_divide_factor", lambda self, factor: None, "pytorch#160285"
    ),
    "gradients times ep": Bug(
        parallel._Swap, "backward", staticmethod(_backward_times_ep), "torchtitan#1551"
    ),
    "router without gradient": Bug(
        parallel.dispatch, "combine",
        lambda rows, weights, plan, combine=dispatch.combine: combine(
            rows, weights.detach(), plan
        ),
        "Automodel#2995",
    ),
    "norm without experts": Bug(
        spreading, "square", _square_without_experts, "Megatron-LM#5916"
    ),
    "norm counts copies": Bug(
        spreading, "_place", lambda *given: _place(*given)._replace(copies=1), "torchtitan#649"
    ),
    "norm of one rank": Bug(
        spreading, "square",
        lambda gradients, places, square=spreading.square: square(gradients, places)
        * (1 + dist.get_rank()),
        "Automodel#3302",
    ),
    "balance loss of one rank's counts": Bug(
        objective.Objective, "_count",
        lambda self, routings: torch.stack([r.counts_E() for r in routings]),
        "Megatron-LM#3672",
    ),
    "bias of one rank's counts": Bug(
        health.Tally, "reduce", lambda self, ranks: None, "torchtitan#1304"
    ),
    "labels of one rank": Bug(
        loop, "num_labels",
        lambda targets, count=objective.num_labels: count(targets) * (1 + dist.get_rank()),
        "transformers#34191",
    ),
    "experts swapped on the way": Bug(parallel, "meet", _meet_unsorted, "transformers#48687"),
    "exchange in bf16": Bug(parallel, "_exchange", _exchange_in_bf16, "Megatron-LM#7452"),
    "experts of one rank saved": Bug(
        spreading, "_place", _one_rank_saves, "KempnerForge#202"
    ),
    "experts drawn alike": Bug(
        parallel.ParallelExperts, "reset_parameters", _reset_alike, "Megatron-LM#2658"
    ),
    "every rank reads the same text": Bug(
        Corpus, "batch",
        lambda self, step, size, rank, world, batch=Corpus.batch: batch(self, step, size, 0, world),
        "accelerate#4219",
    ),
    "NaN on one rank": Bug(
        parallel.ParallelExperts, "forward", _nan_on_one_rank, "DeepSpeed#5794"
    ),
    "replicas not summed": Bug(
        FSDPModule, "set_requires_all_reduce",
        lambda self, wanted, set_=FSDPModule.set_requires_all_reduce: set_(self, False),
        "pytorch#167178",
    ),
    "moments of other rows": Bug(
        sharded_state, "load_block",
        lambda source, first, mine, load=sharded_state.load_block: load(source, (0, 0), mine),
        "VeOmni#867",
    ),
}  # fmt: skip


def _full_at_step_4(paths, seal=state.seal):
    if dist.get_rank() == 1 and paths[0].parent.name.endswith("4"):
        raise OSError(errno.ENOSPC, "No space left on device")
    return seal(paths)


def _full_for_the_first(tensors, path, save_file=state.save_file):
    if path.parent.name.endswith("4"):
        raise OSError(errno.ENOSPC, "No space left on device")
    save_file(tensors, path)


FAULTS = {
    "full disk of the second": Bug(state, "seal", _full_at_step_4, ""),
    "full disk of the first": Bug(state, "save_file", _full_for_the_first, ""),
}


@contextmanager
def written_late(trainer):
    """What is saved in the background is written after the next step, if there is one."""

    def late(what, snapshot, numbers, last, save=state.save):
        until = time.monotonic() + 60
        while trainer._step == numbers.step < trainer.cfg.train.steps:
            assert time.monotonic() < until
            time.sleep(0.001)
        return save(what, snapshot, numbers, last)

    with patch.object(state, "save", late):
        yield


class Sent:
    """Bytes that this rank sends to others in training steps, by collective."""

    def __init__(self, stack):
        self.bytes, self.on = {}, False
        for name, tensor in (
            ("all_gather_single", 0), ("reduce_scatter_single", 1), ("all_reduce", 0),
            ("all_to_all_single", 1), ("all_gather", 1),
        ):  # fmt: skip
            call = self.counted(name, getattr(dist, name), tensor)
            stack.enter_context(patch.object(dist, name, call))
        stack.enter_context(patch.object(Trainer, "_one_step", self.counting(Trainer._one_step)))

    def counting(self, step):
        def one_step(*given):
            self.on = True
            try:
                return step(*given)
            finally:
                self.on = False

        return one_step

    def counted(self, name, collective, place):
        def call(*given, **named):
            group = named.get("group") or next(
                (g for g in given if hasattr(g, "size") and not isinstance(g, torch.Tensor)), None
            )
            if name == "all_gather":
                group = group or dist.group.WORLD
            if self.on and group is not None:
                whole, ranks = given[place] if len(given) > place else named["input"], group.size()
                share = (ranks - 1) / ranks * (2 if name == "all_reduce" else 1)
                size = whole.numel() * whole.element_size()
                if name == "all_to_all_single":
                    sends = given[3] if len(given) > 3 else None
                    others = whole.shape[0] - (sends[group.rank()] if sends else 0)
                    share, name_ = others / max(1, whole.shape[0]), "rows" if sends else "counts"
                elif name == "all_gather":  # of what every rank has, in full
                    share, name_ = ranks - 1, name
                else:
                    name_ = name
                self.bytes[name_] = self.bytes.get(name_, 0) + share * size
            return collective(*given, **named)

        return call


def held(trainer):
    """Bytes of this rank's weights, of its moments, and of what it writes of a checkpoint."""
    weights = [spreading.local(p) for p in trainer.model.parameters()]
    moments = [
        spreading.local(v) for s in trainer._optimizer.state.values() for v in s.values() if v.dim()
    ]
    written = sum(one.bytes for file in trainer._share.snapshot().files for one in file.tensors)
    sizes = (sum(t.untyped_storage().nbytes() for t in tensors) for tensors in (weights, moments))
    return [*sizes, written]


def main() -> None:
    """Run the cases of cases.json, a list of {run, settings, bug, resume}."""
    root, data = map(Path, sys.argv[1:])
    cases = json.loads((root / "cases.json").read_text())
    wish = state.read_run_settings(root, f"{cases[0]['settings']}.json").train.runtime.device
    device = distributed.pick_device(wish, distributed.ranks_from(os.environ))
    with distributed.joined(device, timeout_s=60) as ranks:
        for case in cases:
            run, bug = root / case["run"], (BUGS | FAULTS).get(case["bug"])
            if case["resume"]:  # from what another run had at a step
                if ranks.writes:
                    shutil.copytree(root / case["resume"], run)
                    for folder in list((run / "checkpoints").iterdir())[:]:
                        if folder.name != f"step-{case['step']:06d}":
                            shutil.rmtree(folder)
                ranks.wait()
            with ExitStack() as stack:
                if bug is not None:
                    stack.enter_context(patch.object(bug.target, bug.name, bug.code))
                sent = Sent(stack) if case["run"].startswith("measured") else None
                cfg = state.read_run_settings(root, f"{case['settings']}.json")
                try:
                    trainer = Trainer(cfg, run, Corpus(data), ranks=ranks)
                    if cfg.train.runtime.save == "background":
                        stack.enter_context(written_late(trainer))
                    trainer.train(bool(case["resume"]))
                except MoestroError as error:
                    print(f"{case['run']}: {error}")
                if sent is not None:
                    print(json.dumps([*held(trainer), sent.bytes]))


if __name__ == "__main__":
    main()
