"""Each example runs as written, and prints what it promises."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moestro.kernels import native_cpu

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def output_of(capsys):
    """A function: an example's name → what it prints."""

    def run(name: str) -> str:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def lists_in(text: str) -> list[list[int]]:
    found = re.findall(r"\[([\d, ]+)\]", text)
    return [[int(number) for number in numbers.split(",")] for numbers in found]


def numbers_after(word: str, text: str) -> list[float]:
    return [float(number) for number in re.findall(rf"{word} (\d+\.\d+)", text)]


def test_every_example_is_run_here():
    tested = set(re.findall(r'output_of\("([\w.]+)"\)', Path(__file__).read_text()))
    assert tested == {path.name for path in EXAMPLES.glob("*.py")}
    assert [path.name for path in EXAMPLES.glob("*.sh")] == ["lifecycle.sh"]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_stay_short(path):
    assert len(path.read_text().splitlines()) < 80


def test_replace_ffn(output_of):
    text = output_of("replace_ffn.py")
    losses, balance = numbers_after("step \\d+: loss", text), numbers_after("balance loss", text)
    assert len(losses) == 3
    assert losses[0] > 5, "an untrained model of 256 bytes starts near log 256 = 5.5"
    assert losses[-1] < 3
    assert all(0.9 < value < 2 for value in balance)
    counts = lists_in(text)
    assert [len(layer) for layer in counts] == [8, 8]
    assert all(sum(layer) == 8 * 256 for layer in counts)


def test_inspect_routing(output_of):
    text = output_of("inspect_routing.py")
    sentence = "def wrap(self, text):  # The text is split into 3 lines, at most 70 wide."
    for counts in lists_in(text):
        assert sum(counts) == 2 * len(sentence)
    assert len(lists_in(text)) == 2
    rows = re.findall(r"^  ([0-3]+)$", text, flags=re.MULTILINE)
    assert [len(row) for row in rows] == [len(sentence)] * 2
    assert len(set(rows[0])) > 1, "more than one expert is somebody's first"
    confidence = numbers_after("a token's choice:", text)
    assert all(0 < value < 1.39 for value in confidence)
    weights = numbers_after("weight of the first choice:", text)
    assert all(0.5 <= value < 1 for value in weights)


def test_custom_loop(output_of):
    text = output_of("custom_loop.py")
    losses = numbers_after("loss", text)
    assert losses[2] < losses[0]
    assert losses[5] < losses[3]
    without, moved = map(float, re.search(r"(\S+) without, (\S+) with the bias", text).groups())
    assert 1 <= moved < without <= 4
    assert moved < 1.7, "the bias evens out the load within these steps"


def test_library_chats(output_of, tmp_path, monkeypatch):
    for form, field in (([], "messages"), (["--plain"], "completion")):
        words = ["library_chats.py", str(tmp_path / field), "--most", "150", *form]
        monkeypatch.setattr(sys, "argv", words)
        numbers = re.findall(r"([\d,]+) conversations", output_of("library_chats.py"))
        lines = {
            side: (tmp_path / field / f"{side}.jsonl").read_text().splitlines()
            for side in ("train", "held")
        }
        assert [int(each) for each in numbers] == [len(each) for each in lines.values()]
        assert all(field in json.loads(line) for each in lines.values() for line in each)
    modules = {
        side: {re.search(r" of (\w+)(?: do)?\?", line)[1] for line in each}
        for side, each in lines.items()
    }
    assert not modules["train"] & modules["held"], "modules are held out whole"


@pytest.mark.skipif(native_cpu.available() is not None, reason=str(native_cpu.available()))
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_lifecycle(tmp_path):
    env = {**os.environ, "QUICK": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [EXAMPLES / "lifecycle.sh", tmp_path / "out"], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    for each in ("6 of 8 experts in each mixture", "trained 20 of 20 steps", "ready; Ctrl-C"):
        assert each in done.stdout
    bits = [float(number) for number in re.findall(r"^ *bf16 +(\S+)", done.stdout, re.MULTILINE)]
    assert len(bits) == 2
    assert bits[1] < bits[0], "tuning helped"
    assert re.search(r"^[1-9]\d* tokens in", done.stdout, re.MULTILINE)
    again = subprocess.run(
        [EXAMPLES / "lifecycle.sh", tmp_path / "out"], capture_output=True, text=True, env=env
    )
    assert again.returncode == 2
    assert "exists already" in again.stderr
