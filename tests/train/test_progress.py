import io

import pytest
from rich.console import Console

from moestro.train.progress import ProgressDisplay, describe, duration

LAYERS = [
    {"layer": 0, "imbalance": 1.5, "dead": 1, "dropped": 0.1, "entropy": 0.5},
    {"layer": 1, "imbalance": 3.0, "dead": 2, "dropped": 0.3, "entropy": 0.7},
]
RECORD = {
    "step": 25,
    "loss": 2.5,
    "tokens_per_s": 1000.0,
    "step_tokens": 100,
    "bits_per_byte": {"all": 3.25},
    "layers": LAYERS,
}


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100)


def test_a_line_says_everything():
    line = describe(RECORD, 100)
    for part in (
        "step 25/100",
        "loss 2.5000",
        "bits/byte 3.2500",
        "tokens/s 1,000",
        "ETA 8s",
        "load max/mean 3.00",
        "dead experts 3",
        "dropped 20.0%",
        "router entropy 0.60",
    ):
        assert part in line


def test_a_dense_record_says_nothing_about_experts():
    assert describe({"step": 1, "layers": []}, 3) == "step 1/3"


def test_plain_lines_come_at_intervals_and_at_the_end():
    screen = console(False)
    with ProgressDisplay("run", screen, plain_every_s=1e9) as progress:
        for step in range(1, 11):
            progress.update({"step": step}, 10)
    assert screen.file.getvalue().splitlines() == ["run: step 1/10", "run: step 10/10"]


def test_the_last_known_bits_per_byte_stay():
    screen = console(False)
    with ProgressDisplay("run", screen, plain_every_s=0) as progress:
        progress.update({"step": 1, "bits_per_byte": {"all": 3.25}}, 10)
        progress.update({"step": 2}, 10)
    assert "3.2500" in screen.file.getvalue().splitlines()[1]


def test_the_speed_is_smoothed():
    screen = console(False)
    with ProgressDisplay("run", screen, plain_every_s=0) as progress:
        for step, speed in enumerate((1000.0, 1000.0, 2000.0), 1):
            progress.update({"step": step, "tokens_per_s": speed, "step_tokens": 1}, 10)
    assert "tokens/s 1,100 " in screen.file.getvalue().splitlines()[2]


def test_a_terminal_gets_a_panel():
    screen = console(True)
    with ProgressDisplay("the run", screen) as progress:
        progress.update(RECORD, 100)
    shown = screen.file.getvalue()
    for part in ("the run", "25/100", "2.5000", "router entropy"):
        assert part in shown


@pytest.mark.parametrize("terminal", [False, True])
def test_warnings_and_notes_stay(terminal):
    screen = console(terminal)
    with ProgressDisplay("run", screen) as progress:
        progress.warn("experts [3] collapsed")
        progress.note("saved here")
    assert "warning: experts [3] collapsed" in screen.file.getvalue()
    assert "saved here" in screen.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
