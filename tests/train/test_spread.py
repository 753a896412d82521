"""Runs whose model is spread over ranks: the numbers of one process, or the bug is seen."""

import json
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.reading import open_unread
from moestro.errors import CheckpointError
from moestro.plan.parallel import Step, spread
from moestro.plan.report import training_step
from moestro.plan.subject import from_settings
from moestro.train.loop import Trainer
from moestro.train.metrics import METRICS_NAME, read_metrics

from ..ranks import run_ranks
from .gaps import bits, gap, weights_of
from .spread import BUGS

RANK = "from tests.train.spread import main; main()"
STEPS = 4
LONG = {"steps": 20, "every": 10}
MIXTURE = {
    "router": {"selection_bias": True},
    "shared": {"hidden_dim": 8, "gate": True},
}
GLOBAL = {"factor": 0.75, "scope": "global"}
NOISE = {"router": {"selection_bias": True, "jitter": 0.1}, "experts": {"dropout": 0.2}}
LAYOUTS = {
    2: {
        "expert 2": {"expert": 2},
        "shard 2": {"shard": 2},
        "expert 2 shard 2": {"expert": 2, "shard": "auto"},
    },
    4: {
        "expert 2 shard 4": {"expert": 2, "shard": 4},
        "expert 2 twice": {"expert": 2, "shard": 2},
        "expert 4": {"expert": 4},
    },
}


