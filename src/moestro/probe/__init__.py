"""See inside a mixture: record its routing, measure it beside chance, silence experts, show it.

Names are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moestro.probe.ablation.ablate import ablate
    from moestro.probe.ablation.targets import targets
    from moestro.probe.measures.measure import measure
    from moestro.probe.measures.saturation import saturation
    from moestro.probe.measures.versus import compare
    from moestro.probe.recording.passages import Passage, cut
    from moestro.probe.recording.record import record, record_batches
    from moestro.probe.recording.replay import agreement, replay
    from moestro.probe.recording.reroute import rerouted
    from moestro.probe.recording.tracefile import TraceWriter, read_trace, write_parts
    from moestro.probe.recording.traces import Trace

_HOMES = {
    "Passage": "recording.passages",
    "Trace": "recording.traces",
    "TraceWriter": "recording.tracefile",
    "ablate": "ablation.ablate",
    "agreement": "recording.replay",
    "compare": "measures.versus",
    "cut": "recording.passages",
    "measure": "measures.measure",
    "read_trace": "recording.tracefile",
    "record": "recording.record",
    "record_batches": "recording.record",
    "replay": "recording.replay",
    "rerouted": "recording.reroute",
    "saturation": "measures.saturation",
    "targets": "ablation.targets",
    "write_parts": "recording.tracefile",
}

__all__ = [
    "Passage",
    "Trace",
    "TraceWriter",
    "ablate",
    "agreement",
    "compare",
    "cut",
    "measure",
    "read_trace",
    "record",
    "record_batches",
    "replay",
    "rerouted",
    "saturation",
    "targets",
    "write_parts",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moestro.probe' has no attribute {name!r}")
    return getattr(import_module(f"moestro.probe.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
