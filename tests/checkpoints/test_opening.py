"""The door to weights: a name in, a model out, by the library as by the command line."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moestro.checkpoints import folders
from moestro.checkpoints.families import OWN
from moestro.checkpoints.folders import atomic_folder
from moestro.checkpoints.hub import find_checkpoint
from moestro.checkpoints.opening import kept_as, open_checkpoint, open_streamed
from moestro.checkpoints.quantize import is_packed
from moestro.checkpoints.tensor_files import Source
from moestro.checkpoints.transfer import load_tensors, match
from moestro.checkpoints.writing import save_model, write_pretrained
from moestro.config import ModelConfig
from moestro.errors import CheckpointError, ConfigError
from moestro.kernels import native_cpu
from moestro.models.decoder import Decoder
from moestro.models.materialize import materialize, without_memory

NEEDS_NATIVE = pytest.mark.skipif(
    native_cpu.available() is not None, reason=str(native_cpu.available())
)
CFG = ModelConfig(
    vocab_size=40,
    dim=32,
    num_layers=2,
    attention={"num_heads": 2, "context": 16},
    moe={"hidden_dim": 32, "num_experts": 4, "top_k": 2},
)
TOKENS_BS = torch.arange(12).view(2, 6)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with one checkpoint."""
    with atomic_folder(tmp_path / "run/checkpoints/step-000001") as folder:
        save_model(Decoder(CFG), folder)
    return tmp_path / "run"


def test_every_file_is_hashed_once_an_opening(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: Counter[str] = Counter()
    real = folders._fingerprint

    def noted(path: Path) -> dict[str, object]:
        hashed[path.name] += 1
        return real(path)

    monkeypatch.setattr(folders, "_fingerprint", noted)
    opened = open_checkpoint(run)
    assert opened.folder == run / "checkpoints/step-000001"
    assert hashed == {"config.json": 1, "model.safetensors": 1}
    found = find_checkpoint(run)
    hashed.clear()
    again = open_checkpoint(found, verified=True)
    assert not hashed
    assert torch.equal(again.model(TOKENS_BS).logits, opened.model(TOKENS_BS).logits)


def test_a_tensor_that_is_read_again_is_counted_once(run: Path) -> None:
    calls: list[tuple[int, int]] = []
    _, read = open_streamed(find_checkpoint(run), progress=lambda *call: calls.append(call))
    again = ("embed.weight", "norm.weight", "embed.weight")
    first, _, second = (read(name).clone() for name in again)
    assert torch.equal(first, second)
    assert [done for done, _ in calls] == [40 * 32 * 4, 41 * 32 * 4, 41 * 32 * 4]


@NEEDS_NATIVE
@pytest.mark.parametrize("layout", ["ours", "theirs"])
def test_packed_weights_are_kept_or_not(run: Path, layout: str, tmp_path: Path) -> None:
    name = run
    if layout == "theirs":
        name = tmp_path / "theirs"
        write_pretrained(open_checkpoint(run).model, name, family="mixtral")
    folder = find_checkpoint(name)
    calls: list[tuple[int, int]] = []
    options = {"weights": "int8", "progress": lambda *call: calls.append(call)}
    first = open_checkpoint(name, **options, keep=False).model
    assert is_packed(first)
    assert calls[-1][0] == calls[-1][1]
    assert not list(folder.glob("*.moestro"))
    kept = open_checkpoint(name, **options).model
    assert len(list(folder.glob("*.moestro"))) == 1
    calls.clear()
    mapped = open_checkpoint(find_checkpoint(name, kept_as("int8")), **options).model
    assert not calls, "a kept form is mapped, not read"
    for model in (kept, mapped):
        assert torch.equal(model(TOKENS_BS).logits, first(TOKENS_BS).logits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "int5"}, "int5"),
        ({"packed": Path("file")}, "add --weights"),
        ({"weights": "int8", "dtype": "bf16"}, "leave one out"),
        ({"weights": "int8", "device": "cuda"}, "leave out --device cuda"),
        ({"dtype": "int3"}, "choose fp32, bf16 or fp16"),
        ({"device": "warp"}, "cannot be used here"),
    ],
)
def test_choices_that_are_refused(run: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_checkpoint(run, **options)


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", torch.bfloat16])
def test_number_types(run: Path, dtype: str | torch.dtype) -> None:
    model = open_checkpoint(run, dtype=dtype, device="auto").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@dataclass(frozen=True)
class Held(Source):
    """A tensor of no file at all, as a further format would give it."""

    tensor: Tensor

    def entry(self, index: int) -> Source:
        return held(self.key, self.tensor[index])

    def load(self, dtype: torch.dtype) -> Tensor:
        return self.tensor.to(dtype)


def held(key: str, tensor: Tensor) -> Held:
    return Held(Path("held"), key, None, tuple(tensor.shape), tensor.nbytes, tensor)


def test_a_further_format_is_one_more_mapping_of_sources() -> None:
    original = Decoder(CFG).eval()
    sources = {key: held(key, tensor) for key, tensor in original.state_dict().items()}
    with without_memory():
        empty = Decoder(CFG)
    unread = match(Path("held"), OWN, empty, sources)
    assert unread.dtype == torch.bfloat16, "quantised weights are made in it unless asked otherwise"
    materialize(empty, torch.float32, "cpu")
    load_tensors(unread)
    assert torch.equal(empty.eval()(TOKENS_BS).logits, original(TOKENS_BS).logits)
    del sources["norm.weight"]
    with pytest.raises(CheckpointError, match=r"missing norm\.weight"):
        match(Path("held"), OWN, empty, sources)
