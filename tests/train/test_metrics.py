import importlib
import json
import math
import sys
from pathlib import Path

import pytest

from moestro.errors import CheckpointError, ConfigError, TrainingError
from moestro.train.metrics import (
    METRICS_NAME,
    MetricsLog,
    cut_after,
    flatten,
    history,
    read_metrics,
)


def write(folder: Path, steps, **options) -> None:
    log = MetricsLog(folder, **options)
    for step in steps:
        log.write({"step": step, "loss": step / 2})
    log.close()


def test_each_record_is_one_line_of_json(tmp_path):
    write(tmp_path, [1, 2])
    lines = (tmp_path / METRICS_NAME).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
    ]
    assert read_metrics(tmp_path / METRICS_NAME) == [json.loads(line) for line in lines]


def test_a_record_is_on_disk_before_the_log_is_closed(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 1})
    assert read_metrics(tmp_path / METRICS_NAME) == [{"step": 1}]
    log.close()


def test_lines_past_the_resumed_step_are_cut(tmp_path):
    write(tmp_path, [1, 2, 3, 4, 5])
    write(tmp_path, [4, 5, 6], step=3)
    assert [r["step"] for r in read_metrics(tmp_path / METRICS_NAME)] == [1, 2, 3, 4, 5, 6]


def test_a_torn_last_line_is_ignored_and_removed_on_resume(tmp_path):
    write(tmp_path, [1, 2])
    with (tmp_path / METRICS_NAME).open("a") as file:
        file.write('{"step": 3, "lo')
    assert [r["step"] for r in read_metrics(tmp_path / METRICS_NAME)] == [1, 2]
    write(tmp_path, [3], step=2)
    assert [r["step"] for r in read_metrics(tmp_path / METRICS_NAME)] == [1, 2, 3]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1}', ""])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / METRICS_NAME).write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(CheckpointError, match="line 2"):
        read_metrics(tmp_path / METRICS_NAME)


def test_no_file_means_no_records(tmp_path):
    assert read_metrics(tmp_path / METRICS_NAME) == []


def test_numbers_that_json_has_not_become_null(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "loss": float("nan"), "layers": [{"imbalance": float("inf")}]})
    log.close()
    expected = {"step": 1, "loss": None, "layers": [{"imbalance": None}]}
    assert read_metrics(tmp_path / METRICS_NAME) == [expected]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_training_error(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path)
    log.close()
    (tmp_path / METRICS_NAME).unlink()
    (tmp_path / METRICS_NAME).symlink_to("/dev/full")
    monkeypatch.setattr("moestro.train.metrics.cut_after", lambda path, step: None)
    log = MetricsLog(tmp_path)
    with pytest.raises(TrainingError, match="No space left"):
        log.write({"step": 1})
    log.close()


def test_a_folder_that_cannot_be_written_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot write metrics"):
        MetricsLog(tmp_path / "missing")


def test_tensorboard_without_the_extra_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'moestro\[tensorboard\]'"):
        MetricsLog(tmp_path, tensorboard=True)


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
    written = []

    class Board:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    class Module:
        SummaryWriter = Board

    monkeypatch.setattr(importlib, "import_module", lambda name: Module)
    log = MetricsLog(tmp_path, step=4, tensorboard=True)
    log.write({"step": 5, "loss": 2.0, "layers": [{"dead": 1}]})
    log.close()
    folder = str(tmp_path / "tensorboard")
    assert written == [(folder, 5), ("loss", 2.0, 5), ("layers/0/dead", 1.0, 5), "closed"]


def test_flatten_names_nested_numbers_and_skips_text():
    record = {"step": 1, "a": 1, "b": {"c": 2.5}, "d": [{"e": 3}], "warnings": ["text"]}
    assert dict(flatten(record)) == {"a": 1.0, "b/c": 2.5, "d/0/e": 3.0}


@pytest.mark.parametrize("step", ["[1]", "null", '"1"', "1.5", "true", "9" * 5000, "[" * 5000])
def test_a_step_that_is_no_number_is_refused(tmp_path, step):
    path = tmp_path / METRICS_NAME
    path.write_text(f'{{"step": 1}}\n{{"step": {step}}}\n')
    for read in (read_metrics, lambda path: cut_after(path, 1)):
        with pytest.raises(CheckpointError, match=r"line 2 is not a metrics record: .*remove that"):
            read(path)


def test_evaluations_among_records():
    measured = {"step": 2, "tokens": 64, "seconds": 0.5, "train_flops": 1e9}
    found = history([{"step": 1}, {**measured, "bits_per_byte": {"all": 1.5, "code": None}}])
    assert [point[:4] for point in found] == [(2, 64, 0.5, 1e9)]
    assert found[0].bits_per_byte["all"] == 1.5
    assert math.isnan(found[0].bits_per_byte["code"])
    for damage in (
        {"bits_per_byte": 3},
        {"bits_per_byte": {"all": {}}},
        {"bits_per_byte": {}, "tokens": []},
    ):
        with pytest.raises(CheckpointError, match=r"step 2 are not an evaluation .*remove"):
            history([{**measured, **damage}])
    del measured["seconds"]
    with pytest.raises(CheckpointError, match="seconds"):
        history([{**measured, "bits_per_byte": {}}])
