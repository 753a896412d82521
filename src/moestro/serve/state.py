"""What all routes share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moestro.serve.engine import Ask, EngineThread, Job
from moestro.serve.grammars import Grammars
from moestro.serve.metrics import Metrics
from moestro.serve.served import Served
from moestro.serve.settings import ServeSettings


class State(NamedTuple):
    """The model, the thread that owns it, how the server behaves, its figures and grammars.

    Attributes:
        report: The page that `moestro probe --report` wrote of the model; None: there is none.
    """

    served: Served
    engine: EngineThread
    settings: ServeSettings
    metrics: Metrics
    grammars: Grammars
    report: str | None = None

    def submit(self, asks: Sequence[Ask]) -> Job:
        """Give a request to the engine, and count what becomes of it.

        Raises:
            ApiError: see `EngineThread.submit`.
        """
        job = self.engine.submit(asks)
        job.watch = self.metrics.watch(job)
        return job


def new_state(served: Served, settings: ServeSettings, report: str | None = None) -> State:
    """A server of a model that has not begun."""
    engine = EngineThread(served.model, served.tokenizer, settings, served.adapted)
    return State(
        served,
        engine,
        settings,
        Metrics(served.name, engine, served.moe_layers),
        Grammars(served.tokenizer),
        report,
    )
