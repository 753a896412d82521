"""A process that answers one request a line, and its end while it is asked."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from moestro import worker
from moestro.worker import EndedError, Worker

ECHO = """
import sys, time
for line in sys.stdin:
    if line == "wait\\n":
        time.sleep(60)
    print(line, end="", flush=True)
"""


def test_it_answers_and_is_ended_when_it_takes_too_long() -> None:
    asked = Worker(ECHO, ())
    assert asked.ask(b"one\n", 30, 99) == b"one\n"
    assert asked.ask(b"two\n", 30, 99) == b"two\n"
    with pytest.raises(EndedError) as found:
        asked.ask(b"wait\n", 0.1, 99)
    assert found.value.code is None
    assert not asked.is_ready()


def test_it_can_be_ended_while_a_thread_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pipes stay open until that thread has let go of them."""
    asked, reads, read = Worker(ECHO, ()), threading.Event(), os.read

    def slowly(file: int, most: int) -> bytes:
        reads.set()
        time.sleep(0.3)
        return read(file, most)

    with ThreadPoolExecutor(1) as threads:
        assert asked.ask(b"one\n", 30, 99) == b"one\n"
        monkeypatch.setattr(worker.os, "read", slowly)
        answer = threads.submit(asked.ask, b"wait\n", 30, 99)
        # The process ends first, so that there is something to read, its end.
        asked._process.kill()
        assert reads.wait(30)
        asked.close()
        with pytest.raises(EndedError) as found:
            answer.result()
    assert found.value.code == -9


def test_one_that_has_been_ended_answers_nothing_more() -> None:
    asked = Worker(ECHO, ())
    asked.close()
    with pytest.raises(EndedError):
        asked.ask(b"one\n", 30, 99)
