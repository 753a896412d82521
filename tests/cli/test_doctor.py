import json
import platform
from importlib.util import find_spec

import pytest
import torch

from moestro.cli.main import main
from moestro.kernels import backends, native_library


def facts(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert main(["doctor", "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOESTRO_BACKEND", raising=False)


def test_json_says_what_python_and_torch_say(capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys)
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["backends"] == [row._asdict() for row in backends.table()]
    assert found["problem"] is None
    assert (found["cuda"] is not None) == torch.cuda.is_available()


def test_text_shows_every_backend_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for row in backends.table():
        lines = [line for line in out.splitlines() if line[2:].split()[:2] == [row.use, row.name]]
        line = next(line for line in lines if row.reason in line)
        assert line.startswith("→") == row.chosen
        assert (" yes " in line) == row.ok
    assert torch.__version__ in out
    assert "MOESTRO_BACKEND" in out


def test_extras_come_with_their_install_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    out = capsys.readouterr().out
    for name, extra in (("gguf", "gguf"), ("transformers", "hf"), ("tensorboard", "tensorboard")):
        line = next(line for line in out.splitlines() if line.strip().startswith(name))
        if find_spec(name):
            assert line.endswith("found")
        else:
            assert f"pip install 'moestro[{extra}]'" in line


def test_a_forced_backend_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOESTRO_BACKEND", "reference")
    found = facts(capsys)
    assert found["forced_backend"] == "reference"
    chosen = {row["use"]: row["name"] for row in found["backends"] if row["chosen"]}
    assert chosen == {"train": "reference", "infer": "reference"}


def test_a_forced_backend_that_does_not_exist_is_explained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOESTRO_BACKEND", "torhc")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "none can run: unknown kernel backend 'torhc'" in out
    assert "→" not in out.split("one in use", 1)[1]


def test_the_native_path_and_its_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if native_library.available() is not None:
        pytest.skip("no native library")
    monkeypatch.delenv("MOESTRO_NATIVE_PATH", raising=False)
    native = facts(capsys)["native"]
    assert native["path"] == native["best"] == native_library.path()
    assert native["threads"] >= 1
    assert "best path" in native["reason"]
    main(["doctor"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line[:6] == "native")
    assert native["path"] in line
    assert native["reason"] in line
    try:
        monkeypatch.setenv("MOESTRO_NATIVE_PATH", "portable")
        forced = facts(capsys)["native"]
        assert forced["path"] == "portable"
        assert "forced by MOESTRO_NATIVE_PATH=portable" in forced["reason"]
        monkeypatch.setenv("MOESTRO_NATIVE_PATH", "sse")
        wrong = facts(capsys)["native"]
        assert wrong["path"] is None
        assert "known: portable, avx2" in wrong["reason"]
    finally:
        monkeypatch.delenv("MOESTRO_NATIVE_PATH")
        native_library.library()


def test_without_a_compiler_it_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "the native library was not built; install a C++ compiler"
    monkeypatch.setattr(native_library, "available", lambda: reason)
    assert facts(capsys)["native"]["reason"] == reason
    main(["doctor"])
    assert f"no native kernels: {reason}" in capsys.readouterr().out
