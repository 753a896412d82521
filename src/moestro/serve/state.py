"""What all routes share."""

from __future__ import annotations

from typing import NamedTuple

from moestro.serve.engine import EngineThread
from moestro.serve.served import Served
from moestro.serve.settings import ServeSettings


class State(NamedTuple):
    """The model, the thread that owns it, and how the server behaves."""

    served: Served
    engine: EngineThread
    settings: ServeSettings
