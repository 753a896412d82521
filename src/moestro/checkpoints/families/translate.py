"""Between a config.json of Hugging Face's layout and our settings, both ways, by a family's table.

Nothing is dropped: a field that the table does not know is refused unless the caller accepts it by
name, and what is written is read back and compared before anyone relies on it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from moestro.checkpoints.families.fields import HARMLESS, HARMLESS_BEGINNINGS, INERT
from moestro.checkpoints.families.table import Config, Entry, Family
from moestro.config import DenseConfig, ModelConfig
from moestro.errors import ConfigError

# What a config.json says of how the weights are stored; the second is MLX's.
QUANTISATION = frozenset({"quantization_config", "quantization"})
_ACCEPT = (
    "If it does not change what the model computes, accept it by name: --accept-field NAME, or "
    "accept_fields=[NAME] in Python"
)
# Tokens that transformers would otherwise take from its own defaults.
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def to_settings(family: Family, hf: Mapping[str, Any], accepted: Container[str] = ()) -> Config:
    """Our settings for a config.json.

    Args:
        family: of its model_type.
        hf: its fields. Those about quantisation are about the files, and not looked at.
        accepted: unknown fields that are accepted because they change nothing.

    Raises:
        ConfigError: a field is unknown, missing, or has a value that cannot be expressed.
    """
    _check_fields(family, hf, accepted)
    values: dict[str, Any] = {}
    for stated in (family.always, *(_read(entry, hf) for entry in family.entries)):
        for dotted, value in stated.items():
            _put(values, dotted, value)
    cfg = family.settings(**values)
    for entry in family.entries:
        if entry.check is not None:
            entry.check(cfg, hf)
    return cfg


def to_fields(family: Family, cfg: Config, original: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json for our settings.

    Args:
        family: what to write it as.
        cfg: our settings.
        original: the config.json that the model came from, or {}. Its fields stay as they are
            where they still mean what `cfg` says; what it says of quantisation is left out, since
            weights are written plain.

    Raises:
        ConfigError: the family cannot express these settings; names the first that it cannot.
    """
    if not isinstance(cfg, family.settings):
        raise ConfigError(
            f"{family.model_type} takes {family.settings.__name__}, not {type(cfg).__name__}"
        )
    cfg = _spelled_out(cfg, kv_heads=not original)
    before = None
    if original:
        fields = {name: value for name, value in original.items() if name not in QUANTISATION}
        before = canonical(to_settings(family, original, original))
    else:
        fields = {"architectures": [family.architecture], "model_type": family.model_type}
        fields |= dict.fromkeys(SPECIAL)
    for entry in family.entries:
        written = entry.write(cfg, original)
        if before is not None and _agrees(entry, original, before, cfg):
            continue
        for name in entry.theirs:
            fields.pop(name, None)
        fields |= written
    fields |= family.replaced
    lost = _difference(canonical(cfg), canonical(to_settings(family, fields, fields)))
    if lost is not None:
        name, ours, theirs = lost
        raise ConfigError(
            f"the layout of {family.model_type} cannot express {name} = {ours!r}; "
            f"a model of that family has {theirs!r}"
        )
    return fields


def canonical(cfg: Config) -> dict[str, Any]:
    """Settings as nested values, without what has no meaning for the model as it runs.

    Defaults that follow from others are spelled out; what only training reads is left out.
    """
    values = cfg.model_dump(mode="json")
    attention = values["attention"]
    if attention["latent"] is None:
        attention["head_dim"] = cfg.head_dim
        attention["num_kv_heads"] = cfg.num_kv_heads
    if isinstance(cfg, ModelConfig):
        mixtures = [n for n in range(cfg.num_layers) if cfg.is_moe_layer(n)]
        if len(mixtures) == cfg.num_layers:
            values["dense"] = DenseConfig().model_dump(mode="json")
        if cfg.moe is None:
            values |= {"moe_every": 1, "dense_first": 0}
        elif cfg.moe_every > 1:
            # A mixture may start later than its turn allows: the same layers, said otherwise.
            values["dense_first"] = mixtures[0]
    if cfg.moe is not None:
        moe, router = values["moe"], values["moe"]["router"]
        router["renormalize"] = cfg.moe.renormalizes
        if router["num_groups"] == 1:
            router["group_score"] = "max"
        del moe["init_scale"], moe["experts"]["dropout"], router["jitter"]
    return values


