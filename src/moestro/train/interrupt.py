"""Ctrl-C, SIGTERM and a closed terminal as a request: finish the step, save, and stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Self

# Elsewhere than on Unix a closed terminal and a reader that left send no signal.
HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)
READER_LEFT = getattr(signal, "SIGPIPE", signal.SIGTERM)
STOPPING = (signal.SIGINT, signal.SIGTERM, HANGUP)
# A Ctrl-C comes twice to what torchrun started: from the terminal, and then from torchrun.
ONE_CTRL_C_S = 1.0


class StopRequest:
    """While entered, the first signal of `STOPPING` is kept in `signal`; a second Ctrl-C aborts.

    Outside the main thread Python allows no handlers, and entering changes nothing.

    Attributes:
        signal: Number of the signal that asked to stop, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._asked_s = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {which: signal.signal(which, self._ask) for which in STOPPING}
        return self

    def __exit__(self, *raised: object) -> None:
        for which, handler in self._previous.items():
            signal.signal(which, handler)

    def _ask(self, which: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if not self.signal:
            self.signal, self._asked_s = which, now_s
        elif which == signal.SIGINT:
            repeated = self.signal == which and "TORCHELASTIC_RUN_ID" in os.environ
            if not (repeated and now_s - self._asked_s < ONE_CTRL_C_S):
                raise KeyboardInterrupt
