"""An encoder-decoder: a prompt is its source, the text its answer."""

from typing import Any

import httpx2 as httpx
import torch

from moestro.config import EncDecConfig
from moestro.infer.engine import stream
from moestro.infer.sampling import SamplingConfig
from moestro.models.build import Model
from moestro.models.encdec import EncDec
from moestro.serve.served import Served
from moestro.text import ByteTokenizer

from .serving import at_work, state_of


def small() -> Model:
    torch.manual_seed(0)
    positions = {"kind": "relative", "shared": True, "buckets": 8, "max_distance": 12}
    return EncDec(
        EncDecConfig(
            vocab_size=259,
            dim=16,
            encoder_layers=2,
            decoder_layers=3,
            attention={"num_heads": 2, "context": 16, "positions": positions},
            moe={"hidden_dim": 16, "num_experts": 4, "top_k": 2},
            head={"tied": False},
        )
    ).eval()


def test_an_answer_to_a_source() -> None:
    model, tokenizer = small(), ByteTokenizer()
    served = Served("small", model, tokenizer, None, {}, 16, 0)
    sampling = SamplingConfig(temperature=0.0, max_tokens=6)
    want = list(stream(model, tokenizer, "a <extra_id_0> b", sampling))
    asked: dict[str, Any] = {"prompt": "a <extra_id_0> b", "temperature": 0, "max_tokens": 6}
    with at_work(state_of(served)) as address:
        url = f"{address}/v1/completions"
        body = httpx.post(url, json=asked).json()
        assert body["choices"][0]["text"] == "".join(piece.text for piece in want)
        assert body["usage"]["completion_tokens"] == len(want)
        assert httpx.post(url, json={**asked, "prompt": "x" * 16}).status_code == 413
        assert httpx.post(url, json={**asked, "prompt": "x" * 15}).status_code == 200
        for more in ({"return_routed_experts": True}, {"echo": True, "logprobs": 1}):
            assert httpx.post(url, json=asked | more).status_code == 400
        routing = httpx.get(f"{address}/v1/routing").json()
        assert routing["layers"] == [2, 3, 4]
        assert len(routing["load"]) == 3
        assert sum(map(sum, routing["load"])) > 0
        assert httpx.get(f"{address}/metrics").status_code == 200