def _read(entry: Entry, hf: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry says of our settings."""
    try:
        return entry.read(hf)
    except (ArithmeticError, LookupError, TypeError) as error:
        given = ", ".join(f"{name} = {hf[name]!r}"[:200] for name in entry.theirs if name in hf)
        raise ConfigError(
            f"{given or entry.theirs[0]} cannot be read ({error}): it, or a field that it depends "
            "on, is missing or of the wrong kind"
        ) from None


def _spelled_out(cfg: Config, kv_heads: bool) -> Config:
    """The same settings, with defaults said that a config.json cannot leave out.

    `kv_heads`: the number of key/value heads among them, since transformers refuses null.
    """
    values: dict[str, Any] = {}
    if cfg.moe is not None:
        router = cfg.moe.router.model_copy(update={"renormalize": cfg.moe.renormalizes})
        values["moe"] = cfg.moe.model_copy(update={"router": router})
    if kv_heads and cfg.attention.latent is None:
        update = {"num_kv_heads": cfg.num_kv_heads}
        values["attention"] = cfg.attention.model_copy(update=update)
    return cfg.model_copy(update=values)


def _check_fields(family: Family, hf: Mapping[str, Any], accepted: Container[str]) -> None:
    """Refuse fields that may mean what is not expressed here."""
    known = fields_with_meaning(family) | HARMLESS | family.harmless | QUANTISATION
    inert = {one.theirs: one for one in (*INERT, *family.inert) if one.theirs not in known}
    for name in sorted(hf.keys() & inert.keys()):
        allowed, value = inert[name].allowed, hf[name]
        if value is not None and value not in allowed and name not in accepted:
            raise ConfigError(
                f"{name} is {value!r}, which would mean {inert[name].otherwise}; only "
                f"{allowed[0]!r} can be expressed here. {_ACCEPT}"
            )
    unknown = [
        name
        for name in sorted(hf.keys() - known - inert.keys())
        if name not in accepted and not name.startswith(HARMLESS_BEGINNINGS)
    ]
    if unknown:
        raise ConfigError(
            f"unknown field {', '.join(unknown)} for model_type {family.model_type}: its meaning "
            f"is not known here, so it is not ignored. {_ACCEPT}"
        )


def fields_with_meaning(family: Family) -> set[str]:
    """The fields of config.json that a family's settings are made from."""
    return {name for entry in family.entries for name in entry.theirs} | family.replaced.keys()


def _agrees(entry: Entry, original: Mapping[str, Any], before: dict[str, Any], cfg: Config) -> bool:
    """Whether the original's fields, which meant `before`, already say what `cfg` says."""
    if entry.check is not None:
        try:
            entry.check(cfg, original)
        except ConfigError:
            return False
    now = canonical(cfg)
    return all(_take(before, name) == _take(now, name) for name in _read(entry, original))


def _take(values: Any, dotted: str) -> Any:
    """A nested value; None where its table is unset or does not have it."""
    for part in dotted.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _put(values: dict[str, Any], dotted: str, value: Any) -> None:
    *way, name = dotted.split(".")
    for part in way:
        values = values.setdefault(part, {})
    values[name] = value


def _difference(ours: Any, theirs: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """(dotted name, ours, theirs) of the first value that differs."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in dict.fromkeys((*ours, *theirs)):
            found = _difference(ours.get(key), theirs.get(key), f"{name}.{key}".lstrip("."))
            if found is not None:
                return found
        return None
    return None if ours == theirs else (name, ours, theirs)