@pytest.fixture(scope="module")
def settings(tiny_settings):
    """A function: how a run is spread, cut and rounded → its settings."""

    def make(
        parallel=None,
        dtype="float64",
        pieces=1,
        steps=STEPS,
        every=2,
        noise=False,
        ranks=2,
        drop=None,
        save="wait",
    ):
        """`pieces` > 1: so many micro-batches over ranks and accumulation, with drops in each."""
        accumulate = pieces // (ranks if parallel else 1) or 1
        drop = drop or ({"factor": 0.75} if pieces > 1 else None)
        capacity = {"capacity": drop} if drop else {}
        return tiny_settings(
            {**MIXTURE, **capacity, **(NOISE if noise else {})},
            train={
                "steps": steps, "batch_size": 8, "dtype": dtype, "accumulate": accumulate,
                "eval_every": every, "eval_tokens": 16 * 7, "save_every": every, "keep": 9,
                "runtime": {
                    "device": "cpu", "checkpoint_activations": pieces > 1, "save": save,
                },
            },
            parallel=parallel or {},
            balance={"scope": "micro" if pieces > 1 else "global", "switch": 0.1,
                     "bias_rate": 0.01},
            optim={"clip": 0.1},
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def alone(settings, tiny_corpus, tmp_path_factory):
    """A function: settings of `settings` → the folder of that run by one process."""
    root, done = tmp_path_factory.mktemp("alone"), {}

    def train(**how):
        key = str(how)
        if key not in done:
            done[key] = root / str(len(done))
            Trainer(settings(**how), done[key], tiny_corpus).train()
        return done[key]

    return train


def case(run, settings, bug=None, resume=None, step=None):
    return {"run": run, "settings": settings, "bug": bug, "resume": resume, "step": step}


def run_cases(root, ranks, all_settings, cases, data):
    for name, cfg in all_settings.items():
        (root / f"{name}.json").write_text(cfg.model_dump_json())
    (root / "cases.json").write_text(json.dumps(cases))
    return run_ranks(ranks, RANK, root, data)


def bug_case(bug):
    """The settings that show a bug."""
    if bug == "moments of other rows":
        return case(bug, "expert 2", bug, "expert 2", step=2)
    return case(bug, "steps in pieces" if bug == "replicas not summed" else "two steps", bug)


def spread_runs(number, settings, data, root, *more, **how):
    """Runs of all layouts of so many processes, then `more` (settings, cases); the folder."""
    found = {name: settings(layout, **how) for name, layout in LAYOUTS[number].items()}
    cases = [case(name, name) for name in found]
    for others, other_cases in more:
        found |= others
        cases += other_cases or [case(name, name) for name in others]
    return run_cases(root, number, found, json.loads(json.dumps(cases, default=str)), data)


@pytest.fixture(scope="module")
def two(settings, tiny_data_folder, tiny_corpus, tmp_path_factory):
    """A folder with the runs of two processes, and what they printed."""
    root, both = tmp_path_factory.mktemp("two"), {"expert": 2, "shard": 2}
    runs = {
        "float32": settings(both, "float32"),
        "bfloat16": settings({"expert": 2}, "bfloat16"),
        "pieces": settings(both, pieces=4, steps=2),
        "global capacity": settings({"expert": 2}, steps=2, drop=GLOBAL),
        "noise": settings(both, pieces=4, steps=2, noise=True),
        "background": settings(both, "float32", save="background"),
    }
    buggy = {
        "two steps": settings({"expert": 2}, steps=2),
        "steps in pieces": settings({"expert": 2}, pieces=4, steps=2),
    }
    resumed = [
        case("resumed", "float32", resume="background", step=2),
        case("full disk of the first", "float32", "full disk of the first"),
        case("full disk of the second", "background", "full disk of the second"),
    ]
    bugs = ({}, resumed), (buggy, [bug_case(bug) for bug in BUGS])
    return root, spread_runs(2, settings, tiny_data_folder, root, (runs, None), *bugs)


@pytest.fixture(scope="module")
def four(settings, two, tiny_data_folder, tiny_corpus, tmp_path_factory):
    """The same of four processes, the last going on from what two had."""
    root = tmp_path_factory.mktemp("four")
    runs = {
        "from two": settings({"expert": 2, "shard": 4}),
        "measured": settings({"expert": 2, "shard": 2}, "float32", steps=4, every=4),
        "measured in pieces": in_pieces(settings),
    }
    cases = [
        case("from two", "from two", resume=two[0] / "shard 2", step=2),
        case("measured", "measured"),
        case("measured in pieces", "measured in pieces"),
    ]
    short = {"steps": 2, "every": 2}
    printed = spread_runs(4, settings, tiny_data_folder, root, (runs, cases), **short)
    (root / "measured.txt").write_text("".join(printed))
    return root


def in_pieces(settings):
    """Four ranks, two micro-batches each, recomputed, with a capacity of all that drops nothing."""
    drop = {"factor": 8.0, "scope": "global", "priority": "router"}
    layout = {"expert": 2, "shard": 4}
    return settings(layout, "float32", pieces=8, ranks=4, steps=2, every=2, drop=drop)


@pytest.mark.parametrize("name", LAYOUTS[2])
def test_two_processes_give_the_numbers_of_one(two, alone, name):
    assert gap(two[0] / name, alone()) <= 1e-12


@pytest.mark.parametrize("name", LAYOUTS[4])
def test_four_processes_give_the_numbers_of_one(four, alone, name):
    assert gap(four / name, alone(steps=2)) <= 1e-12


def test_drops_are_those_of_as_many_micro_batches(two, alone):
    one = alone(pieces=4, steps=2)
    assert any(layer["dropped"] for layer in read_metrics(one / METRICS_NAME)[0]["layers"])
    assert gap(two[0] / "pieces", one) <= 1e-12


def test_drops_of_a_global_capacity_are_those_of_one_batch(two, alone):
    one = alone(steps=2, drop=GLOBAL)
    assert any(layer["dropped"] for layer in read_metrics(one / METRICS_NAME)[0]["layers"])
    assert gap(two[0] / "global capacity", one) <= 1e-12


def test_dropout_and_jitter_are_those_of_one_process(two, alone):
    one = alone(pieces=4, steps=2, noise=True)
    assert gap(two[0] / "noise", one) <= 1e-12
    assert gap(one, alone(pieces=4, steps=2)) > 1e-3


def test_single_precision(two, alone):
    assert gap(two[0] / "float32", alone(dtype="float32")) <= 1e-5


def test_sixteen_bits(two, alone):
    assert bits(two[0] / "bfloat16") == pytest.approx(bits(alone(dtype="bfloat16")), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("number", LAYOUTS)
def test_twenty_steps(number, settings, alone, tiny_data_folder, tmp_path):
    """Every layout; in pieces, with drops and recomputation; fp32; bf16."""
    last = list(LAYOUTS[number].values())[-1]
    runs = {
        "pieces": settings(last, pieces=8, ranks=number, **LONG),
        "float32": settings(last, "float32", **LONG),
        "bfloat16": settings(last, "bfloat16", **LONG),
    }
    spread_runs(number, settings, tiny_data_folder, tmp_path, (runs, None), **LONG)
    for name in LAYOUTS[number]:
        assert gap(tmp_path / name, alone(**LONG)) <= 1e-12
    assert gap(tmp_path / "pieces", alone(pieces=8, **LONG)) <= 1e-12
    assert gap(tmp_path / "float32", alone(dtype="float32", **LONG)) <= 1e-5
    wanted = bits(alone(dtype="bfloat16", **LONG))
    assert bits(tmp_path / "bfloat16") == pytest.approx(wanted, rel=1e-3)


def test_a_resumed_run_is_bitwise_the_whole_one(two):
    found, wanted = weights_of(two[0] / "resumed"), weights_of(two[0] / "float32")
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_what_is_written_in_the_background_is_what_the_step_left(two):
    """After the next step, by both ranks; the files and the losses are as if it waited."""
    for step in ("step-000002", "step-000004"):
        late, whole = (two[0] / run / "checkpoints" / step for run in ("background", "float32"))
        names = sorted(path.name for path in late.glob("*.safetensors"))
        assert len(names) == 5
        for name in names:
            assert (late / name).read_bytes() == (whole / name).read_bytes(), (step, name)
    late, whole = (read_metrics(two[0] / run / METRICS_NAME) for run in ("background", "float32"))
    assert [record["loss"] for record in late] == [record["loss"] for record in whole]


@pytest.mark.parametrize("which", ["first", "second"])
def test_all_ranks_say_whose_disk_is_full(two, which):
    run = f"full disk of the {which}"
    checkpoints = two[0] / run / "checkpoints"
    for text in two[1]:
        (said,) = (line for line in text.splitlines() if line.startswith(run))
        assert "could not save the checkpoint of step 4" in said
        assert "No space left on device" in said
        assert f"last good checkpoint is {checkpoints / 'step-000002'}." in said
    assert "(rank " in two[1][1 if which == "first" else 0]
    assert [path.name for path in checkpoints.iterdir()] == ["step-000002"]


def test_another_number_of_processes_goes_on(two, four, alone, settings, tiny_corpus, tmp_path):
    """Two → four, two → one, one → … : any reads what any wrote."""
    assert gap(four / "from two", alone()) <= 1e-12
    shutil.copytree(two[0] / "expert 2 shard 2", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    Trainer(settings(), tmp_path / "run", tiny_corpus).train(resume=True)
    assert gap(tmp_path / "run", alone()) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("float64", 1e-12)])
def test_four_then_two_then_one_then_four(
    dtype, most, settings, alone, tiny_data_folder, tiny_corpus, tmp_path
):
    """Eight steps, with another number of processes after every second one; with noise."""
    how = {"dtype": dtype, "steps": 8, "every": 2, "noise": True}
    layouts = {"four": {"expert": 2, "shard": 4}, "two": {"expert": 2}, "back": {"expert": 4}}
    found = {name: settings(layout, **how) for name, layout in layouts.items()}
    run_cases(tmp_path, 4, found, [case("four", "four")], tiny_data_folder)
    run_cases(tmp_path, 2, found, [case("two", "two", None, "four", 2)], tiny_data_folder)
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "one" / "checkpoints" / f"step-00000{step}")
    Trainer(settings(**how), tmp_path / "one", tiny_corpus).train(resume=True)
    cases = [case("back", "back", None, "one", 6), case("again", "four", None, "four", 4)]
    run_cases(tmp_path, 4, found, cases, tiny_data_folder)
    for name in ("four", "two", "one", "back"):
        assert gap(tmp_path / name, alone(**how)) <= most
    again, whole = weights_of(tmp_path / "again"), weights_of(tmp_path / "four")
    assert all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_that_others_had_is_seen(two, alone, bug):
    root, printed = two
    if bug == "NaN on one rank":
        for text in printed:
            assert f"{bug}: step 1: the output of blocks.0.ffn.experts is not finite" in text
    elif bug == "experts of one rank saved":
        with pytest.raises(CheckpointError, match=r"experts\.down in"):
            weights_of(root / bug)
    elif bug == "moments of other rows":
        assert gap(root / bug, alone()) > 1e-9
    else:
        cut = {"pieces": 4} if bug == "replicas not summed" else {}
        assert gap(root / bug, alone(**cut, steps=2)) > 1e-9


