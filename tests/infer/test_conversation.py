import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.chat import ChatTemplate
from moestro.config import ModelConfig
from moestro.errors import DataError
from moestro.infer.conversation import Conversation
from moestro.infer.engine import stream
from moestro.infer.sampling import SamplingConfig
from moestro.models.decoder import Decoder
from moestro.text import ByteTokenizer

TEMPLATE = ChatTemplate("{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:", {})
SETTINGS = SamplingConfig(max_tokens=9, temperature=0.9, seed=3)


def model(**changes: Any) -> Decoder:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "dim": 32,
        "num_layers": 2,
        "moe": {"hidden_dim": 24, "num_experts": 4, "top_k": 2},
        "attention": {"num_heads": 4, "context": 200},
    }
    return Decoder(ModelConfig(**{**sizes, **changes})).eval()


def alone(decoder: Decoder, text: str) -> str:
    return "".join(piece.text for piece in stream(decoder, ByteTokenizer(), text, SETTINGS))


def say(talk: Conversation, text: str) -> str:
    return "".join(piece.text for piece in talk.ask(text))


def test_each_turn_is_what_the_whole_conversation_gives() -> None:
    """Bit by bit: what was read before is taken up, and changes nothing."""
    decoder = model()
    talk = Conversation(decoder, ByteTokenizer(), TEMPLATE, SETTINGS, "be brief")
    first = say(talk, "hello")
    assert first == alone(decoder, "s:be brief;u:hello;a:")
    second = say(talk, "and now?")
    assert second == alone(decoder, f"s:be brief;u:hello;a:{first};u:and now?;a:")
    assert [each["role"] for each in talk.messages] == ["user", "assistant"] * 2


def test_earlier_turns_are_not_read_again() -> None:
    talk = Conversation(model(), ByteTokenizer(), TEMPLATE, SETTINGS)
    say(talk, "a question that is longer than the shortest beginning")
    say(talk, "another")
    prefixes = talk._session.prefixes
    if prefixes is None:
        pytest.skip("no native steps here")
    assert prefixes.hits > 50


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came() -> None:
    talk = Conversation(model(), ByteTokenizer(), TEMPLATE, SETTINGS)
    with closing(talk.ask("hello")) as pieces:
        found = next(pieces).text + next(pieces).text
    assert talk.messages[-1] == {"role": "assistant", "content": found}
    assert talk._session.live == 0
    assert len(say(talk, "go on")) > 0


def test_a_conversation_that_is_too_long_is_refused_and_taken_back() -> None:
    talk = Conversation(model(), ByteTokenizer(), TEMPLATE, SETTINGS)
    with pytest.raises(DataError, match=r"204 tokens long, and the model's context 200"):
        say(talk, "x" * 199)
    assert talk.messages == []
    say(talk, "hello")
    talk.reset()
    assert talk.messages == []


def test_a_message_that_the_model_cannot_read_is_taken_back() -> None:
    """Its tokens are beyond the model's vocabulary; the conversation goes on without it."""
    talk = Conversation(model(vocab_size=128), ByteTokenizer(), TEMPLATE, SETTINGS)
    with pytest.raises(DataError, match="token 195"):
        say(talk, "é")
    assert talk.messages == []
    with pytest.raises(DataError, match="token 195"):
        say(talk, "é")
    assert talk.messages == []


def test_saved(tmp_path: Path) -> None:
    talk = Conversation(model(), ByteTokenizer(), TEMPLATE, SETTINGS, "be brief")
    answer = say(talk, "hello")
    talk.save(tmp_path / "talk.json")
    assert json.loads((tmp_path / "talk.json").read_text())["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": answer},
    ]
