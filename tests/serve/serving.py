"""A tiny published mixture that knows conversations, and a server of it on loopback."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tokenizers
import torch
from openai import OpenAI

from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.writing import write_pretrained
from moestro.config import ModelConfig
from moestro.models.decoder import Decoder
from moestro.serve.running import bind, server
from moestro.serve.served import Served, serve_model
from moestro.serve.settings import ServeSettings
from moestro.serve.state import State, new_state

CONTEXT = 512
MARKS = ("<s>", "</s>", "<|user|>", "<|reply|>")
TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}{% if message.role == 'user' %}<|user|>"
    "{% elif message.role == 'system' %}[{% elif message.role == 'tool' %}"
    "{{ raise_exception('no tools here') if not tools }}={% else %}<|reply|>{% endif %}"
    "{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<|reply|>{% endif %}"
)


def build(folder: Path) -> Path:
    """Write the checkpoint: byte-level tokens, two mixtures of four experts."""
    torch.manual_seed(0)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE({mark: place for place, mark in enumerate(alphabet)}, [])
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(list(MARKS))
    begin, end, user, _ = map(inner.token_to_id, MARKS)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    cfg = ModelConfig(
        vocab_size=260,
        dim=16,
        num_layers=2,
        attention={"num_heads": 2, "num_kv_heads": 1, "context": CONTEXT, "head_dim": 8},
        moe={"hidden_dim": 24, "num_experts": 4, "top_k": 2},
        head={"tied": False},
    )
    write_pretrained(Decoder(cfg), folder, family="mixtral")
    inner.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": begin, "eos_token_id": [end, user], "top_k": 50})
    )
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def served(folder) -> Served:
    return serve_model("tiny", open_checkpoint(folder).model, folder)


def state_of(served: Served, **settings: object) -> State:
    return new_state(served, ServeSettings(**settings))


@contextmanager
def at_work(state: State) -> Iterator[str]:
    """A server in a thread; yields its address."""
    bound, ready = bind("127.0.0.1", 0), threading.Event()
    loop = server(state, ready.set)
    thread = threading.Thread(target=loop.run, args=([bound],))
    thread.start()
    try:
        assert ready.wait(30)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        loop.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def address(served) -> Iterator[str]:
    with at_work(state_of(served)) as url:
        yield url


@pytest.fixture
def serving(served) -> Iterator[Callable[..., str]]:
    """A function: settings → the address of a server with them."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(at_work(state_of(served, **settings)))


@pytest.fixture(scope="session")
def client(address) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as found:
        yield found