def check_plan(cfg, step, tokens, measured):
    """Memory of each rank within 10 %, and what it sends within 2 %, by counting."""
    subject = from_settings("", cfg.model, "")
    training = training_step(subject, 16, 2, "fp32")
    layout, steps = cfg.parallel.layout(4, 4), cfg.train.steps
    plan = spread(cfg.model, subject.count, training, layout, tokens, number=4, step=step)
    assert max(written for _, _, written, _ in measured) == pytest.approx(plan.saved, rel=0.1)
    for weights, moments, _, _ in measured:
        assert weights == pytest.approx(plan.weights, rel=0.1)
        assert moments == pytest.approx(plan.optimizer, rel=0.1)
    rows = sum(sent["rows"] for *_, sent in measured) / 4 / steps  # per rank and step
    assert rows == pytest.approx(plan.all_to_all, rel=0.02)
    for *_, sent in measured:
        others = sum(size for name, size in sent.items() if name not in ("rows", "counts"))
        assert others / steps == pytest.approx(plan.sent - plan.all_to_all, rel=0.02)


def test_the_plan_says_what_is_held_and_sent(four, settings):
    """Experts twice on four ranks, all else twice in halves; a shared expert."""
    measured = [json.loads(line) for line in (four / "measured.txt").read_text().splitlines()]
    cfg = settings({"expert": 2, "shard": 2}, "float32", steps=4, every=4)
    check_plan(cfg, Step(), 32, measured[::2])


