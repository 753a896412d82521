"""The base of every settings class: strict in, strict out, and readable when it refuses.

Read from TOML or JSON, overridden by `a.b=value` assignments; an unknown name is an error that
suggests the nearest known one. No tensor here: it imports without torch.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from moestro.errors import ConfigError
from moestro.strictjson import read_object

UNKNOWN = "unknown setting "


class Settings(BaseModel):
    """Base of every settings class: frozen, and a name it does not know is an error.

    Raises:
        ConfigError: one line per problem, each with the field, the value and what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(type(self), error)) from None


AnySettings = TypeVar("AnySettings", bound=Settings)


def load_settings(
    kind: type[AnySettings], path: Path | None = None, overrides: Sequence[str] = ()
) -> AnySettings:
    """Read settings from a TOML or JSON file and apply `a.b=value` overrides.

    Args:
        kind: The settings class to build, usually `RunConfig`.
        path: A .toml or .json file; None starts from the defaults.
        overrides: Assignments such as `model.dim=256`, each value in TOML syntax; a value that is
            not valid TOML is taken as a plain string, and `null` unsets (`model.moe=null`).
    """
    return kind(**read_values(path, overrides))


def read_values(path: Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a file and overrides state, nested, before any of it is checked; as `load_settings`."""
    values = _read(path) if path is not None else {}
    for assignment in overrides:
        _assign(values, assignment)
    return values


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".json":
        return read_object(path, ConfigError, "settings are an object of names and values")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the settings file {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also of numbers of thousands of digits
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _assign(values: dict[str, Any], assignment: str) -> None:
    """Put one `a.b=value` into the nested `values`."""
    name, equals, text = assignment.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set takes NAME=VALUE such as model.dim=256; given: {assignment!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # also of numbers of thousands of digits
        value = text.strip()
    level = values
    for key in keys[:-1]:
        inner = level.get(key)
        level[key] = dict(inner) if isinstance(inner, Mapping) else {}
        level = level[key]
    level[keys[-1]] = None if value == "null" else value


def _explain(kind: type[Settings], error: ValidationError) -> str:
    """Turn pydantic's report into one line per problem, written for a person.

    Settings inside have explained themselves already: their error is a value_error here.
    """
    lines = []
    for problem in error.errors():
        where = ".".join(_names(kind, problem["loc"]))
        context = problem.get("ctx", {})
        match problem["type"]:
            case "extra_forbidden":
                lines.append(_unknown(kind, where))
            case "value_error":
                lines.append(_within(where, str(context.get("error", problem["msg"]))))
            case "missing":
                lines.append(f"{where} is required and was not given")
            case "union_tag_invalid":
                given, allowed = context["tag"], context["expected_tags"]
                lines.append(f"{where}.kind = {given!r} is not allowed: choose one of {allowed}")
            case _:
                message = problem["msg"].lower()
                lines.append(f"{where} = {problem['input']!r} is not allowed: {message}")
    return "; ".join(lines)


def _names(kind: type[Settings], loc: tuple[int | str, ...]) -> list[str]:
    """The names a person would write: without the tag that pydantic adds after a choice."""
    field = kind.model_fields.get(str(loc[0])) if loc else None
    tagged = field is not None and len(settings_classes(field.annotation)) > 1
    return [str(part) for place, part in enumerate(loc) if not (tagged and place == 1)]


def _within(where: str, message: str) -> str:
    """Say where a message of an inner settings class comes from."""
    if not where:
        return message
    if message.startswith(UNKNOWN):
        return message.replace(UNKNOWN, f"{UNKNOWN}{where}.", 1)
    parts = message.split("; ")
    if all(re.match(r"[\w.]+(: | = | is required)", part) for part in parts):
        return "; ".join(f"{where}.{part}" for part in parts)
    return f"{where}: {message}"


def _unknown(kind: type[Settings], name: str) -> str:
    """Name an unknown setting, and the nearest one that exists at its level."""
    known = sorted(kind.model_fields)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
    return f"{UNKNOWN}{name}: {hint}"


def settings_classes(annotation: Any) -> list[type[Settings]]:
    """The settings classes inside an annotation such as `MoEConfig | None`, in its order."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Settings) else []
    return [kind for inner in get_args(annotation) for kind in settings_classes(inner)]
