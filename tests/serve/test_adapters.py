"""Adapters that requests choose by name: each gets the merged model's answer, the model stays."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch

from moestro.checkpoints.families import FAMILIES
from moestro.checkpoints.opening import adapted, open_checkpoint
from moestro.checkpoints.peft import write_peft
from moestro.cli.main import main
from moestro.config import LoraConfig
from moestro.errors import CheckpointError
from moestro.kernels import native_cpu
from moestro.models.adapters import attach, attached
from moestro.serve.served import serve_model

from .serving import at_work, state_of
from .test_chat import HELLO, post

ASKED: dict[str, Any] = {"prompt": "some text", "max_tokens": 12, "temperature": 0, "logprobs": 3}


@pytest.fixture(scope="module")
def paths(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters, far from zero."""
    found = {}
    for seed, name in enumerate(("calm", "loud"), 1):
        model = open_checkpoint(folder).model
        attach(model, LoraConfig(rank=2, alpha=8.0))
        torch.manual_seed(seed)
        for adapter in attached(model).values():
            torch.nn.init.normal_(adapter.b)
        found[name] = tmp_path_factory.mktemp("adapters") / name
        write_peft(model, FAMILIES["mixtral"], found[name], "base")
    return found


@pytest.mark.parametrize("weights", ["as-is", "int8"])
def test_a_request_chooses_its_adapter(folder: Path, paths: dict[str, Path], weights: str) -> None:
    if weights == "int8" and native_cpu.available() is not None:
        pytest.skip(str(native_cpu.available()))
    opened = open_checkpoint(folder, weights=weights, keep=False)
    models = {name: adapted(opened, path) for name, path in paths.items()}
    assert not attached(opened.model)
    owned = {each.data_ptr() for each in opened.model.parameters()}
    assert all(
        each.data_ptr() in owned
        for model in models.values()
        for name, each in model.named_parameters()
        if "_adapter." not in name
    )
    served = serve_model("tiny", opened.model, folder, adapted=models)
    with at_work(state_of(served)) as address, ThreadPoolExecutor(4) as threads:
        alone = post(address, "/v1/completions", **ASKED).json()["choices"]
        names = ["calm", "tiny", "loud", "calm"]
        together = list(
            threads.map(lambda name: post(address, "/v1/completions", **ASKED, model=name), names)
        )
        load = httpx.get(f"{address}/v1/routing").json()["load"]
        listed = httpx.get(f"{address}/v1/models").json()["data"]
        lost = post(address, "/v1/completions", **ASKED, model="quiet")
        chat = post(address, messages=HELLO, max_tokens=1, model="loud").json()
    bodies = dict(zip(names, (each.json() for each in together), strict=True))
    assert [bodies[name]["model"] for name in names] == names
    assert bodies["tiny"]["choices"] == alone
    assert together[0].json()["choices"] == together[3].json()["choices"]
    for name, path in paths.items():
        other = open_checkpoint(folder, weights=weights, keep=False, adapter=path).model
        with at_work(state_of(serve_model("one", other, folder))) as address:
            (want,) = post(address, "/v1/completions", **ASKED).json()["choices"]
        (found,) = bodies[name]["choices"]
        assert found["text"] == want["text"] != alone[0]["text"]
        assert found["logprobs"]["token_logprobs"] == pytest.approx(
            want["logprobs"]["token_logprobs"], abs=1e-4
        )
    assert sum(map(sum, load)) > 0
    assert [(each["id"], each["parent"]) for each in listed] == [
        ("tiny", None), ("calm", "tiny"), ("loud", "tiny")
    ]  # fmt: skip
    assert lost.status_code == 404
    assert "'tiny' and 'calm' and 'loud'" in lost.json()["error"]["message"]
    assert chat["model"] == "loud"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--adapter", "calm"], "give NAME=PATH"),
        (["--adapter", "=a"], "give NAME=PATH"),
        (["--adapter", "a=b", "--adapter", "a=c"], "each name once"),
        (["--adapter", "tiny=b"], "is the model's own name"),
        (["--adapter", "a=b", "--memory", "6GiB"], "leave out --memory"),
    ],
)
def test_names_that_cannot_be(folder: Path, words: list[str], said: str, capsys) -> None:
    assert main(["serve", str(folder), "--port", "0", *words]) == 2
    assert said in capsys.readouterr().err


def test_an_adapter_of_another_model(folder: Path, paths: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((paths["calm"] / "adapter_config.json").read_text())
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "adapter_config.json").write_text(json.dumps(config))
    from safetensors.torch import save_file

    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(2, 999)}, wrong / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="of another model"):
        adapted(open_checkpoint(folder), wrong)
