"""moestro: build, train, look inside, shrink and run mixture-of-experts language models.

`MoE(MoEConfig(...))` replaces a feed-forward layer in any PyTorch model. Names are loaded when
first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moestro.config import ModelConfig, MoEConfig, RouterConfig, RunConfig
    from moestro.models.decoder import Decoder
    from moestro.models.twin import dense_twin
    from moestro.moe.layer import MoE
    from moestro.moe.routing import Plan, Routing

__version__ = "0.1.0"

_HOMES = {
    "Decoder": "moestro.models.decoder",
    "MoE": "moestro.moe.layer",
    "MoEConfig": "moestro.config",
    "ModelConfig": "moestro.config",
    "Plan": "moestro.moe.routing",
    "RouterConfig": "moestro.config",
    "Routing": "moestro.moe.routing",
    "RunConfig": "moestro.config",
    "dense_twin": "moestro.models.twin",
}

__all__ = [
    "Decoder",
    "MoE",
    "MoEConfig",
    "ModelConfig",
    "Plan",
    "RouterConfig",
    "Routing",
    "RunConfig",
    "__version__",
    "dense_twin",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moestro' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
