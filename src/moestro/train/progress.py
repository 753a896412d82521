"""The live display of a run: speed, loss, time left, and the health of the routing.

On a terminal a panel that redraws itself; elsewhere one plain line every few seconds. Everything
goes to stderr, so that stdout stays free for the result.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PLAIN_EVERY_S = 10.0
SMOOTHING = 0.1


class ProgressDisplay:
    """Shows the records of a training loop; use it as a context manager around the loop.

    Attributes:
        lost: The reader is gone: the terminal was closed, or the other end of a pipe.
    """

    def __init__(
        self,
        title: str = "training",
        console: Console | None = None,
        plain_every_s: float = PLAIN_EVERY_S,
    ) -> None:
        self.title = title
        self._console = console or Console(file=sys.stderr)
        self._plain_every_s, self._last_plain_s = plain_every_s, float("-inf")
        self.lost = False
        self._live: Live | None = None
        self._record: dict[str, Any] = {}
        self._steps = 1

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self._panel)
            self._live.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._live is not None:
            with self._writing():
                self._live.stop()
            self._live = None

    def update(self, record: Mapping[str, Any], steps: int) -> None:
        """Show one metrics record of a run of `steps`; values missing from it keep their last."""
        # A running mean of the speed: single steps vary too much to read, or to predict the end.
        speed: float = record.get("tokens_per_s", 0.0)
        if before := self._record.get("tokens_per_s", 0.0):
            speed = before + SMOOTHING * (speed - before)
        self._record = {**self._record, **record, "tokens_per_s": speed}
        self._steps = steps
        if self._live is None:
            now_s = time.monotonic()
            last = self._record.get("step") == steps
            if last or now_s - self._last_plain_s >= self._plain_every_s:
                self._last_plain_s = now_s
                self.note(f"{self.title}: {describe(self._record, steps)}")

    def warn(self, text: str) -> None:
        """Print a warning that stays and stands out."""
        self.note(f"warning: {text}", style="bold yellow")

    def note(self, text: str, style: str = "") -> None:
        """Print a line that stays, such as the path of a checkpoint."""
        with self._writing():
            self._console.print(Text(text, style=style), soft_wrap=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Take note where the display can no longer be written to: that must not end a run."""
        try:
            yield
        except (OSError, SystemExit):  # rich exits where a pipe is broken
            self.lost = True

    def _panel(self) -> Panel:
        grid = Table.grid(padding=(0, 2))
        for name, value in lines(self._record, self._steps):
            grid.add_row(Text(name, style="dim"), Text(value))
        # In a table, as a bar on its own does not end its line.
        bar = Table.grid(expand=True)
        bar.add_row(ProgressBar(total=self._steps, completed=self._record.get("step", 0)))
        return Panel(Group(bar, grid), title=Text(self.title))


def describe(record: Mapping[str, Any], steps: int) -> str:
    """One plain line of everything `lines` says."""
    return " · ".join(f"{name} {value}" for name, value in lines(record, steps))


def lines(record: Mapping[str, Any], steps: int) -> list[tuple[str, str]]:
    """What to show of a record: (name, value) pairs, only those that are known.

    Of all layers' routing: the worst imbalance, sums and means.
    """
    step = record.get("step", 0)
    found = [("step", f"{step}/{steps}")]
    if "loss" in record:
        found.append(("loss", f"{record['loss']:.4f}"))
    if "bits_per_byte" in record:
        found.append(("held-out bits/byte", f"{record['bits_per_byte']['all']:.4f}"))
    if record.get("tokens_per_s"):
        left_s = (steps - step) * record["step_tokens"] / record["tokens_per_s"]
        found.append(("tokens/s", f"{record['tokens_per_s']:,.0f}"))
        found.append(("ETA", duration(left_s)))
    if layers := record.get("layers"):
        found += [
            ("load max/mean", f"{max(layer['imbalance'] for layer in layers):.2f}"),
            ("dead experts", f"{sum(layer['dead'] for layer in layers):.0f}"),
            ("dropped", f"{sum(layer['dropped'] for layer in layers) / len(layers):.1%}"),
            ("router entropy", f"{sum(layer['entropy'] for layer in layers) / len(layers):.2f}"),
        ]
    return found


def duration(seconds: float) -> str:
    """Seconds as `42s`, `3m05s` or `2h07m`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
