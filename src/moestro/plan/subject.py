"""What is planned for: a model's settings and count, from a preset or a file of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from moestro.config import EncDecConfig, ModelConfig, NetworkConfig, RunConfig
from moestro.models.count import Count, count
from moestro.models.twin import dense_twin
from moestro.plan.presets import preset
from moestro.settings import read_values

RUMOUR = "RUMOUR"


class Subject(NamedTuple):
    """A model to plan for.

    Attributes:
        name: for people.
        cfg: its settings; None where only counts are known.
        counted: its parameters and FLOPs.
        source: where the settings are from.
        note: what is assumed, or not modelled.
        rumour: nothing about it was ever confirmed.
    """

    name: str
    cfg: NetworkConfig | None
    counted: Count
    source: str = ""
    note: str = ""
    rumour: bool = False

    @property
    def title(self) -> str:
        """The name, with a mark on a rumour."""
        return f"{self.name} ({RUMOUR})" if self.rumour else self.name


def from_preset(name: str) -> Subject:
    """The preset of that name.

    Raises:
        ConfigError: there is none; the message has the nearest.
    """
    known = preset(name)
    return Subject(known.name, known.cfg, known.count, known.source, known.note, known.rumour)


def from_settings(name: str, cfg: NetworkConfig, source: str) -> Subject:
    """A model whose settings are at hand."""
    return Subject(name, cfg, count(cfg), source)


def from_file(path: Path) -> Subject:
    """A .toml or .json file of this project's settings.

    The file holds a model's settings, or those of a run with the model under [model]. One that
    names `encoder_layers` or `decoder_layers` is an encoder-decoder.

    Raises:
        ConfigError: it cannot be read, or is neither.
    """
    return from_settings(path.stem, _model(read_values(path)), str(path))


def _model(values: dict[str, Any]) -> ModelConfig | EncDecConfig:
    """The model in a file's settings."""
    if values.keys() == {"model"} and isinstance(values["model"], dict):
        return _model(values["model"])
    if values.keys() & RunConfig.model_fields.keys():
        return RunConfig(**values).model
    if values.keys() & {"encoder_layers", "decoder_layers"}:
        return EncDecConfig(**values)
    return ModelConfig(**values)


def dense_of_equal_cost(subject: Subject) -> Subject | None:
    """The dense model with as many active parameters; None for a dense model."""
    return _dense(subject, "dense, equal cost", total=False)


def dense_of_equal_size(subject: Subject) -> Subject | None:
    """The dense model with as many parameters in all; None for a dense model."""
    return _dense(subject, "dense, equal size", total=True)


def _dense(subject: Subject, name: str, total: bool) -> Subject | None:
    """By the settings where they are known, else by the numbers alone."""
    counted = subject.counted
    if subject.cfg is not None:
        if subject.cfg.moe is None:
            return None
        cfg = dense_twin(subject.cfg, "total" if total else "active")
        return Subject(name, cfg, count(cfg), rumour=subject.rumour)
    if counted.active == counted.total:
        return None
    size = counted.total if total else counted.active
    matmul = counted.matmul + size - counted.active
    same = counted._replace(total=size, active=size, matmul=matmul, expert=0)
    return Subject(name, None, same, rumour=subject.rumour)
