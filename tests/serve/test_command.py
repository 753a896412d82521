"""`moestro serve` as its user runs it: a process, what it prints, a signal."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest

from moestro.cli.main import main


@contextmanager
def command(*words: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The process once it is ready, and the lines that it has printed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "moestro", "serve", *words, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
    )
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith("ready"):
                break
        yield process, lines
    finally:
        process.kill()
        process.communicate()


def address_in(lines: list[str]) -> str:
    found = re.search(r"http://127\.0\.0\.1:\d+", "\n".join(lines))
    assert found, lines
    return found[0]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_line_with_curl_works_and_a_signal_ends_it(folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "a file of keys"
    keys.write_bytes(b"\r\nfirst\r\nsecond\r\n")
    folder = Path(shutil.copytree(folder, tmp_path / "tiny"))
    (folder / "probe").mkdir()
    (folder / "probe" / "report.html").write_text("<p>what the probe wrote")
    with command(str(folder), "--api-key-file", str(keys)) as (process, lines):
        assert len(lines) <= 5
        assert lines[-1].startswith("ready")
        assert lines[0].startswith("tiny: ")
        assert str(folder) not in "\n".join(lines)
        (line,) = [each for each in lines if each.startswith("curl ")]
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
        assert '"object":"chat.completion"' in done.stdout
        assert httpx.get(f"{address_in(lines)}/v1/models").status_code == 401
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 400}
        headers = {"authorization": "Bearer second"}
        report = httpx.get(f"{address_in(lines)}/report", headers=headers)
        assert report.text == "<p>what the probe wrote"
        with httpx.stream(
            "POST",
            f"{address_in(lines)}/v1/chat/completions",
            json={**body, "stream": True, "temperature": 3, "seed": 1},
            headers=headers,
        ) as response:
            events = response.iter_lines()
            next(events)
            process.send_signal(signal.SIGTERM)
            rest = list(events)
        assert rest[-2] == "data: [DONE]" or rest[-1] == "data: [DONE]"
        assert '"finish_reason":"' in "".join(rest)
        _, problems = process.communicate(timeout=30)
        assert "Traceback" not in problems
        assert process.returncode == 0


def test_a_port_that_another_has(folder: Path, address: str, capsys) -> None:
    port = address.rsplit(":")[-1]
    assert main(["serve", str(folder), "--port", port]) == 2
    said = capsys.readouterr().err
    assert "another program has it" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "no.such.host.invalid"], "give a --host of this machine"),
        (["--api-key-file", "missing"], "cannot be read"),
        (["--context", "100000"], "more than the model's context, 512 tokens"),
        (["--max-live", "0"], "max_live = 0 is not allowed"),
    ],
)
def test_what_cannot_be_served(folder: Path, words: list[str], said: str, capsys) -> None:
    assert main(["serve", str(folder), "--port", "0", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_file_without_keys_asks_for_some(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "keys").write_text("\n \n")
    assert main(["serve", str(folder), "--api-key-file", str(tmp_path / "keys")]) == 2
    assert "holds no key" in capsys.readouterr().err


def test_a_second_signal_ends_at_once_and_quietly() -> None:
    """The text would go on for 3000 steps of the model."""
    words = [sys.executable, str(Path(__file__).with_name("scripted.py"))]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            url = f"http://127.0.0.1:{int(process.stdout.readline())}/v1/completions"
            body = {"prompt": "a", "max_tokens": 4000, "temperature": 0, "stream": True}
            with httpx.stream("POST", url, json=body) as response:
                next(response.iter_lines())
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGINT)  # another one, as two of a kind may become one
                _, problems = process.communicate(timeout=20)
        finally:
            process.kill()
    assert "Traceback" not in problems
