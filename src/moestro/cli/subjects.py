"""What the names on `moestro plan`'s command line mean: settings, wherever they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moestro.plan.subject import PlannedModel


def open_subjects(names: Sequence[str], accept_fields: Sequence[str] = ()) -> list[PlannedModel]:
    """What names on the command line mean; subjects of one title have the names as given.

    Raises:
        ConfigError, CheckpointError: see `open_subject`.
    """
    subjects = [open_subject(name, accept_fields) for name in names]
    titles = [subject.name for subject in subjects]
    return [
        subject if titles.count(subject.name) == 1 else replace(subject, name=name)
        for subject, name in zip(subjects, names, strict=True)
    ]


def open_subject(name: str, accept_fields: Sequence[str] = ()) -> PlannedModel:
    """What a name means: a file or folder that is there, else a preset, else a model of the hub.

    Raises:
        ConfigError: it is not one of these, or its settings are not allowed.
        CheckpointError: a config.json cannot be read, or the hub has no model of that name.
    """
    from moestro.errors import ConfigError
    from moestro.plan.presets import is_preset, preset
    from moestro.plan.subject import from_file

    path, title = Path(name), None
    if not path.exists():
        if path.suffix in (".json", ".toml"):
            raise ConfigError(f"there is no file {path}; give a config.json, a .toml or a preset")
        if is_preset(name) or "/" not in name:
            return preset(name)
    # They import torch, which a preset does not need.
    from moestro.checkpoints.folders import is_pretrained
    from moestro.checkpoints.gguf.header import is_gguf
    from moestro.checkpoints.hub import find_settings, settings_of

    if path.exists():
        path = settings_of(path)
    else:
        path, title = find_settings(name), name
    if title is None:
        title = path.parent.resolve().name if path.name == "config.json" else path.stem
    if is_gguf(path) or (path.suffix == ".json" and is_pretrained(path)):
        return _published(title, path, accept_fields)
    return from_file(path, title)


def _published(title: str, path: Path, accept_fields: Sequence[str]) -> PlannedModel:
    """A config.json of Hugging Face's layout, or GGUF; how weights are stored is only noted."""
    from moestro.checkpoints.gguf.header import is_gguf, kinds_of
    from moestro.checkpoints.quantised.methods import quantisation
    from moestro.checkpoints.reading import read_settings
    from moestro.plan.subject import from_settings

    described = read_settings(path, accept_fields, for_weights=False)
    stored = quantisation(described.fields)
    words = kinds_of(path) if is_gguf(path) else stored and f"quantised by {stored.words}"
    note = f"Its weights are stored {words}." if words else ""
    return from_settings(title, described.cfg, str(path), note)
