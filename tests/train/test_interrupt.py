import os
import signal
import threading
import time

import pytest

from moestro.train.interrupt import StopRequest


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_kept_and_the_handlers_come_back(which):
    before = signal.getsignal(which)
    with StopRequest() as stop:
        assert stop.signal == 0
        os.kill(os.getpid(), which)
        assert stop.signal == which
    assert signal.getsignal(which) == before


def test_a_second_ctrl_c_aborts(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.signal == signal.SIGTERM


def test_a_ctrl_c_that_torchrun_repeats_is_one(monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        now_s[0] += 0.9
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        now_s[0] += 0.2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_sigterm_does_not():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal == signal.SIGINT


def test_outside_the_main_thread_nothing_happens():
    before, seen = signal.getsignal(signal.SIGINT), []

    def enter():
        with StopRequest() as stop:
            seen.append((stop.signal, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(0, before)]
