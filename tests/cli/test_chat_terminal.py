"""`moestro chat` in a terminal of its own: what is typed, what is seen, Ctrl-C and Ctrl-D."""

import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pty = pytest.importorskip("pty")
termios = pytest.importorskip("termios")
fcntl = pytest.importorskip("fcntl")
CTRL_C, CTRL_D = b"\x03", b"\x04"


class Terminal:
    """A process whose terminal this is.

    Attributes:
        seen: all that it has shown and that was not waited for yet.
    """

    def __init__(self, *words: str) -> None:
        self._own, other = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moestro", *words],
            stdin=other, stdout=other, stderr=other, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "NO_COLOR": "1"},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
        )  # fmt: skip
        os.close(other)
        self.seen = ""

    def until(self, pattern: str, timeout_s: float = 60.0) -> str:
        """Wait until it has shown a pattern; returns what it has shown to the pattern's end."""
        found = self.shows(pattern, timeout_s)
        assert found, f"{pattern!r} did not come; seen: {self.seen!r}"
        shown, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return shown

    def shows(self, pattern: str, timeout_s: float) -> re.Match[str] | None:
        """Where a pattern is in what it has shown; waits for it, and leaves it there."""
        end = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            left = end - time.monotonic()
            if left <= 0:
                return None
            if select.select([self._own], [], [], left)[0]:
                self.seen += os.read(self._own, 65536).decode("utf-8", "replace")
        return found

    def type(self, text: str) -> None:
        """Type a line."""
        os.write(self._own, f"{text}\n".encode())

    def key(self, code: bytes) -> None:
        """Press one key."""
        os.write(self._own, code)

    def close(self) -> None:
        """Leave nothing behind."""
        self.process.kill()
        self.process.wait()
        os.close(self._own)


@pytest.fixture
def terminal(published: Path, tmp_path: Path) -> Iterator[Terminal]:
    folder = Path(shutil.copytree(published, tmp_path / "tiny"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    found = Terminal("chat", str(folder), "--max-tokens", "4000", "--seed", "3")
    yield found
    found.close()


def test_a_conversation_in_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    assert "tiny: /help lists the commands" in terminal.until("> ")
    stopped = ""
    for _ in range(8):  # a random model may end an answer before Ctrl-C
        terminal.type("hello")
        terminal.until("hello\r\n.")  # the echo, and the first of the answer
        terminal.key(CTRL_C)
        stopped = terminal.until(r"\d+ tokens, [\d.]+ tokens/s[^\r]*\r\n> ")
        if "stopped" in stopped:
            break
    assert "tokens/s, stopped" in stopped
    terminal.type("/experts")
    assert "first expert in layer 1" in terminal.until(r"layer.*> ")
    terminal.type("/experts 7")
    assert "layer 7 is not a mixture" in terminal.until("mixture.*> ")
    terminal.type("/help")
    assert "/reset" in terminal.until("goes on in the next.*> ")
    terminal.type("/nonsense")
    assert "/nonsense is not a command" in terminal.until("lists them.*> ")
    terminal.type(f"/save {tmp_path / 'talk.json'}")
    terminal.until("written to.*> ")
    roles = [m["role"] for m in json.loads((tmp_path / "talk.json").read_text())["messages"]]
    assert roles[:2] == ["user", "assistant"]
    terminal.type("/system be brief")
    terminal.until("from now on.*> ")
    terminal.type("/reset")
    terminal.until("a new conversation.*> ")
    terminal.type("/experts")
    assert "there is no answer yet" in terminal.until("yet.*> ")
    # Nothing to stop: how to leave is said. A signal between the prompt and the wait for a key is
    # noticed with the next key, so one press may not be enough.
    for _ in range(12):
        terminal.key(CTRL_C)
        if terminal.shows("Ctrl-D leaves.*> ", timeout_s=5):
            break
    terminal.until("Ctrl-D leaves.*> ")
    terminal.key(CTRL_D)
    assert terminal.process.wait(30) == 0
