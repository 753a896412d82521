"""Text to tokens and back."""

from typing import Any

import pytest

from moestro.serve.served import Served

from .test_chat import HELLO, post


def test_text_there_and_back(address: str, served: Served) -> None:
    found = post(address, "/tokenize", prompt="é!<|user|>").json()
    assert found["tokens"] == served.tokenizer.encode_prompt("é!<|user|>")
    assert (found["count"], found["max_model_len"]) == (5, 512)
    plain = post(address, "/tokenize", content="é!<|user|>", add_special_tokens=False).json()
    assert plain["tokens"] == found["tokens"][1:]
    back = post(address, "/detokenize", tokens=found["tokens"]).json()
    assert back == {"prompt": "é!", "content": "é!"}


def test_a_conversation_has_the_tokens_that_chat_reads(address: str) -> None:
    read = post(address, messages=HELLO, max_tokens=1).json()["usage"]["prompt_tokens"]
    whole = post(address, "/tokenize", messages=HELLO).json()
    assert whole["count"] == read
    without = post(address, "/tokenize", messages=HELLO, add_generation_prompt=False).json()
    assert without["tokens"] == whole["tokens"][:-1]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "content": "b"}),
        ("/tokenize", {"prompt": 5}),
        ("/tokenize", {"messages": []}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [99999]}),
        ("/detokenize", {"tokens": [10**30]}),
        ("/detokenize", {"tokens": "a"}),
    ],
)
def test_what_is_neither(address: str, path: str, body: dict[str, Any]) -> None:
    response = post(address, path, **body)
    assert response.status_code == 400
    assert response.json()["error"]["message"]
