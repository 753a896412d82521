"""Metrics on disk: one JSON object a line, always; TensorBoard beside it on request."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moestro.errors import CheckpointError, ConfigError, TrainingError
from moestro.files import write_whole
from moestro.strictjson import parse

METRICS_NAME = "metrics.jsonl"


class Point(NamedTuple):
    """One held-out evaluation of a run.

    Attributes:
        step: Steps done.
        tokens: Tokens trained on.
        seconds: Seconds spent in the steps, evaluation and saving not counted.
        train_flops: Floating-point operations of those steps, counted from the settings.
        bits_per_byte: By domain, and `all`.
    """

    step: int
    tokens: int
    seconds: float
    train_flops: float
    bits_per_byte: dict[str, float]


class MetricsLog:
    """Appends records to `metrics.jsonl` in a run folder, and to TensorBoard if asked.

    Args:
        folder: The run folder.
        step: The step the run starts after; lines of later steps are cut off.
        tensorboard: Also write event files under `folder/tensorboard`.
    """

    def __init__(self, folder: Path, step: int = 0, tensorboard: bool = False) -> None:
        self.path = folder / METRICS_NAME
        self._board = _tensorboard_writer(folder, step) if tensorboard else None
        try:
            cut_after(self.path, step)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write metrics to {self.path}: {error.strerror}") from None

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one record with at least a `step`; a number that is not finite becomes null."""
        try:
            self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainingError(
                f"cannot write metrics to {self.path}: {error.strerror}; make room on the disk, "
                "then go on with --resume"
            ) from None
        if self._board is not None:
            for name, value in flatten(record):
                self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Close the file; nothing can be written afterwards."""
        # What could not be flushed was already reported by write().
        with contextlib.suppress(OSError):
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole record of a metrics file, in order; none if there is no file.

    A last line without its newline, as a killed process leaves it, is ignored.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = parse(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise CheckpointError(
                f"{path} line {number} is not a metrics record: {line[:60]!r}; "
                "remove that line, then go on with --resume"
            )
        records.append(record)
    return records


def history(records: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The evaluations among metrics records, oldest first; a measure of null is NaN."""
    points = []
    for record in records:
        if "bits_per_byte" not in record:
            continue
        try:
            tokens, seconds, flops = (float(record[name]) for name in Point._fields[1:4])
            measured = {
                name: math.nan if value is None else float(value)
                for name, value in record["bits_per_byte"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"the metrics of step {record['step']} are not an evaluation ({error!r}); remove "
                f"their line from {METRICS_NAME}, then go on with --resume"
            ) from None
        points.append(Point(record["step"], int(tokens), seconds, flops, measured))
    return points


def cut_after(path: Path, step: int) -> None:
    """Remove the records of steps later than `step`, as a resumed run will write them again."""
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))


def flatten(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Name every number of a nested record, as `bits_per_byte/code` or `layers/0/dead`."""
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}/")
        elif isinstance(value, list):
            yield from flatten({str(i): item for i, item in enumerate(value)}, f"{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield name, float(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tensorboard_module() -> Any:
    """Torch's module that writes event files.

    Raises:
        ConfigError: what it needs is not installed.
    """
    # Imported by name: the extra is optional, and the module itself needs it at import.
    try:
        return importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        raise ConfigError(
            "train.runtime.tensorboard is on, but tensorboard is not installed; "
            "install it with: pip install 'moestro[tensorboard]' (metrics.jsonl needs nothing)"
        ) from None


def _tensorboard_writer(folder: Path, step: int) -> Any:
    return tensorboard_module().SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
