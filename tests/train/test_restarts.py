"""What torchrun starts again goes on with what its job began, and with nothing else."""

import json

import pytest

from moestro.config import RunConfig
from moestro.errors import ConfigError
from moestro.train import restarts
from moestro.train.distributed import ALONE
from moestro.train.restarts import goes_on, meeting_settings, note_job, settings_again

JOB = {"TORCHELASTIC_RUN_ID": "job 7"}
OTHER = {"TORCHELASTIC_RUN_ID": "job 8"}
NAMELESS = {"TORCHELASTIC_RUN_ID": "none"}
AGAIN = {"TORCHELASTIC_RESTART_COUNT": "1"}


@pytest.fixture
def run(tmp_path):
    """The folder of a run that job 7 began."""
    note_job(tmp_path, JOB, {"--init": None})
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_only_the_job_that_began_a_run_goes_on_with_it(run):
    """By the job's name: a machine that was replaced has counted no restart."""
    for environment, wanted in (
        (JOB, True), (JOB | AGAIN, True), (OTHER, False), (OTHER | AGAIN, False), (AGAIN, False),
        (NAMELESS | AGAIN, False), ({}, False),
    ):  # fmt: skip
        assert goes_on(run, ALONE, environment, {"--init": None}) is wanted, environment
    (run / "config.json").unlink()  # killed before it had begun
    assert not goes_on(run, ALONE, JOB | AGAIN, {"--init": None})


def test_a_job_without_a_name_is_its_torchrun(run, monkeypatch):
    note_job(run, NAMELESS, {})
    assert goes_on(run, ALONE, NAMELESS | AGAIN, {})
    assert not goes_on(run, ALONE, NAMELESS, {})
    monkeypatch.setattr(restarts.os, "getppid", lambda: 0)
    assert not goes_on(run, ALONE, NAMELESS | AGAIN, {})


def test_a_run_that_no_job_began_is_of_none(run):
    note_job(run, {}, {})
    assert not goes_on(run, ALONE, JOB | AGAIN, {})


@pytest.mark.parametrize("text", ["", '{"job": "jo', "[]"])
def test_a_damaged_note_is_none(run, text):
    (run / "job.json").write_text(text)
    assert not goes_on(run, ALONE, JOB | AGAIN, {"--init": None})


def test_options_that_no_settings_hold_are_compared(run):
    with pytest.raises(ConfigError, match=r"--init = 'other' \(then: None\)"):
        goes_on(run, ALONE, JOB, {"--init": "other"})


def test_a_kill_during_step_0_begins_again(tmp_path):
    note_job(tmp_path, JOB, {})
    (tmp_path / "init").mkdir()
    (tmp_path / "checkpoints" / ".unfinished-step-000000").mkdir(parents=True)
    assert not goes_on(tmp_path, ALONE, OTHER, {})
    assert (tmp_path / "init").exists()
    assert not goes_on(tmp_path, ALONE, JOB, {})
    assert [path.name for path in tmp_path.iterdir()] == ["job.json"]


def test_ranks_meet_as_the_run_did(tmp_path):
    default = tmp_path / "default.toml"
    default.write_text("[parallel]\ntimeout_s = 5")
    assert meeting_settings(tmp_path, default, None, []) == ("auto", 5)
    saved = {"parallel": {"timeout_s": 7}, "train": {"runtime": {"device": "cpu"}}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert meeting_settings(tmp_path, default, None, []) == ("cpu", 7)
    assert meeting_settings(tmp_path, default, None, ["parallel.timeout_s=9"]) == ("cpu", 9)
    with pytest.raises(ConfigError, match=r"parallel\.timeout_s"):
        meeting_settings(tmp_path, default, None, ["parallel.timeout_s=2026-01-01"])


def test_what_is_stated_again_lies_over_what_was_saved(tmp_path):
    saved = RunConfig(train={"steps": 9}, data={"sources": ["a"]})
    (tmp_path / "config.json").write_text(saved.model_dump_json())
    config = tmp_path / "own.toml"
    config.write_text('train = {steps = 300, batch_size = 4}\ndata.sources = ["é 😀"]')
    cfg = settings_again(tmp_path, config, ["optim.lr=0.5"], leave_out=("train.steps",))
    assert (cfg.train.steps, cfg.train.batch_size, cfg.optim.lr) == (9, 4, 0.5)
    assert cfg.data.sources == ("é 😀",)
    assert cfg.model == saved.model
