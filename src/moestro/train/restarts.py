"""What torchrun starts again, and whether it goes on with the run in its folder.

    job.json      the job of torchrun that began the run, and the options that no settings hold

Only a run that the job itself began is gone on with: another one in the folder is refused at every
start, not at the first alone.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from moestro.checkpoints.folders import CHECKPOINTS, newest_checkpoint, read_json, step_folders
from moestro.config import RunConfig
from moestro.errors import CheckpointError, ConfigError
from moestro.files import write_json
from moestro.settings import load_settings, read_values
from moestro.train.distributed import Ranks
from moestro.train.state import (
    ORIGIN,
    SETTINGS_NAME,
    clear_leftovers,
    clear_origin,
    dotted,
    holds_run,
)

JOB_NAME = "job.json"
RESTARTS, JOB = "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID"
_NAMELESS = "none"  # torchrun's own word for it


def goes_on(
    run: Path, ranks: Ranks, environment: Mapping[str, str], begun: Mapping[str, Any]
) -> bool:
    """Whether this start is one that torchrun made again, and the folder holds its run.

    Every rank calls it and gets the same answer. A machine that was replaced knows of no restart,
    nor does one where no rank had failed, so the job's name says it; of a job without one, the same
    torchrun must count a restart. What a kill left of step 0 of a run that was to begin from
    weights is removed: such a run begins again.

    Args:
        run: the folder.
        ranks: this process's place.
        environment: torchrun's variables.
        begun: the options beside the settings; see `note_job`.

    Raises:
        ConfigError: the job began the run with others.
    """
    again = ranks.first("" if environment.get(RESTARTS, "0") != "0" else None) is not None
    found = None
    if ranks.writes and holds_run(run):
        job = _job(environment)
        same = job is not None and job == _noted(run).get("job")
        if same and (again or environment[JOB] != _NAMELESS):
            found = "" if step_folders(run) or not (run / ORIGIN).is_dir() else None
            if found is None:
                _clear(run)
    if ranks.first(found) is None:
        return False
    then = _noted(run).get("begun", begun)
    differing = [
        f"{name} = {value!r} (then: {then.get(name)!r})"
        for name, value in begun.items()
        if value != then.get(name)
    ]
    if differing:
        raise ConfigError(
            f"the run in {run} was begun by this job with other options: {'; '.join(differing)}. "
            "Set them back, or start a new run in another folder"
        )
    return True


def note_job(run: Path, environment: Mapping[str, str], begun: Mapping[str, Any]) -> None:
    """Write down which job of torchrun begins a run, if one does; see `goes_on`.

    Args:
        run: its folder, claimed.
        environment: torchrun's variables.
        begun: the options that no settings hold, by name: the weights that it begins from.
    """
    (run / JOB_NAME).unlink(missing_ok=True)
    job = _job(environment)
    if job is not None:
        write_json(run / JOB_NAME, {"job": job, "begun": dict(begun)})


def settings_again(
    run: Path, config: Path | None, stated: list[str], leave_out: Collection[str] = ()
) -> RunConfig:
    """Settings of the run in a folder, under what is stated now; the Trainer compares the two.

    Args:
        run: the folder; it holds settings or a checkpoint.
        config: The person's own settings, of which the run's weights state the rest.
        stated: `a.b=value` over them.
        leave_out: Names of settings that the run worked out by itself.
    """
    place = run / SETTINGS_NAME
    if not place.exists():
        place = newest_checkpoint(run, known=Path.is_dir) / "run.json"
    over = [
        f"{name}={json.dumps(value, ensure_ascii=False, default=str)}"
        for name, value in dotted(read_values(config, stated)).items()
        if name not in leave_out
    ]
    return load_settings(RunConfig, place, over)


def meeting_settings(
    run: Path, default: Path, config: Path | None, stated: list[str]
) -> tuple[str, int]:
    """What ranks need to meet, before they can tell whether they go on: device and timeout in s.

    Those stated, else those of the run in the folder, else the default's.
    """
    values = dotted(read_values(default))
    if (run / SETTINGS_NAME).exists():
        values |= dotted(read_values(run / SETTINGS_NAME))
    values |= dotted(read_values(config, stated))
    names = ("train.runtime.device", "parallel.timeout_s")
    given = [f"{name}={json.dumps(values[name], default=str)}" for name in names if name in values]
    cfg = load_settings(RunConfig, None, given)
    return cfg.train.runtime.device, cfg.parallel.timeout_s


def _job(environment: Mapping[str, str]) -> str | None:
    """What tells a job from others: its name, or else the process that starts its first rank."""
    name = environment.get(JOB)
    if name == _NAMELESS:
        return f"torchrun {os.getppid()} on {platform.node()}"
    return name or None


def _noted(run: Path) -> dict[str, Any]:
    """What `note_job` wrote; nothing where it is missing or damaged."""
    with suppress(CheckpointError):
        return read_json(run / JOB_NAME)
    return {}


def _clear(run: Path) -> None:
    """Remove what there is of step 0; anything else stays, and the folder is then refused."""
    clear_leftovers(run)
    with suppress(OSError):
        (run / CHECKPOINTS).rmdir()
    clear_origin(run)
