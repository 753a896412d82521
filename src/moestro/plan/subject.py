"""What is planned for: a model's settings and count, from a preset or a file of settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moestro.config import EncDecConfig, ModelConfig, NetworkConfig, RunConfig
from moestro.models.count import Count, count
from moestro.models.twin import dense_twin
from moestro.settings import read_values

RUMOUR = "RUMOUR"


@dataclass(frozen=True)
class PlannedModel:
    """A model to plan for."""

    name: str
    cfg: NetworkConfig | None  # None where they cannot express it, or are not public
    count: Count
    source: str = ""  # where the settings are from: a file, the paper and table, the model card
    note: str = ""  # what is assumed, or not modelled
    # `model_type` in the config.json of its published checkpoint, whether or not
    # `checkpoints.families` reads it; None without one.
    family: str | None = None
    rumour: bool = False  # nothing about it was ever confirmed; say so wherever it is shown
    illustrative: bool = False  # made up for illustration, not a real model

    @property
    def title(self) -> str:
        """The name, with a mark on a rumour."""
        return f"{self.name} ({RUMOUR})" if self.rumour else self.name


def from_settings(name: str, cfg: NetworkConfig, source: str, note: str = "") -> PlannedModel:
    """A model whose settings are at hand."""
    return PlannedModel(name, cfg, count(cfg), source, note)


def from_file(path: Path, name: str | None = None) -> PlannedModel:
    """A .toml or .json file of this project's settings, called by its stem unless named.

    The file holds a model's settings, or those of a run with the model under [model]. One that
    names `encoder_layers` or `decoder_layers` is an encoder-decoder.

    Raises:
        ConfigError: it cannot be read, or is neither.
    """
    return from_settings(name or path.stem, _model(read_values(path)), str(path))


def _model(values: dict[str, Any]) -> ModelConfig | EncDecConfig:
    """The model in a file's settings."""
    if values.keys() == {"model"} and isinstance(values["model"], dict):
        return _model(values["model"])
    if values.keys() & RunConfig.model_fields.keys():
        return RunConfig(**values).model
    if values.keys() & {"encoder_layers", "decoder_layers"}:
        return EncDecConfig(**values)
    return ModelConfig(**values)


def dense_models(subject: PlannedModel) -> list[PlannedModel]:
    """The dense model with as many active parameters, and the one with as many in all.

    None of a dense model. By the settings where they are known, else by the numbers alone.
    """
    cfg, counted, found = subject.cfg, subject.count, []
    if counted.active == counted.total if cfg is None else cfg.moe is None:
        return []
    names: dict[Literal["active", "total"], str] = {
        "active": "dense, equal cost", "total": "dense, equal size",
    }  # fmt: skip
    for of, name in names.items():
        twin = None if cfg is None else dense_twin(cfg, of)
        if twin is not None:
            same = count(twin)
        else:
            size = counted.total if of == "total" else counted.active
            matmul = counted.matmul + size - counted.active
            same = counted._replace(total=size, active=size, matmul=matmul, expert=0)
        found.append(PlannedModel(name, twin, same, rumour=subject.rumour))
    return found