def test_the_plan_counts_micro_batches_recomputation_and_a_global_capacity(four, settings):
    measured = [json.loads(line) for line in (four / "measured.txt").read_text().splitlines()]
    check_plan(in_pieces(settings), Step(2, recomputes=True), 16, measured[1::2])


def test_pieces_that_do_not_fit_are_refused(two, tmp_path):
    whole = two[0] / "expert 2" / "checkpoints" / "step-000004"
    shutil.copytree(whole, tmp_path / "less")
    (tmp_path / "less" / "model-rank-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="not one file of each rank"):
        open_unread(tmp_path / "less")


NEWEST = """
import sys
from pathlib import Path
import torch
from moestro.errors import CheckpointError
from moestro.train.distributed import joined
from moestro.train.sharded_state import newest_together
with joined(torch.device("cpu")) as ranks:
    for run in map(Path, sys.argv[1:]):
        try:
            print(newest_together(run, ranks).name)
        except CheckpointError as error:
            print(error)
"""


def test_all_ranks_go_on_from_the_newest_that_is_whole(two, tmp_path):
    """Each reads a part of the files; a damage that any finds counts for all."""
    for run, steps in ("some", [4]), ("all", [2, 4]):
        shutil.copytree(two[0] / "expert 2", tmp_path / run)
        for step, name in zip(steps, ("optimizer-rank-00001", "model-rank-00002"), strict=False):
            path = (
                tmp_path
                / run
                / "checkpoints"
                / f"step-00000{step}"
                / f"{name}-of-00002.safetensors"
            )
            path.write_bytes(path.read_bytes()[:-1] + b"x")
    for printed in run_ranks(2, NEWEST, tmp_path / "some", tmp_path / "all"):
        first, second = printed.splitlines()
        assert first == "step-000002"
        assert "no checkpoint in" in second
        assert second.count("does not match its checksum") == 2


def test_torchs_own_reader_reads_the_pieces(two):
    checkpoint = two[0] / "expert 2 shard 2" / "checkpoints" / "step-000004"
    model = open_checkpoint(checkpoint, verified=True).model
    assert model.head.weight is model.embed.weight  # so it is stored once
    wanted = {name: each for name, each in model.state_dict().items() if name != "head.weight"}
    found = {name: torch.full_like(value, 7) for name, value in wanted.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = HuggingFaceStorageReader(str(checkpoint))
        dcp.load(found, storage_reader=reader, no_dist=True)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
