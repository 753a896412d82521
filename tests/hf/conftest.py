"""For the tests of the plug: what is said once in a process is said once in a test."""

import pytest

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch):
    from moestro.hf import compute

    monkeypatch.setattr(compute, "_said", set())
