"""Anybody's mixture of experts compared with a per-token definition in float64.

    from moestro.check import Description, ExpertNames, RouterRule, check

    report = check((layer, Description(...)))     # or an MoE, a model of transformers, "my:factory"
    assert report.ok, report.text()

docs/design/0006-check.md says how. Names are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moestro.check.description import (
        AdapterNames,
        Capacity,
        Description,
        ExpertNames,
        RouterRule,
        SharedNames,
    )
    from moestro.check.report import Finding, Report
    from moestro.check.running import check

_HOMES = {
    "AdapterNames": "description",
    "Capacity": "description",
    "Description": "description",
    "ExpertNames": "description",
    "Finding": "report",
    "Report": "report",
    "RouterRule": "description",
    "SharedNames": "description",
    "check": "running",
}

__all__ = [
    "AdapterNames",
    "Capacity",
    "Description",
    "ExpertNames",
    "Finding",
    "Report",
    "RouterRule",
    "SharedNames",
    "check",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moestro.check' has no attribute {name!r}")
    return getattr(import_module(f"moestro.check.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
