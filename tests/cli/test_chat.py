"""A conversation typed line by line; what happens between the lines is tests/infer's."""

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moestro.cli.main import main
from moestro.infer import conversation
from moestro.infer.writing import Piece

TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}assistant:"


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    made = Path(shutil.copytree(published, tmp_path / "model"))
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


def talk(
    monkeypatch: pytest.MonkeyPatch, folder: Path, typed: str, *words: str, code: int = 0
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    given = ["chat", str(folder), "--max-tokens", "8", "--temperature", "0", *words]
    assert main(given) == code


def test_a_conversation(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved = tmp_path / "talk.json"
    typed = f"hello\n\nfirst \\\nsecond\n/save {saved}\n/reset\n/system be brief\nagain\n"
    talk(monkeypatch, folder, typed)
    out, err = capsys.readouterr()
    messages = json.loads(saved.read_text())["messages"]
    assert [each["content"] for each in messages[::2]] == ["hello", "first \nsecond"]
    answers = "".join(f"{each['content']}\n" for each in messages[1::2])
    assert out.startswith(answers)
    assert err.count("tokens/s") == 3
    assert "cut at --max-tokens" in err


def test_experts_of_the_last_answer(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk(monkeypatch, folder, "/experts\nhello\n/experts\n/experts 77\n/experts x\n")
    out, err = capsys.readouterr()
    assert "there is no answer yet" in err
    assert "first expert in layer" in out
    assert "layer 77 is not a mixture" in err
    assert "takes the number of a layer; given 'x'" in err


def test_what_is_wrong_is_said_and_the_conversation_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = "/what\n/save\n/save /nowhere/talk.json\n" + "x" * 5000 + "\n/help\n/exit\nhello\n"
    talk(monkeypatch, folder, typed)
    out, err = capsys.readouterr()
    assert "/what is not a command" in err
    assert "/save needs the name of a file" in err
    assert "/nowhere/talk.json cannot be written: No such file" in err
    assert "tokens long, and the model's context" in err
    assert "/reset" in err
    assert out == ""


def test_ctrl_c_stops_the_answer_and_not_the_program(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = conversation.Conversation.ask

    def ask(self: conversation.Conversation, text: str) -> Iterator[Piece]:
        for number, piece in enumerate(real(self, text)):
            if text == "stop me" and number == 2:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(conversation.Conversation, "ask", ask)
    talk(monkeypatch, folder, "stop me\nhello\n")
    _, err = capsys.readouterr()
    assert "2 tokens," in err
    assert "stopped" in err
    assert "8 tokens," in err


def test_models_without_a_template(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    talk(monkeypatch, folder, "", code=2)
    assert "no chat template" in capsys.readouterr().err
