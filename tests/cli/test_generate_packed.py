import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from moestro.checkpoints import opening
from moestro.checkpoints.folders import atomic_folder
from moestro.checkpoints.packed_files import default_path
from moestro.checkpoints.quantize import WEIGHTS
from moestro.checkpoints.writing import save_model
from moestro.cli.main import main
from moestro.config import ModelConfig
from moestro.kernels import native_cpu
from moestro.models.decoder import Decoder
from moestro.text import ByteTokenizer

pytestmark = pytest.mark.skipif(
    native_cpu.available() is not None, reason=str(native_cpu.available())
)


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(published, tmp_path / "model"))


def text(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    given = ["generate", *words, "--max-tokens", "12", "--temperature", "0", "--json"]
    assert main(given) == 0
    return str(json.loads(capsys.readouterr().out)["text"])


def test_the_packed_form_is_kept_and_mapped_the_next_time(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = text(capsys, str(folder), "hello", "--weights", "int4")
    (kept,) = folder.glob("*.moestro")
    assert kept.name == "packed-int4-32.moestro"

    def refuse(*_: object) -> None:
        raise AssertionError("packed again")

    monkeypatch.setattr(opening, "read_packed", refuse)
    assert text(capsys, str(folder), "hello", "--weights", "int4") == first


def test_elsewhere_when_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = folder.parent / "there" / "kept"
    words = [str(folder), "hello", "--weights", "int8", "--packed", str(place)]
    first = text(capsys, *words)
    assert place.is_file()
    assert not list(folder.glob("*.moestro"))
    assert text(capsys, *words) == first
    assert main(["generate", str(folder), "--weights", "int4", "--packed", str(place)]) == 2
    assert "packed in another form than int4 of 32" in capsys.readouterr().err


def test_a_changed_checkpoint_and_a_broken_file_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(folder), "hello", "--weights", "bf16", "--max-tokens", "2"]
    assert main(words) == 0
    config = folder / "config.json"
    before = config.read_text()
    config.write_text(before + "\n")
    assert main(words) == 2
    assert "a different checkpoint" in capsys.readouterr().err
    config.write_text(before)
    (kept,) = folder.glob("*.moestro")
    kept.write_bytes(kept.read_bytes()[:9000])
    assert main(words) == 2
    assert "truncated" in capsys.readouterr().err
    kept.unlink()
    assert main(words) == 0


@pytest.mark.parametrize("kind", ["of the hub", "read-only"])
def test_a_folder_that_is_not_ours_stays_as_it_is(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packed form is kept in a cache of our own, by what is in the folder."""
    home = folder.parent / "home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    if kind == "of the hub":
        snapshots = folder.parent / "models--org--tiny" / "snapshots"
        snapshots.mkdir(parents=True)
        folder = folder.rename(snapshots / ("0" * 40))
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)
    before = sorted(folder.iterdir())
    words = [str(folder), "hello", "--weights", "int4"]
    first = text(capsys, *words)
    assert sorted(folder.iterdir()) == before
    (kept,) = home.rglob("*.moestro")
    assert kept.relative_to(home).parts[::2] == ("moestro", "packed-int4-32.moestro")
    with monkeypatch.context() as patched:
        patched.setattr(opening, "read_packed", None)
        assert text(capsys, *words) == first
    # Another content is another model.
    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")
    assert text(capsys, *words) == first
    assert len(list(home.rglob("*.moestro"))) == 2


@pytest.mark.parametrize("stated", ["", "relative", None])
def test_the_cache_without_a_place_of_its_own(
    stated: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if stated is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", stated)
    place = default_path(Path("models--a--b/snapshots/1"), WEIGHTS["int8"])
    assert place.parent.parent == tmp_path / ".cache" / "moestro"


@pytest.mark.filterwarnings("default:the packed form is not kept")
def test_a_full_disk_is_said_and_the_text_comes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = folder / "config.json" / "below"
    words = ["generate", str(folder), "a", "--weights", "int8", "--packed", str(blocked)]
    assert main([*words, "--max-tokens", "2"]) == 0
    captured = capsys.readouterr()
    assert "the packed form is not kept" in captured.err
    assert captured.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "int5"], "weights are fp32, bf16, int8"),
        (["--weights", "int8", "--dtype", "bf16"], "leave one out"),
        (["--weights", "int8", "--device", "cuda"], "leave out --device cuda"),
        (["--packed", "file"], "add --weights"),
    ],
)
def test_options_that_do_not_go_together(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(folder), "a", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_second_start_does_not_read_our_own_checkpoint_through(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    cfg = ModelConfig(
        vocab_size=258, dim=32, num_layers=1, moe={"hidden_dim": 32, "num_experts": 4, "top_k": 2}
    )
    with atomic_folder(tmp_path / "own") as inside:
        save_model(Decoder(cfg), inside)
        ByteTokenizer().save(inside)
    words = [str(tmp_path / "own"), "hello", "--weights", "int8"]
    first = text(capsys, *words)
    weights = tmp_path / "own" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert text(capsys, *words) == first
    assert main(["generate", *words[:-1], "int4"]) == 2, "nothing is kept of it: read through"
    assert "model.safetensors" in capsys.readouterr().err
