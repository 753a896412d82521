"""llama.cpp opens what is written, and goes on as we do: 64 greedy tokens, text by text.

Give a `llama-server` of llama.cpp itself, and its options, in MOESTRO_LLAMA_SERVER, or install the
package xllamacpp. Models of random weights have near ties, in which any rounding decides. So these
learn a text by heart first, and the test asks for a margin at every token.
"""

import json
import os
import shlex
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints.families import tiny

from moestro.checkpoints.gguf.writing import write_gguf
from moestro.checkpoints.opening import open_checkpoint
from moestro.infer.engine import stream
from moestro.infer.sampling import SamplingConfig
from moestro.text import load_tokenizer, train_bpe

SERVER = os.environ.get("MOESTRO_LLAMA_SERVER", "")
try:
    import xllamacpp
except ImportError:
    xllamacpp = None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not SERVER and xllamacpp is None,
        reason="MOESTRO_LLAMA_SERVER names no llama-server, and xllamacpp is not installed",
    ),
]
TOKENS = 64
MARGIN = 1.0  # least difference of the two best logits; rounded rows move these by hundredths
TEXT = (
    "A router reads each token and chooses a few experts for it. Their answers are weighed, added "
    "up, and sent on; whoever was not asked does no work. So a large model costs as much to run "
    "as a small one, if its weights have room: that is the bargain, and every layer makes it anew."
)
PROMPT = TEXT[:19]  # whole words, as they were learnt
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
}
# One form of each layout that `convert --to gguf` promises, of widths that blocks of 32 divide.
FORMS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3_moe": {"moe_intermediate_size": 32, "head_dim": 16},
    "olmoe": {"num_attention_heads": 4, "num_key_value_heads": 4},  # llama.cpp reads no other
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
        "rope_parameters": {**tiny.YARN, "truncate": False},
    },
}


def learn(model: torch.nn.Module, tokens_BS: torch.Tensor) -> None:
    """The text by heart."""
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(60):
        logits_BSV = model(tokens_BS).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), tokens_BS[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=FORMS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of Hugging Face's layout that knows the text."""
    place = tmp_path_factory.mktemp(request.param)
    tokenizer = train_bpe([TEXT], 320)
    kind, changes = tiny.TINY["gpt_oss_even" if request.param == "gpt_oss" else request.param]
    own = {**changes, **WIDE, **FORMS[request.param], "vocab_size": tokenizer.vocab_size}
    own |= {"bos_token_id": None, "eos_token_id": tokenizer.end_of_text}
    tiny.TINY["by heart"] = (kind, own)
    try:
        theirs = tiny.build("by heart")
    finally:
        del tiny.TINY["by heart"]
    learn(theirs, torch.tensor([tokenizer.encode(TEXT)]))
    tiny.save(theirs, place)
    tokenizer.save(place)
    return place


@contextmanager
def served(file: Path) -> Iterator[str]:
    """The address of a llama.cpp server of the file."""
    if not SERVER:
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.warmup = str(file), 256, False
        params.cpuparams.n_threads = 1
        server = xllamacpp.Server(params)
        yield server.listening_address
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*shlex.split(SERVER), "-m", str(file), "-c", "256", "-t", "1", "--port", str(port)]
    log = file.with_suffix(".log")
    with (
        log.open("wb") as out,
        subprocess.Popen(words, stdout=out, stderr=out, cwd=file.parent) as process,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                assert process.poll() is None, log.read_text(errors="replace")[-2000:]
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield url
        finally:
            process.kill()


def theirs(file: Path) -> str:
    """What llama.cpp says after the prompt."""
    asked = {"prompt": PROMPT, "n_predict": TOKENS, "temperature": 0, "cache_prompt": False}
    asked |= {"repeat_penalty": 1.0, "top_k": 1}  # some builds have other defaults
    with served(file) as url:
        request = urllib.request.Request(
            f"{url}/completion",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return str(json.load(reply)["content"])


def least_margin(model: Any, ids: list[int], tokens: int) -> float:
    """Of the two best logits, over the last tokens."""
    with torch.no_grad():
        best_S2 = model(torch.tensor([ids])).logits[0, -tokens - 1 : -1].float().topk(2).values
    return float((best_S2[:, 0] - best_S2[:, 1]).min())


@pytest.mark.parametrize("kind", ["bf16", "q8_0", "q4_0"])
def test_greedy_texts_are_the_same(folder: Path, kind: str, tmp_path: Path) -> None:
    opened = open_checkpoint(folder)
    assert opened.family is not None
    file = tmp_path / "m.gguf"
    write_gguf(opened.model, file, family=opened.family, kind=kind, tokenizer=folder)
    back = open_checkpoint(file)
    tokenizer = load_tokenizer(back.folder)
    settings = SamplingConfig(temperature=0, max_tokens=TOKENS)
    pieces = list(stream(back.model, tokenizer, PROMPT, settings))
    ours = "".join(piece.text for piece in pieces)
    tokens = [piece.token for piece in pieces]
    assert len(tokens) == TOKENS
    ids = [*tokenizer.encode_prompt(PROMPT), *tokens]
    assert least_margin(back.model, ids, TOKENS) > MARGIN
    assert theirs(file) == ours
